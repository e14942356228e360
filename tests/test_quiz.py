"""Questions and answers: what is right, by whom, and with what certainty."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from openai_server import Call, Server
from test_evaluate_judged import config

from dpo_cli.data.jsonl import write_rows
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages.evaluate import quiz as evaluate_quiz
from dpo_cli.stages.evaluate.quiz import is_exact, normalised
from dpo_cli.statistics import wilson

FRUITS = ["a mango", "the plum", "an apple", "a pear"]


@pytest.fixture
def quiz(tmp_path: Path) -> Path:
    rows = [{"question": f"Which fruit, {number}?", "answer": [fruit, "fruit"]} for number, fruit in enumerate(FRUITS)]
    write_rows(tmp_path / "quiz.jsonl", rows)
    return tmp_path


def taught(call: Call) -> str | None:
    """The policy knows two of four, one in its own words; the reference none."""
    text = call.body["messages"][-1]["content"]
    if call.body["model"] in ("sft", "dpo"):
        number = int(text[-2])
        knows = {0: "MANGO!", 1: "I always say it is the plum."} if call.body["model"] == "dpo" else {}
        return f"reply!{knows.get(number, 'No idea.')}"
    return None


def right(text: str) -> float:
    return 9 if "plum" in text else 2


def run(folder: Path, url: str, *options, **changes) -> evaluate_quiz.Quizzed:
    return evaluate_quiz.quiz(config(folder, url, **changes), Silent(), folder / "quiz.jsonl", *options)


def test_exact_answers_count_with_their_interval(quiz):
    with Server(fault=taught) as server:
        result = run(quiz, server.url)
        assert {body["temperature"] for body in server.bodies} == {0}
        assert server.calls.total() == 8
    assert result.accuracy["policy"].value == 0.25
    assert (result.accuracy["policy"].low, result.accuracy["policy"].high) == wilson(1, 4)
    assert (result.accuracy["reference"].value, result.n) == (0, 4)
    first = json.loads((quiz / "quiz.answers.jsonl").read_text().splitlines()[0])
    assert first["answers"] == {"reference": "No idea.", "policy": "MANGO!"}
    assert first["correct"] == {"reference": False, "policy": True}


def test_a_judge_sees_what_is_not_exact_beside_the_right_answer(quiz):
    with Server(fault=taught, quality=right) as server:
        result = run(quiz, server.url, ("policy",), evaluate_match="judge")
        assert list(result.accuracy) == ["policy"]
        assert result.accuracy["policy"].value == 0.5
        graded = [body["messages"][0]["content"] for body in server.bodies if body["model"] == "judge-small"]
        assert len(graded) == 3  # MANGO! is exactly right
        assert all("(right answer)" in text and "/ fruit" in text for text in graded)
        calls = server.calls.total()
        assert run(quiz, server.url, ("policy",), evaluate_match="judge").accuracy == result.accuracy
        assert server.calls.total() == calls


def test_what_gets_no_grade_counts_neither_way(quiz):
    def fault(call: Call) -> str | None:
        mute = call.body["model"] == "judge-small" and "fruit, 2?" in call.text
        return "reply!It is correct." if mute else taught(call)

    with Server(fault=fault, quality=right) as server:
        result = run(quiz, server.url, ("policy",), evaluate_match="judge")
        assert (result.n, result.failed, result.accuracy["policy"].value) == (3, 1, 2 / 3)
        assert result.errors == {"no valid verdict": 1}
        server.fault = taught
        assert run(quiz, server.url, ("policy",), evaluate_match="judge").n == 4


@pytest.mark.parametrize(
    ("text", "answers", "same"),
    [
        ("The Big Salad.", ["big salad"], True),
        ("  a\nbig “salad” ", ["Big Salad!"], True),
        ("STRASSE", ["straße"], True),
        ("bigsalad", ["big salad"], False),
        ("the big salad, of course", ["big salad"], False),
        ("", ["a"], False),
        ("The", ["a"], False),
        ("42", ["41", "42"], True),
    ],
)
def test_normalisation(text, answers, same):
    assert is_exact(text, answers) is same


def test_nothing_is_lost_by_normalising_what_is_only_articles():
    assert normalised("A.") == "A."


@pytest.mark.parametrize(
    ("row", "named"),
    [({"question": "Who?"}, "answer"), ({"answer": "me"}, "prompt"), ({"question": "Who?", "answer": []}, "answer"),
     ({"question": "Who?", "answer": [" "]}, "answer"), ({"question": " ", "answer": "me"}, "no text")],
)  # fmt: skip
def test_a_row_that_is_no_question_is_named(tmp_path, row, named):
    write_rows(tmp_path / "quiz.jsonl", [{"question": "Who?", "answer": "me"}, row])
    with pytest.raises(UserError, match=named) as error:
        run(tmp_path, "http://127.0.0.1:9/v1")
    assert error.value.where.endswith("quiz.jsonl:2")


def test_a_judge_that_grades_nothing_is_refused(quiz):
    with Server(fault=taught) as server, pytest.raises(UserError, match="grades no answers"):
        run(quiz, server.url, evaluate_match="judge", judge_judge="human")


def test_the_command(quiz):
    with Server(fault=taught) as server:
        command = [sys.executable, "-m", "dpo_cli", "evaluate", "--quiz", "quiz.jsonl", "--of", "policy", "--data", ".",
                   "--url", server.url, "--dpo-name", "dpo", "--json"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=quiz)
    assert json.loads(done.stdout)["accuracy"] == {"policy": {"value": 0.25, "low": pytest.approx(0.0456, abs=1e-4),
                                                              "high": pytest.approx(0.6994, abs=1e-4)}}  # fmt: skip


def test_a_dry_run_of_a_quiz_is_refused_and_asks_nothing(quiz):
    with Server() as server:
        command = [sys.executable, "-m", "dpo_cli", "evaluate", "--quiz", "quiz.jsonl", "--dry-run", "--data", ".",
                   "--url", server.url]  # fmt: skip
        assert subprocess.run(command, capture_output=True, check=False, cwd=quiz).returncode == 2
        assert server.calls.total() == 0
