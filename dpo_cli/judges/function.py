"""The user's own Python function as judge: `--judge function --function module:callable` or `FILE.py:callable`.

    def score(prompt: list[dict[str, str]], completion: str) -> float: ...

It gets the prompt's chat messages (`role`, `content`) and one completion, and returns a number, higher for better, on
any scale; `pair.min_gap` is on that scale. It is called once for each distinct completion, in this process, one after
the other. Modules are found from the working folder first. Functions that must see all candidates at once, and
async ones, are not covered.
"""

import hashlib
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo_cli.config.settings import Config
from dpo_cli.data.records import Judgment, Message, content_id
from dpo_cli.errors import Exit, UserError
from dpo_cli.judges._ranking import conclude
from dpo_cli.judges._task import Task
from dpo_cli.progress import Progress

Score = Callable[[list[Message], str], float]

ABSOLUTE = True
KEY = "judge.function"
HINT = "--function module:callable, or --function path/to/file.py:callable"


def identity(config: Config) -> dict[str, Any]:
    """The function's name and a hash of the file it stands in: an edited function is another judge."""
    file = getattr(inspect.getmodule(load(config.judge.function)), "__file__", None)
    code = hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else None
    return {"judge": "function", "function": config.judge.function, "code": code}


def calls(tasks: Sequence[Task], config: Config) -> int:
    """None: the function is free."""
    return 0


def judge(tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress) -> None:
    """Score every shown completion.

    Raises:
        UserError: the function can't be loaded, failed, or returned no finite number.
    """
    function = load(config.judge.function)
    for done, task in enumerate(tasks, 1):
        scores = {index: _score(function, str(config.judge.function), task, index) for index in task.shown}
        deliver(conclude(task, scores))
        progress.update(done)


def load(spec: str | None) -> Score:
    """The function that `module:callable` or `FILE.py:callable` names.

    Raises:
        UserError: there is no such thing, or importing it failed.
    """
    place, colon, name = (spec or "").rpartition(":")
    if not colon or not place or not name:
        raise UserError(f"'{spec or ''}' names no function", where=KEY, hint=HINT)
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place)
    except UserError:
        raise
    except Exception as error:
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


def _score(function: Score, name: str, task: Task, index: int) -> float:
    where = f"{name}, prompt {task.id}, completion {index}"
    try:
        value: Any = function(task.prompt, task.completions[index])
    except Exception as error:
        message = f"the function failed: {_last_line(error)}"
        raise UserError(message, where=where, hint="mend it and run again: what is scored is kept") from error
    try:
        score = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"the function returned {value!r}, which is no finite number", where=where, code=Exit.USAGE)
    return score


def _last_line(error: Exception) -> str:
    """The traceback's last line, with the place it came from."""
    line = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError):
        return f"{line} ({error.filename}:{error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    places = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen")]
    if not places or places[-1].filename == import_module.__code__.co_filename:
        return line
    return f"{line} ({places[-1].filename}:{places[-1].lineno})"
