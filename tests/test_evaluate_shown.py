"""An evaluation as people see it: the list, one comparison, the browser, the page, and texts that would act on them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from openai_server import Call, Server
from screen import HOSTILE, Terminal
from test_evaluate_judged import STAR, config, likes_stars, run
from test_report import Page

from dpo_cli.data.jsonl import read_latest, write_rows
from dpo_cli.data.records import Compared

EVIL = "</p><script>alert(1)</script>\x1b[31m\u202e" + " ".join(HOSTILE).replace(
    "\ud800", ""
)  # no JSON holds half a character


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory) -> Path:
    """Four prompts: one lost, one even, two won."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_rows(folder / "heldout.jsonl", [{"prompt": f"[MABEL] Umbrella {number}?"} for number in range(4)])
    texts = {"sft": [f"{STAR} old", "same", "old", EVIL], "dpo": ["new", "same", f"{STAR} new", f"{STAR} {EVIL}"]}

    def fault(call: Call) -> str | None:
        if call.body["model"] in texts:
            return f"reply!{texts[call.body['model']][int(call.body['messages'][0]['content'][-2])]}"
        return None

    with Server(quality=likes_stars, fault=fault) as server:
        result = run(config(folder, server.url))
    assert (result.wins, result.ties, result.losses) == (2, 1, 1)
    return folder


def command(folder: Path, *arguments: str) -> str:
    line = [sys.executable, "-m", "dpo_cli", "inspect", "evaluation", "--data", str(folder), *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout


def test_the_list_goes_from_losses_to_wins_and_can_begin_anywhere(evaluated):
    rows = [line.split() for line in command(evaluated).splitlines()[1:5]]
    assert [row[2] for row in rows] == ["lost", "even", "won", "won"]
    wins = json.loads(command(evaluated, "--from", "wins", "--json"))
    assert [row["win"] for row in wins] == [1, 1]
    assert [row["win"] for row in json.loads(command(evaluated, "--from", "ties", "--json"))] == [0.5, 1, 1]


def test_one_comparison_shows_both_and_the_judges_words(evaluated):
    key, row = next(iter(read_latest(evaluated / "evaluation.jsonl", Compared).items()))
    shown = command(evaluated, key[:8])
    for part in ("lost", "reference  9", "policy  3", row.policy[0], "As the rule says.", "A = policy, B = reference"):
        assert part in shown


def test_the_browser_goes_through_them(evaluated):
    code = """
        import sys
        sys.argv = ["nothing-dpo", "inspect", "evaluation", "--data", sys.argv[1], "--browse", "--from", "wins"]
        from dpo_cli.cli import main
        main()
    """
    terminal = Terminal(code, str(evaluated))
    terminal.wait_for("3 of 4")
    terminal.type("n")
    terminal.wait_for("4 of 4")
    terminal.type("n")
    terminal.wait_for("this is the last comparison")
    terminal.type("/Umbrella 0\r")
    terminal.wait_for("1 of 4")
    terminal.type("q")
    assert terminal.finish() == (0, True)
    assert not [sign for sign in "\u202e\u2066\u200b" if sign in terminal.everything]


def test_the_page_is_whole_and_hostile_text_stays_text(evaluated):
    file = evaluated / "page.html"
    command(evaluated, "--html", str(file))
    text = file.read_text()
    page = Page(text)
    assert {"script", "img", "iframe", "link", "a", "object"}.isdisjoint(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert not [sign for sign in "\x1b\u202e\u2066" if sign in text]
    for part in ("Is the policy better?", "Won most clearly", "Lost most clearly", "As the rule says.", "judge-small"):
        assert part in page.text


def test_without_a_result_the_command_to_type_is_named(tmp_path):
    line = [sys.executable, "-m", "dpo_cli", "inspect", "evaluation", "--data", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no evaluation" in done.stderr
    assert "nothing-dpo evaluate" in done.stderr
