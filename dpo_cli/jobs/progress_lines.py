"""Progress over a pipe: what a stage reports elsewhere, as lines on its stdout, shown here.

Each line is a fixed prefix and one JSON object, so that it can be told from whatever else a container prints, and
survives being cut out of any log. The last one says how the work ended.
"""

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import IO, Any

import msgspec
from msgspec import Struct

from dpo_cli.progress import Progress

PREFIX = "::nothing-dpo:: "
EVERY_SECONDS = 1.0  # between two updates: a log is paid by the line


class Outcome(Struct, kw_only=True):
    """How a command ended: its exit code, what it returned, or what failed and what to do.

    `unforeseen`: no part of this package raised it on purpose, so a further attempt may end otherwise.
    """

    exit_code: int
    result: Any = None
    error: str | None = None
    hint: str | None = None
    unforeseen: bool = False


class Line(Struct, omit_defaults=True):
    """One line: exactly one field is set."""

    begin: tuple[str, int | None, int] | None = None
    update: tuple[int, Mapping[str, float | None]] | None = None
    log: str | None = None
    end: bool | None = None
    saved: bool | None = None
    outcome: Outcome | None = None


def newest_step(lines: Iterable[str]) -> int | None:
    """The step that training stands at by the lines of a log; None where it has not begun."""
    step, stage = None, ""
    for text in lines:
        line = parse(text)
        if line is not None and line.begin is not None:
            stage = line.begin[0]
        elif line is not None and line.update is not None and stage == "train":
            step = line.update[0]
    return step


class Relay:
    """Progress that writes lines.

    Args:
        stream: where to; unset: stdout as it is now.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stdout
        self._clock = clock
        self._held: Line | None = None
        self._written = -EVERY_SECONDS
        self._lock = threading.Lock()

    def begin(self, stage: str, total: int | None, done: int = 0) -> None:
        """Start a stage."""
        self._write(Line(begin=(stage, total, done)))

    def update(self, done: int, **counters: float) -> None:
        """Say it, or hold it until it is time or something else is said."""
        self._held = Line(update=(done, counters))
        if self._clock() - self._written >= EVERY_SECONDS:
            self._write(None)

    def log(self, text: str) -> None:
        """Keep a line."""
        self._write(Line(log=text))

    def aside(self) -> AbstractContextManager[None]:
        """There is no screen to leave."""
        return nullcontext()

    def end(self) -> None:
        """Finish the stage."""
        self._write(Line(end=True))

    def saved(self) -> None:
        """Say that a checkpoint is on the disk."""
        self._write(Line(saved=True))

    def outcome(self, outcome: Outcome) -> None:
        """Say how it ended."""
        self._write(Line(outcome=outcome))

    def _write(self, line: Line | None) -> None:
        with self._lock:
            held, self._held = self._held, None
            if held is not None:
                self._written = self._clock()
            for one in filter(None, (held, line)):
                # In ASCII, since logs are cut at characters that only look like line ends; NaN becomes null.
                text = json.dumps(msgspec.json.decode(msgspec.json.encode(one)))
                self._stream.write(f"{PREFIX}{text}\n")
            self._stream.flush()


def parse(text: str) -> Line | None:
    """A line of ours; None for other output, and for a line that a kill cut short."""
    start = text.find(PREFIX)
    try:
        return msgspec.json.decode(text[start + len(PREFIX) :], type=Line) if start >= 0 else None
    except msgspec.MsgspecError:
        return None


def replay(text: str, progress: Progress) -> Outcome | None:
    """Show one line of a remote log; lines that are not ours are kept as they are.

    Returns:
        The outcome, if the line says it.
    """
    line = parse(text)
    if line is None:
        if text.strip() and PREFIX not in text:
            progress.log(text.rstrip())
        return None
    if line.begin is not None:
        progress.begin(*line.begin)
    elif line.update is not None:
        done, counters = line.update
        progress.update(done, **{key: float("nan") if value is None else value for key, value in counters.items()})
    elif line.log is not None:
        progress.log(line.log)
    elif line.end:
        progress.end()
    return line.outcome
