"""The user's own function as judge."""

import subprocess
import sys
from pathlib import Path

import pytest
from judging import config, judgments, row, rows, run, write

from dpo_cli.config.settings import GenerateSection
from dpo_cli.errors import UserError

WORDS = "def score(prompt, completion):\n    return len(completion.split())\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judge_by(code: str, *, spec: str = "scorer.py:score", name: str = "scorer.py", keep_lines: str | None = None):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(code)
    settings = config(Path(), judge="function", function=spec)
    settings.generate = GenerateSection(keep_lines=keep_lines)
    return run(settings)


def test_scores_of_a_file_become_a_judgment_without_calls(folder):
    write(folder, [row(1, "[A] one two", "[A] one", "[A] one two three", "[A]  one  two")])
    result = judge_by(WORDS)
    assert (result.judged, result.calls, result.usd) == (1, 0, 0.0)
    (judgment,) = judgments(folder).values()
    assert judgment.scores == [3, 2, 4, 3]
    assert judgment.ranking == [2, 0, 3, 1]
    assert (judgment.orders, judgment.consistent) == ([], True)
    assert judgment.judge["function"] == "scorer.py:score"


def test_the_function_gets_the_conversation(folder):
    write(folder, [row(7, "a", "b")])
    code = "def score(prompt, completion):\n    assert prompt[0]['role'] == 'user'\n"
    judge_by(code + "    return prompt[0]['content'].count('7') + (completion == 'a')\n")
    assert next(iter(judgments(folder).values())).scores == [2, 1]


def test_a_module_is_found_from_the_working_folder_and_a_method_in_it(folder):
    write(folder, rows(1))
    code = "class Judge:\n    @staticmethod\n    def score(prompt, completion):\n        return len(completion)\n"
    Path("scoring").mkdir()
    Path("scoring/by_length.py").write_text(code)
    program = (
        "from judging import config, run; from pathlib import Path\n"
        "print(run(config(Path(), judge='function', function='scoring.by_length:Judge.score')).judged)"
    )
    # In a process of its own, whose path holds the tests and not this folder, as with an installed command.
    tests = str(Path(__file__).parent)
    code = f"import sys; sys.path[0] = {tests!r}; {program}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr


def test_what_is_unusable_ranks_below_negative_scores(folder):
    write(folder, [row(1, "no script", "[A] one", "[A] one two")])
    judge_by("def score(prompt, completion):\n    return -len(completion)\n", keep_lines=r"^\[A\]")
    (judgment,) = judgments(folder).values()
    assert judgment.scores == [-11, -7, -11]
    assert judgment.ranking == [1, 2, 0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such umbrella')", r"ValueError: no such umbrella \(.*scorer.py:2\)"),
        ("return {}['umbrella']", r"KeyError: 'umbrella' \(.*scorer.py:2\)"),
        ("return float('nan')", "returned nan, which is no finite number"),
        ("return -float('inf')", "returned -inf, which is no finite number"),
        ("return None", "returned None, which is no finite number"),
        ("return '7'", "returned '7', which is no finite number"),
    ],
)
def test_a_fault_in_the_function_names_it_and_the_prompt(folder, body, message):
    write(folder, [row(1, "a", "b")])
    with pytest.raises(UserError, match=message) as error:
        judge_by(f"def score(prompt, completion):\n    {body}\n")
    assert row(1).id in str(error.value)
    assert judgments(folder) == {}


def test_what_was_scored_before_a_fault_is_kept(folder):
    write(folder, rows(3))
    code = "def score(prompt, completion):\n    assert '2?' not in prompt[0]['content']\n    return len(completion)\n"
    with pytest.raises(UserError, match="AssertionError"):
        judge_by(code)
    assert len(judgments(folder)) == 2
    assert run(config(folder, judge="function", function="scorer.py:score"), limit=2).done_before == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (None, "names no function"),
        ("scorer.py", "names no function"),
        ("scorer.py:", "names no function"),
        ("absent.py:score", "no such file"),
        ("scorer.py:absent", "has no function 'absent'"),
        ("absent_module:score", "No module named 'absent_module'"),
        ("broken.py:score", r"SyntaxError: .*\(.*broken.py:1\)"),
        ("failing.py:score", r"ZeroDivisionError: .*\(.*failing.py:2\)"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_plain_error(folder, spec, message):
    write(folder, rows(1))
    Path("broken.py").write_text("def score(:\n")
    Path("failing.py").write_text("one = 1\none / 0\n")
    with pytest.raises(UserError, match=message):
        judge_by(WORDS, spec=spec)


def test_an_edited_function_is_another_judge(folder):
    write(folder, rows(2))
    judge_by(WORDS, name="a/scorer.py", spec="a/scorer.py:score")
    Path("a/scorer.py").write_text(WORDS + "# as before\n")
    with pytest.raises(UserError, match=r"judge\.code was"):
        run(config(folder, judge="function", function="a/scorer.py:score"))
