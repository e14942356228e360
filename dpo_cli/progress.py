"""How a stage says where it stands, without knowing that there is a terminal.

A stage calls `begin` once, `update` as often as it likes, `log` for a line that is worth keeping, `end` once.
`view.py` draws it; `Silent` throws it away (`--quiet`, tests).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Progress(Protocol):
    """The callback protocol of every stage."""

    def begin(self, stage: str, total: int | None, done: int = 0) -> None:
        """Start a stage of `total` units (prompts, pairs, steps), `done` of which a former run has finished."""

    def update(self, done: int, **counters: float) -> None:
        """Say that `done` units are finished; counters are totals so far (tokens, completions, retries, usd)."""

    def log(self, text: str) -> None:
        """Keep a line: a warning, a guard's action, an evaluation."""

    def aside(self) -> AbstractContextManager[None]:
        """Leave the screen to somebody else within; `update` goes on, `log` must wait."""

    def end(self) -> None:
        """Finish the stage; safe to call after a failure."""


class Silent:
    """Progress that shows nothing."""

    def begin(self, stage: str, total: int | None, done: int = 0) -> None:
        pass

    def update(self, done: int, **counters: float) -> None:
        pass

    def log(self, text: str) -> None:
        pass

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def end(self) -> None:
        pass
