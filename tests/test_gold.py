"""Judges measured on pairs that a person has ranked: a server plays three of known quality."""

import json
import random
import re

import pytest
from judging import config, reply, write
from openai_server import Call, Server, candidates
from test_human_judge import Session
from test_human_judge import row as human_row
from typer.testing import CliRunner

from dpo_cli.cli import app
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Judgment, completions_id, prompt_id
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import measure_judges

PRICE = "1,0.1,10"


def pairs(count: int) -> list[dict]:
    """TRL's rows; the better text names a number above 1,000."""
    return [
        {"prompt": f"Question {number}?", "chosen": f"Answer {1000 + number}.", "rejected": f"Answer {number}."}
        for number in range(count)
    ]


def play(call: Call) -> str:
    """judge-fine and judge-wordy see the better text in 9 of 10 prompts, judge-hasty takes the first in 6 of 10.

    Each is as right about a prompt in either order; judge-wordy gives ten times the words.
    """
    shown = candidates(call.body["messages"][-1]["content"])
    number = int(re.search(r"Question (\d+)", call.text)[1])
    right = {label: int(re.search(r"\d+", text)[0]) >= 1000 for label, text in shown.items()}
    model = call.body["model"]
    if model == "judge-hasty" and random.Random(f"hasty {number}").random() < 0.6:
        scores = {label: 9 - 5 * place for place, label in enumerate(shown)}
    else:
        sees = random.Random(f"sees {number}").random() < (0.5 if model == "judge-hasty" else 0.9)
        scores = {label: 8 if good == sees else 3 for label, good in right.items()}
    words = {"judge-wordy": 300, "judge-fine": 30, "judge-hasty": 3}[model]
    return "reply!" + reply(scores).replace("Why not.", "Because. " * words)


def measure(folder, url, models=("judge-wordy", "judge-fine", "judge-hasty"), gold=None, **options):
    settings = config(folder, url, model=list(models), price=PRICE, **options)
    return measure_judges.run(settings, Silent(), gold or folder / "gold.jsonl")


def test_three_judges_of_known_quality(tmp_path):
    write_rows(tmp_path / "gold.jsonl", pairs(100))
    with Server(fault=play) as server:
        report = measure(tmp_path, server.url)
        asked = server.calls.total()
        again = measure(tmp_path, server.url)
        assert server.calls.total() == asked == 3 * 2 * 100
    found = {one.name: one for one in report.judges}
    fine, wordy, hasty = (found[f"judge-{name}"] for name in ("fine", "wordy", "hasty"))
    seen = sum(random.Random(f"sees {number}").random() < 0.9 for number in range(100)) / 100
    assert fine.agreement.value == wordy.agreement.value == seen
    assert fine.agreement.low < seen < fine.agreement.high
    assert 0.4 < hasty.agreement.value < 0.6
    assert hasty.difference.high < 0
    assert report.best in ("judge-fine", "judge-wordy")
    assert report.cheapest == "judge-fine"
    assert wordy.usd_per_1000 > 3 * fine.usd_per_1000 > 3 * hasty.usd_per_1000
    assert hasty.first_wins.low > hasty.expected_first == 0.5
    assert fine.first_wins.holds(0.5)
    assert hasty.ties > 0.5 > fine.ties == 0
    assert any("judge-hasty prefers what it is shown first" in said for said in report.findings)
    assert again.judges == report.judges
    assert (again.calls, again.receipt, again.usd) == (0, None, report.usd)


def test_the_command_shows_them_side_by_side_and_touches_nothing_else(tmp_path):
    write_rows(tmp_path / "gold.jsonl", pairs(40))
    models = [flag for name in ("wordy", "fine", "hasty") for flag in ("--model", f"judge-{name}")]
    with Server(fault=play) as server:
        arguments = ["judge", "--gold", str(tmp_path / "gold.jsonl"), "--data", str(tmp_path), "--url", server.url]
        arguments += [*models, "--price", PRICE]
        planned = CliRunner().invoke(app, [*arguments, "--dry-run", "--json"])
        assert json.loads(planned.stdout)["calls"] == 3 * 2 * 40
        assert json.loads(planned.stdout)["estimate"]["usd_low"] > 0
        assert not (tmp_path / "gold").exists()
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"})
        assert done.exit_code == 0, done.output
        as_json = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert as_json["cheapest"] == "judge-fine"
    assert "judge-fine ←" in done.output
    assert "The cheapest judge to take is judge-fine" in " ".join(done.output.split())
    assert "nothing-dpo judge --model judge-fine" in done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gold", "gold.jsonl"]


def test_a_persons_judgments_are_gold(tmp_path):
    """Of three answers there are three pairs; the judge inverts one of the second prompt's, and ties one."""
    rows = [human_row(f"Question {number}?", "one", "two", "three") for number in (1, 2)]
    write(tmp_path / "human", rows)
    session = Session(tmp_path / "human")
    for number in (1, 2):
        session.wait(number, 2)
        session.type(session.keys_for("three", "two", "one"))
    session.wait_for("All done")
    assert session.leave("\r") == (0, True)

    def fault(call: Call) -> str:
        texts = candidates(call.body["messages"][-1]["content"])
        marks = {"one": 2, "two": 5, "three": 9} if "Question 1" in call.text else {"one": 5, "two": 5, "three": 4}
        return "reply!" + reply({label: marks[text] for label, text in texts.items()})

    gold = tmp_path / "human/judgments.jsonl"
    with Server(fault=fault) as server:
        report = measure(tmp_path / "work", server.url, ["judge-a"], gold)
    (one,) = report.judges
    assert (report.prompts, report.pairs) == (2, 6)
    assert one.agreement.value == pytest.approx((1 + 0.5 / 3) / 2)
    assert one.ties == pytest.approx(1 / 6)


def test_failures_are_counted_asked_again_and_no_agreement(tmp_path):
    write_rows(tmp_path / "gold.jsonl", pairs(4))
    bad = lambda call: "reply!Hm." if "Question 3" in call.text else play(call)  # noqa: E731
    with Server(fault=bad) as server:
        report = measure(tmp_path, server.url, ["judge-fine"])
        (one,) = report.judges
        assert (one.prompts, one.errors) == (3, {"no valid verdict: no JSON object": 1})
        server.fault = play
        assert measure(tmp_path, server.url, ["judge-fine"]).judges[0].prompts == 4


def test_the_budget_is_of_all_judges_together(tmp_path):
    write_rows(tmp_path / "gold.jsonl", pairs(20))
    with Server(fault=play) as server:
        whole = measure(tmp_path / "a", server.url, ["judge-fine"], tmp_path / "gold.jsonl").usd
        with pytest.raises(UserError, match="budget") as error:
            measure(tmp_path / "b", server.url, gold=tmp_path / "gold.jsonl", max_usd=1.5 * whole, concurrency=1)
        assert error.value.code == Exit.BUDGET


def test_other_judges_are_measured_too(tmp_path):
    write_rows(tmp_path / "gold.jsonl", pairs(10))
    code = "def score(prompt, completion):\n    return int(''.join(filter(str.isdigit, completion)))\n"
    (tmp_path / "scorer.py").write_text(code)
    settings = config(tmp_path, judge="function", function=f"{tmp_path}/scorer.py:score")
    report = measure_judges.run(settings, Silent(), tmp_path / "gold.jsonl")
    (one,) = report.judges
    assert (one.name, one.agreement.value, one.usd_per_1000) == ("function", 1.0, 0.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "no answer in it is ranked above another"),
        ('{"text": "a"}\n', "no known preference format"),
        ('{"id": "x", "completions_id": "y", "scores": [1, 2]}\n', "none of its judgments"),
    ],
)
def test_what_is_no_gold_is_refused(tmp_path, content, message):
    if content:
        (tmp_path / "gold.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        measure(tmp_path, "http://127.0.0.1:9/v1")


def test_judgments_of_other_completions_are_no_gold(tmp_path):
    one = human_row("Question?", "one", "two")
    stale = Judgment(id=prompt_id(one.prompt), completions_id=completions_id(["one", "other"]), scores=[1, 2])
    write(tmp_path, [one])
    write_rows(tmp_path / "gold.jsonl", [stale])
    with pytest.raises(UserError, match="none of its judgments"):
        measure(tmp_path, "http://127.0.0.1:9/v1")


def test_answers_that_a_person_scored_are_gold_in_other_tools_forms(tmp_path):
    """A row of the import's formats: three answers, of which the judge inverts one pair of three."""
    answers = [{"response": "one", "overall_score": 1}, {"response": "two", "overall_score": 2},
               {"response": "three", "overall_score": 3}]  # fmt: skip
    write_rows(tmp_path / "gold.jsonl", [{"instruction": "Question 1?", "completions": answers}])
    marks = {"one": 5, "two": 4, "three": 9}

    def fault(call: Call) -> str:
        texts = candidates(call.body["messages"][-1]["content"])
        return "reply!" + reply({label: marks[text] for label, text in texts.items()})

    with Server(fault=fault) as server:
        report = measure(tmp_path, server.url, ["judge-a"])
    assert (report.prompts, report.pairs) == (1, 3)
    assert report.judges[0].agreement.value == pytest.approx(2 / 3)
