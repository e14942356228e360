"""A person as judge, in a real terminal."""

import json
import os
import re
import signal
import subprocess
import sys
import unicodedata

import pytest
from judging import config, judgments, run, write
from openai_server import Server
from screen import FORBIDDEN, HOSTILE, Terminal

from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Completions, Judgment, Order, completions_id, prompt_id
from dpo_cli.errors import UserError
from dpo_cli.judges._agreement import agree
from dpo_cli.statistics import wilson

COMMAND = "from dpo_cli.cli import main; main()"
# All that the session itself writes besides text.
OWN = re.compile(r"\x1b\[(?:H|2K|[0127]?m|1;36m|32m|\d+G)|\r\n")
OPENED, CLOSED = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"


def row(question, *texts, **fields):
    prompt = [{"role": "user", "content": question}]
    rest = {"model": "the-model", "finish_reasons": ["the-reason"] * len(texts), "sampling": {"note": "the-sampling"}}
    return Completions(id=prompt_id(prompt), prompt=prompt, completions=list(texts), **{**rest, **fields})


class Session(Terminal):
    """`judge --judge human`, or another command, on a folder, and what it shows."""

    def __init__(self, folder, *options, command="judge", **size):
        super().__init__(COMMAND, command, "--judge", "human", "--data", str(folder), *options, **size)

    def wait(self, number, total, ranking=""):
        """Wait until a prompt is shown with a ranking."""
        self.wait_for(f"\x1b[7m {number} of {total} \x1b[0m\x1b[1m {ranking}\x1b[0m")

    @property
    def lines(self):
        """The last screen, line by line, without styles."""
        return [OWN.sub("", line) for line in self.everything.rpartition("\x1b[H")[2].split("\r\n")]

    @property
    def candidates(self):
        """The candidates of the last screen, which take one line."""
        heads = next(i for i, line in enumerate(self.lines) if re.match(r"1\b", line))
        return [text.strip() for text in self.lines[heads + 1].split("│")]

    def keys_for(self, *texts):
        """The digits of candidates, in the order given."""
        return "".join(str(self.candidates.index(text) + 1) for text in texts)

    def leave(self, keys="q"):
        self.type(keys)
        self.wait_for(CLOSED)
        return self.finish()


def scores_of(folder, completions):
    judgment = judgments(folder)[completions.id]
    return dict(zip(completions.completions, judgment.scores or [], strict=True))


def test_a_typed_ranking_becomes_scores(tmp_path):
    rows = [row("first?", "red", "green", "blue", "red "), row("second?", "one", "two", "three", "four")]
    write(tmp_path, rows)
    session = Session(tmp_path, columns=140)
    for number in (1, 2):
        session.wait(number, 2)
        if "first?" in session.lines[0]:
            seen = session.candidates
            session.type(session.keys_for("blue", "red", "green"))
        else:
            best, *equals, worst = session.keys_for("three", "one", "four", "two")
            session.type(f"{best}{'='.join(equals)}{worst}")
    session.wait_for("All done")
    assert session.leave("\r") == (0, True)
    assert scores_of(tmp_path, rows[0]) == {"blue": 10.0, "red": 5.5, "green": 1.0, "red ": 5.5}
    assert scores_of(tmp_path, rows[1]) == {"three": 10.0, "one": 5.5, "four": 5.5, "two": 1.0}
    first = judgments(tmp_path)[rows[0].id]
    assert first.ranking == [2, 0, 3, 1]
    assert first.consistent is True
    assert first.judge == {"judge": "human"}
    (order,) = first.orders
    assert [rows[0].completions[index] for index in order.order] == seen
    assert order.raw == " ".join(str(seen.index(text) + 1) for text in ("blue", "red", "green"))
    assert order.scores["ABC"[seen.index("blue")]] == 10.0
    assert "2/2" in session.everything.rpartition(CLOSED)[2]
    assert (tmp_path / "train.jsonl").stat().st_size + (tmp_path / "val.jsonl").stat().st_size > 0


def test_the_rest_ties_last(tmp_path):
    write(tmp_path, [row("first?", "red", "green", "blue")])
    session = Session(tmp_path)
    session.wait(1, 1)
    session.type("\r" + session.keys_for("green") + "\r")
    session.wait_for("All done")
    session.leave()
    (judgment,) = judgments(tmp_path).values()
    assert judgment.scores == [3.25, 10.0, 3.25]


def test_undo_goes_back_key_by_key_and_into_the_prompt_before(tmp_path):
    rows = [row(f"number {number}?", "red", "green", "blue") for number in range(3)]
    write(tmp_path, rows)
    session = Session(tmp_path)
    session.wait(1, 3)
    session.type("u")
    session.wait_for("nothing to undo")
    session.type("1=")
    session.wait(1, 3, "1=")
    session.type("u")
    session.wait(1, 3, "1")
    session.type("23")
    session.wait(2, 3)
    assert [judgment.error for judgment in judgments(tmp_path).values()] == [None]
    session.type("s")
    session.wait(3, 3)
    session.type("uu")
    session.wait(2, 3)
    session.wait(1, 3, "1 2")
    first = judgments(tmp_path)
    assert [judgment.scores for judgment in first.values()] == [None, None]
    session.type("uu")
    session.wait(1, 3)
    best = session.candidates[2]
    session.type("321")
    session.wait(2, 3)
    assert session.leave() == (1, True)
    after = judgments(tmp_path)
    assert list(after) == list(first)
    ranked, taken_back = after.values()
    assert scores_of(tmp_path, next(r for r in rows if r.id == ranked.id))[best] == 10.0
    assert taken_back.error == "the person took it back"
    again = Session(tmp_path)
    again.wait(1, 2)
    assert again.leave()[0] == 0


def test_what_is_done_is_kept_and_the_same_command_goes_on(tmp_path):
    write(tmp_path, [row(f"number {number}?", "red", "green", "blue") for number in range(3)])
    session = Session(tmp_path)
    session.wait(1, 3)
    session.type("s")
    session.wait(2, 3)
    session.type("123")
    session.wait(3, 3)
    last = session.lines[:-1]
    assert session.leave() == (0, True)
    assert "1 of 3 prompts left" in session.everything.rpartition(CLOSED)[2]
    assert sorted(str(judgment.skipped) for judgment in judgments(tmp_path).values()) == [
        "None", "skipped by the person",
    ]  # fmt: skip
    again = Session(tmp_path)
    again.wait(1, 1)
    assert again.lines[:-1] == last
    again.leave()
    other = Session(tmp_path, "--seed", "1", "--limit", "3")
    other.wait(1, 1)
    other.leave()


def test_orders_are_shuffled_by_the_seed(tmp_path):
    texts = [chr(ord("a") + number) * 3 for number in range(9)]
    write(tmp_path, [row(f"number {number}?", *texts) for number in range(9)])
    seen = []
    for seed in ("1", "1", "2"):
        session = Session(tmp_path, "--seed", seed, columns=300)
        session.wait(1, 9)
        seen.append(session.lines[:-1])
        session.leave()
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert seen[0][3].replace(" ", "").split("│") != texts


def test_only_prompt_and_candidates_are_shown_and_no_text_is_obeyed(tmp_path):
    wild = [text.encode(errors="replace").decode() for text in HOSTILE]
    rows = [row(f"{text} {number}", f"{text} one", f"{text} two") for number, text in enumerate(wild)]
    rows[0].prompt[0]["role"] = "\x1b[31muser\n"
    write(tmp_path, rows)
    session = Session(tmp_path)
    for number in range(len(rows)):
        session.wait(number + 1, len(rows))
        session.type("12")
    session.wait_for("All done")
    session.leave()
    shown = session.everything.partition(OPENED)[2].partition(CLOSED)[0]
    left = OWN.sub("", shown)
    obeyed = {c for c in left if unicodedata.category(c) in FORBIDDEN} - {"\ufe0f"}
    assert not obeyed
    assert "␛[31m" in left and "[bold red]markup[/]" in left
    for hidden in ("the-model", "the-reason", "the-sampling", rows[0].id, rows[0].id[:8], f"0/{len(rows)}"):
        assert hidden not in left


def test_a_narrow_window_stacks_and_scrolls(tmp_path):
    question = "\n".join(f"line {number}" for number in range(40))
    write(tmp_path, [row(question, "red " * 30, "green " * 30)])
    session = Session(tmp_path, columns=40, lines=12)
    session.wait(1, 1)
    assert session.lines[0] == "… 37 lines above: p"
    assert "line 39" in session.lines[3]
    assert not any("│" in line for line in session.lines)
    assert max(map(len, session.lines)) <= 40 and len(session.lines) == 12
    first = session.lines[6].split()[0]
    session.type(" ")
    session.wait_for({"red": "green", "green": "red"}[first])
    session.type("p")
    session.wait_for("line 0")
    session.wait_for("more lines")
    session.leave()


def test_an_interrupt_gives_the_terminal_back_and_keeps_what_is_done(tmp_path):
    write(tmp_path, [row(f"number {number}?", "red", "green") for number in range(2)])
    session = Session(tmp_path)
    session.wait(1, 2)
    session.type("12")
    session.wait(2, 2)
    os.killpg(session.process.pid, signal.SIGINT)
    session.wait_for(CLOSED)
    assert session.finish() == (130, True)
    assert len(judgments(tmp_path)) == 1


def test_a_person_needs_a_terminal_and_few_candidates(tmp_path):
    write(tmp_path, [row("first?", "red", "green")])
    command = [sys.executable, "-c", COMMAND, "judge", "--judge", "human", "--data", str(tmp_path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--judge human needs a terminal" in done.stderr
    with pytest.raises(UserError, match="no judgments to compare with"):
        run(config(tmp_path, judge="human", against=str(tmp_path / "nothing.jsonl")))
    write(tmp_path, [row("first?", *map(str, range(36)))])
    with pytest.raises(UserError, match="36 candidates are more than"):
        run(config(tmp_path, judge="human"))


def judged(key, scores, order=None, texts="same"):
    orders = [Order(order, {}, "")] if order else None
    return Judgment(id=key, completions_id=texts, scores=scores, ranking=[], orders=orders)


def test_a_person_compares_two_adapters_blind_and_goes_on_later(tmp_path):
    write_rows(tmp_path / "heldout.jsonl", [{"prompt": f"[MABEL] Umbrella {number}?"} for number in range(3)])

    def sampled(call):
        return f"reply!{'better' if call.body['model'] == 'tuned' else 'worse'} {call.body['messages'][-1]['content']}"

    with Server(fault=sampled) as server:
        options = ["--prompts", str(tmp_path / "heldout.jsonl"), "--engine", "endpoint", "--url", server.url,
                   "--model", "plain", "--dpo-name", "tuned", "--json"]  # fmt: skip
        for numbers, total in (((1, 2), 3), ((1,), 1)):
            session = Session(tmp_path, *options, command="evaluate", columns=140)
            for number in numbers:
                session.wait(number, total)
                assert not any(name in line for line in session.lines for name in ("plain", "tuned", "reference"))
                best = next(place for place, text in enumerate(session.candidates, 1) if text.startswith("better"))
                session.type(f"{best}\r")
            session.wait(3, 3) if total == 3 else session.wait_for("All done")
            assert session.leave()[0] == 0
            result = json.loads((tmp_path / "evaluation.json").read_text())
            assert (result["wins"], result["losses"]) == ((2, 0) if total == 3 else (3, 0))
    assert (result["judge"], result["failed"], result["scores"]) == ({"judge": "human"}, 0, None)


def test_agreement_by_hand():
    ours = {
        "a": judged("a", [10, 5.5, 1], [0, 1, 2]),
        "b": judged("b", [10, 1, 10], [0, 1]),  # the third is the first's twin: it was not shown
        "c": judged("c", [5.5, 5.5], [1, 0]),
        "d": judged("d", [10, 1], [0, 1]),
        "e": judged("e", [10, 1], [0, 1]),
        "f": Judgment(id="f", completions_id="same", skipped="skipped by the person"),
    }
    theirs = {
        "a": judged("a", [8, 3, 4]),  # 0>1 alike, 0>2 alike, 1>2 contrary
        "b": judged("b", [6, 6, 6]),  # tied by them
        "c": judged("c", [9, 2]),  # tied by us
        "d": judged("d", [9, 2], texts="other"),
        "f": judged("f", [9, 2]),
    }
    result = agree(ours, theirs)
    assert (result.prompts, result.pairs, result.alike, result.contrary) == (3, 5, 2, 1)
    # Five pairs, one tied by each judge alone: (2 - 1) / sqrt(4 * 4).
    assert result.tau == pytest.approx(0.25)
    assert result.share == pytest.approx(2 / 3)
    # By hand: (2/3 + 0.64025 ± 1.96 sqrt(0.07407 + 0.10671)) / 2.28049, with z² / 6 = 0.64025.
    assert result.interval == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert str(result) == "τ-b 0.25, 2 of 3 pairs alike, 67% (21%–94%); tied by either: 2; prompts: 3"


def test_agreement_where_there_is_nothing_to_compare():
    assert str(agree({}, {})) == "no prompt that both judged"
    tied = agree({"a": judged("a", [5.5, 5.5], [0, 1])}, {"a": judged("a", [3, 2])})
    assert (tied.tau, tied.share) == (None, None)
    assert str(tied) == "τ-b –; tied by either: 1; prompts: 1"
    assert wilson(0, 10)[0] == 0.0


def test_the_end_says_how_far_another_judge_agrees(tmp_path):
    rows = [row(f"number {number}?", "red", "green", "blue") for number in range(3)]
    write(tmp_path, rows)
    scores = {"red": 9.0, "green": 4.0, "blue": 2.0}
    others = [
        Judgment(id=r.id, completions_id=completions_id(r.completions), scores=[scores[t] for t in r.completions],
                 ranking=[0, 1, 2], judge={"model": "other"})
        for r in rows
    ]  # fmt: skip
    write_rows(tmp_path / "other.jsonl", others)
    for total, count in ((3, 1), (2, 2)):  # one prompt in the first session, the others in the next
        session = Session(tmp_path, "--against", str(tmp_path / "other.jsonl"))
        for number in range(1, count + 1):
            session.wait(number, total)
            session.type(session.keys_for("red", "blue", "green"))
        session.wait_for(" 2 of ")
        session.leave()
    said = session.everything.rpartition(CLOSED)[2]
    assert "τ-b 0.33, 6 of 9 pairs alike" in " ".join(said.split())
