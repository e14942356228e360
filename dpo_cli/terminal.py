"""A terminal without rich: text that is safe to show, laid out in columns, and single keys.

Escape sequences, control, bidirectional and zero-width characters of what models and users wrote are shown, never
obeyed. What is drawn on or set in the terminal is undone whatever happens. Not covered: a stop with Ctrl-Z, and
emoji of several code points, whose width differs between terminals.
"""

import os
import re
import select
import sys
import termios
import tty
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import IO

from dpo_cli.errors import UserError

_NAMES = {
    "\x1b[A": "up", "\x1b[B": "down", "\x1b[C": "right", "\x1b[D": "left", "\x1b[5~": "page up",
    "\x1b[6~": "page down", "\x1b[H": "home", "\x1b[F": "end", "\x1b[1~": "home", "\x1b[4~": "end",
    "\x1bOA": "up", "\x1bOB": "down", "\x1bOC": "right", "\x1bOD": "left", "\x1bOH": "home", "\x1bOF": "end",
    "\r": "enter", "\n": "enter", "\x7f": "backspace", "\x08": "backspace", "\x1b": "escape",
}  # fmt: skip
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO.|.", re.DOTALL)
_REST_SECONDS = 0.05  # how long the rest of an escape sequence may take to arrive
_RESIZE_SECONDS = 0.5  # how soon a new size of the window is seen
GUTTER = " │ "


def width(text: str) -> int:
    """Columns that a safe text of one line takes: wide characters two, combining ones none."""
    return len(text) if text.isascii() else sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me") or "\u1160" <= character <= "\u11ff":
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(text: str, room: int) -> list[str]:
    """The lines of a safe text, broken at spaces, and within a word that is wider than `room` columns."""
    lines, room = [], max(1, room)
    for line in text.split("\n"):
        current = ""
        for token in re.findall(r"\s+|\S+", line):
            if width(current) + width(token) <= room:
                current += token
                continue
            if current.strip():
                lines.append(current.rstrip())
                current = ""
            if token.isspace():
                continue
            while width(token) > room:
                start = _fitting(token, room)
                lines.append(start)
                token = token[len(start) :]
            current = token
        lines.append(current.rstrip())
    return lines


def cut(text: str, room: int) -> str:
    """A safe text of one line, cut to `room` columns with an ellipsis."""
    return text if width(text) <= room else _fitting(text, room - 1) + "…"


def _fitting(text: str, room: int) -> str:
    """The longest beginning that fits, at least one character."""
    taken = 0
    for end, character in enumerate(text):
        taken += _columns(character)
        if end and taken > room:
            return text[:end]
    return text


def side_by_side(texts: list[list[str]], room: int) -> list[str]:
    """Columns of lines as lines, each column `room` wide.

    A column is reached by moving the cursor, so that a terminal that counts a character's width differently shifts
    nothing.
    """
    steps = [
        f"\x1b[{column * (room + len(GUTTER)) - len(GUTTER) + 1}G\x1b[2m{GUTTER}\x1b[0m"
        for column in range(1, len(texts))
    ]
    return [
        "".join(step + line for step, line in zip(["", *steps], row, strict=True))
        for row in zip_longest(*texts, fillvalue="")
    ]


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


class Screen:
    """A whole screen to draw on, and the keys that are pressed at it."""

    def __init__(self, keys: Keys, stream: IO[str]) -> None:
        self.keys = keys
        self.stream = stream

    @property
    def size(self) -> os.terminal_size:
        """Columns and lines, now."""
        size = os.get_terminal_size(self.stream.fileno())
        return size if size.columns and size.lines else os.terminal_size((80, 24))

    def draw(self, lines: list[str]) -> None:
        """Replace what is shown by these lines, as many as there is room for."""
        height = self.size.lines
        rows = (lines + [""] * height)[:height]
        self.stream.write("\x1b[H" + "\n".join(f"\x1b[2K{row}\x1b[0m" for row in rows))
        self.stream.flush()

    def read(self) -> str | None:
        """The next key; None when the window has changed its size.

        Raises:
            EOFError: the terminal is gone, or Ctrl-D was pressed.
        """
        size = self.size
        while (key := self.keys.read(_RESIZE_SECONDS)) is None and self.size == size:
            pass
        return key


@contextmanager
def full_screen(purpose: str) -> Iterator[Screen]:
    """Take the terminal of stdin and stderr; what it showed comes back at the end. Stdout is left to results.

    Args:
        purpose: what needs it, for the error.

    Raises:
        UserError: there is no terminal.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{purpose} needs a terminal", hint="run it in one, with stdin and stderr not redirected")
    stream = sys.stderr
    with keys_of(sys.stdin.fileno()) as keys:
        try:
            stream.write("\x1b[?1049h\x1b[?25l")
            yield Screen(keys, stream)
        finally:
            stream.write("\x1b[?25h\x1b[?1049l")
            stream.flush()
