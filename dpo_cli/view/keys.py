"""Single keys from a terminal, which is restored whatever happens."""

import os
import re
import select
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager

_NAMES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left", "\x1b[5~": "page up",
    "\x1b[6~": "page down", "\x1b[H": "home", "\x1b[F": "end", "\x1b[1~": "home", "\x1b[4~": "end",
    "\x1bOA": "up", "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left", "\x1bOH": "home", "\x1bOF": "end",
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", "\x1b": "escape",
}  # fmt: skip
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO.|.", re.DOTALL)
_REST_SECONDS = 0.05  # how long the rest of an escape sequence may take to arrive


class Keys:
    """Keys of a terminal, read one at a time.

    Args:
        terminal: file descriptor, in cbreak mode.
    """

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self._waiting: list[str] = []

    def read(self, timeout: float | None = None) -> str | None:
        """The next key: a character, or a name (`up`, `enter`, `escape`); None when time is up.

        Args:
            timeout: seconds to wait; None waits for ever.

        Raises:
            EOFError: the terminal is gone.
        """
        if not self._waiting:
            if not self._ready(timeout):
                return None
            typed = self._take()
            while self._unfinished(typed) and self._ready(_REST_SECONDS):
                typed += self._take()
            self._waiting = [_NAMES.get(key, key) for key in _KEY.findall(typed.decode(errors="replace"))]
        return self._waiting.pop(0)

    def _ready(self, timeout: float | None) -> bool:
        return bool(select.select([self.terminal], [], [], timeout)[0])

    def _take(self) -> bytes:
        typed = os.read(self.terminal, 1024)
        if not typed or typed == b"\x04":
            raise EOFError
        return typed

    def _unfinished(self, typed: bytes) -> bool:
        """An escape sequence, or a character of several bytes, that is not whole yet."""
        try:
            return re.search(r"\x1b(\[[0-9;]*|O)?$", typed.decode()) is not None
        except UnicodeDecodeError as error:
            return error.end == len(typed)


@contextmanager
def keys_of(terminal: int) -> Iterator[Keys]:
    """Read keys as they are pressed, without echo; Ctrl-C still interrupts."""
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        yield Keys(terminal)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
