"""The user's own Python function as judge: `--judge function --function module:callable` or `FILE.py:callable`.

    def score(prompt: list[dict[str, str]], completion: str) -> float: ...

It gets the prompt's chat messages (`role`, `content`) and one completion, and returns a number, higher for better, on
any scale up to 1e100; `pair.min_gap` is on that scale. It is called once for each distinct completion, in this process,
one after the other. Where it fails, exits or returns no such number, that prompt is an error, which the next run tries
again, and the others go on. What it prints goes to stderr, since stdout is the result's. Modules are found from the
working folder first. Functions that must see all candidates at once, and async ones, are not covered.
"""

import copy
import hashlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_cli.config.settings import Config
from dpo_cli.data.records import Judgment, Message, content_id
from dpo_cli.errors import UserError
from dpo_cli.judges._ranking import conclude
from dpo_cli.judges._task import Task
from dpo_cli.progress import Progress

Score = Callable[[list[Message], str], float]

ABSOLUTE = True
KEY = "judge.function"
LARGEST = 1e100  # of a score, so that sums and squares of gaps are finite
SHOWN_FAILURES = 5  # prompts of which a line says that the function failed
SHOWN_CHARACTERS = 60  # of what the function returned
HINT = "--function module:callable, or --function path/to/file.py:callable"


def identity(config: Config) -> dict[str, Any]:
    """The function's name and a hash of the file it stands in: an edited function is another judge."""
    file = getattr(inspect.getmodule(load(config.judge.function)), "__file__", None)
    code = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else None
    return {"judge": "function", "function": config.judge.function, "code": code}


def calls(shown: Iterable[int], config: Config) -> int:
    """None: the function is free."""
    return 0


def judge(tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress) -> None:
    """Score every shown completion.

    Raises:
        UserError: the function can't be loaded.
    """
    function = load(config.judge.function)
    failed = 0
    with _stdout_to_stderr():
        for done, task in enumerate(tasks, 1):
            try:
                judgment = conclude(task, {index: _score(function, task, index) for index in task.shown})
            except _NoScore as fault:
                judgment = Judgment(id=task.id, completions_id=task.completions_id)
                judgment.error, judgment.failures = fault.reason, task.failures + 1
                failed += 1
                if failed <= SHOWN_FAILURES:
                    progress.log(f"{config.judge.function}, prompt {task.id}, {fault}")
            deliver(judgment)
            progress.update(done, failed=failed)
    if failed > SHOWN_FAILURES:
        progress.log(f"{config.judge.function}: {failed - SHOWN_FAILURES:,} more prompts failed")


def load(spec: str | None) -> Score:
    """The function that `module:callable` or `FILE.py:callable` names.

    Raises:
        UserError: there is no such thing, or importing it failed.
    """
    place, colon, name = (spec or "").rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"'{spec or ''}' names no function", where=KEY, hint=HINT)
    try:
        with _stdout_to_stderr():
            module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"importing {place} failed: {_last_line(error)}", where=KEY, hint=HINT) from error
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        raise UserError(f"{place} has no function '{name}'", where=KEY, hint=HINT)
    found: Score = function
    return found


def _import_module(name: str) -> ModuleType:
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError("no such file", where=str(path), hint=HINT)
    name = f"{path.stem}_{content_id(str(path.resolve()))}"  # shadows no other module
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path.resolve())
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


class _NoScore(Exception):
    """A completion got no score; `reason` says why, as it may be for others too."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"completion {index}: {reason}")
        self.reason = reason


def _score(function: Score, task: Task, index: int) -> float:
    """The function's score of one completion.

    Raises:
        _NoScore: it failed, or returned no number that can be compared.
    """
    try:
        value: Any = function(_copied(task.prompt), task.completions[index])
    except (Exception, SystemExit) as error:
        raise _NoScore(index, f"the function failed: {_last_line(error)}") from error
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)
    except OverflowError:
        score = math.inf
    except Exception:  # what it returned may be of the user's own class
        score = math.nan
    if not abs(score) <= LARGEST:
        which = "is beyond ±1e100" if abs(score) > LARGEST and not _is_infinite(value) else "is no finite number"
        raise _NoScore(index, f"the function returned {_shown(value)}, which {which}")
    return score


def _copied(messages: list[Message]) -> list[Message]:
    """Messages of its own, so that what the function changes does not reach its next call."""
    if all(len(message) == 2 for message in messages):  # a role and a text
        return [message.copy() for message in messages]
    return copy.deepcopy(messages)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _shown(value: Any) -> str:
    """A value as Python shows it, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # of the user's own class, or of an integer with thousands of digits
        return f"an object of type {type(value).__name__}"
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What is printed meanwhile goes to stderr, that of C code and child processes too."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        with redirect_stdout(sys.stderr):
            yield
        return
    try:
        os.dup2(2, 1)
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _last_line(error: BaseException) -> str:
    """The traceback's last line, with the place it came from."""
    try:
        line = traceback.format_exception_only(error)[-1].strip()
    except Exception:  # an exception whose own text fails
        line = type(error).__name__
    if isinstance(error, SyntaxError):
        return f"{line} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    if not places or places[-1].filename == import_module.__code__.co_filename:
        return line
    return f"{line} ({places[-1].filename}:{places[-1].lineno})"
