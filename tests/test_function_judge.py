"""The user's own function as judge."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from judging import Log, config, judgments, row, rows, run, write

from dpo_cli.config.settings import GenerateSection
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress, Silent
from dpo_cli.stages import judge

WORDS = "def score(prompt, completion):\n    return len(completion.split())\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def judge_by(
    code: str,
    *,
    spec: str = "scorer.py:score",
    name: str = "scorer.py",
    keep_lines: str | None = None,
    log: Progress | None = None,
):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(code)
    settings = config(Path(), judge="function", function=spec)
    settings.generate = GenerateSection(keep_lines=keep_lines)
    return judge.run(settings, log or Silent())


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
        "from judging import Log, config, run; from pathlib import Path\n"
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


OWN = "type('Own', (), {'__repr__': lambda self: 1 / 0, '__float__': lambda self: 1 / 0})()"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no such umbrella')", r"ValueError: no such umbrella \(.*scorer.py:3\)"),
        ("return {}['umbrella']", r"KeyError: 'umbrella' \(.*scorer.py:3\)"),
        ("import sys; sys.exit(3)", r"the function failed: SystemExit: 3 \(.*scorer.py:3\)"),
        ("return float('nan')", "returned nan, which is no finite number"),
        ("return -float('inf')", "returned -inf, which is no finite number"),
        ("return None", "returned None, which is no finite number"),
        ("return '7'", "returned '7', which is no finite number"),
        ("return 1e308", r"returned 1e\+308, which is beyond ±1e100"),
        ("return -1e308", r"returned -1e\+308, which is beyond ±1e100"),
        ("return 10**400", "returned 10+…, which is beyond ±1e100"),
        ("return 10**5000", "returned an object of type int, which is beyond ±1e100"),
        (f"return {OWN}", "returned an object of type Own, which is no finite number"),
        ("raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})", "the function failed: .*Odd"),
    ],
)
def test_a_fault_in_the_function_names_it_and_the_prompt_and_the_rest_goes_on(folder, body, message):
    write(folder, rows(3))
    code = f"def score(prompt, completion):\n    if 'number 1' not in prompt[0]['content']: return 1.0\n    {body}\n"
    log = Log()
    result = judge_by(code, log=log)
    assert result.judged == 2
    (reason,) = result.errors
    assert re.search(message, reason)
    assert log.lines == [f"scorer.py:score, prompt {rows(2)[1].id}, completion 0: {reason}"]
    assert judgments(folder)[rows(2)[1].id].scores is None
    # The function is mended, and judges what it could not; another function would be another judge.
    again = judge_by(code)
    assert (again.done_before, again.owed) == (2, 1)


def test_many_faults_are_some_lines_and_a_count(folder):
    write(folder, rows(8))
    log = Log()
    assert judge_by("def score(prompt, completion):\n    return None\n", log=log).judged == 0
    assert len(log.lines) == 6
    assert log.lines[-1] == "scorer.py:score: 3 more prompts failed"


def test_what_the_function_prints_is_not_in_the_result(folder):
    write(folder, rows(6))
    Path("scorer.py").write_text(
        "import os, subprocess\nprint('imported')\n"
        "def score(prompt, completion):\n    print('printed')\n    os.write(1, b'written')\n"
        "    subprocess.run(['echo', 'spawned'])\n    return len(completion)\n"
    )
    arguments = ["judge", "--judge", "function", "--function", "scorer.py:score", "--data", ".", "--json"]
    command = [sys.executable, "-m", "dpo_cli", *arguments, "--set", "pair.val_share=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["judged"]["judged"] == 6
    for word in ("imported", "printed", "written", "spawned"):
        assert word in done.stderr


def test_the_function_can_spoil_no_prompt(folder):
    write(folder, [row(1, "a", "bc")])
    judge_by(
        "def score(prompt, completion):\n    prompt[0]['content'] += '!'\n    return prompt[0]['content'].count('!')\n"
    )
    assert next(iter(judgments(folder).values())).scores == [1, 1]


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
        ("leaving.py:score", r"SystemExit: 4 .*\(.*leaving.py:2\)"),
        ("failing.py:score", r"ZeroDivisionError: .*\(.*failing.py:2\)"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_a_plain_error(folder, spec, message):
    write(folder, rows(1))
    Path("broken.py").write_text("def score(:\n")
    Path("failing.py").write_text("one = 1\none / 0\n")
    Path("leaving.py").write_text("import sys\nsys.exit(4)\n")
    with pytest.raises(UserError, match=message):
        judge_by(WORDS, spec=spec)


def test_an_edited_function_is_another_judge(folder):
    write(folder, rows(2))
    judge_by(WORDS, name="a/scorer.py", spec="a/scorer.py:score")
    Path("a/scorer.py").write_text(WORDS + "# as before\n")
    with pytest.raises(UserError, match=r"judge\.code was"):
        run(config(folder, judge="function", function="a/scorer.py:score"))
