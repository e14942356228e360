"""Ctrl-C and SIGTERM: noted so that a forward can end, passed on to a child process, or left to a pager.

Everything that installs a signal handler does it here. In a thread that is not the main one nothing is installed,
since Python allows handlers there alone.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def exit_on_sigterm(code: int) -> None:
    """End this process with an exit code where nothing better handles SIGTERM later."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))


@contextmanager
def forwarding_sigterm(process: "subprocess.Popen[str]") -> Iterator[None]:
    """A SIGTERM of this process is the other's as well; waiting for it goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


class Interrupted(BaseException):
    """A SIGTERM or Ctrl-C that was noted is obeyed; what it says is how far the work came."""


class Stop:
    """Notes the first SIGTERM or Ctrl-C, so that a forward can end; a second Ctrl-C stops at once.

    Of several, one in the other, `current` is the innermost; `at_once` says that the next signal raises Interrupted.
    """

    current: "Stop | None" = None

    def __init__(self) -> None:
        self.signal: int | None = None
        self.at_once = False

    def __enter__(self) -> "Stop":
        self._outer, Stop.current = Stop.current, self
        self.signal = self._outer.signal if self._outer is not None else None  # what came before is not lost
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._former = {}
        return self

    def __exit__(self, *_: object) -> None:
        Stop.current = self._outer
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if self.at_once:
            raise Interrupted


def noted() -> int | None:
    """The signal that has come since the innermost Stop was entered."""
    return Stop.current.signal if Stop.current is not None else None


@contextmanager
def interruptible() -> Iterator[None]:
    """Work that holds nothing which has to be saved: a signal ends it at once, by Interrupted, also an earlier one."""
    stop = Stop.current
    if stop is None:
        yield
        return
    if stop.signal is not None:
        raise Interrupted
    stop.at_once = True
    try:
        yield
    finally:
        stop.at_once = False


@contextmanager
def ignoring_interrupts() -> Iterator[None]:
    """Ctrl-C in the pager is the pager's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
