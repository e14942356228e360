"""Where output goes: consoles that obey nothing but our own styles, and a pager for what is longer than the screen."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from rich.console import Console, Group
from rich.measure import Measurement
from rich.pager import Pager
from rich.table import Table
from rich.text import Text

from dpo_cli.interrupts import ignoring_interrupts

UNWRAPPED = 1 << 16  # columns
NARROW = 80  # columns below which two texts don't stand side by side


def make_console(stream: IO[str], kind: type[Console] = Console) -> Console:
    """A console on a stream: no markup, no emoji names, no guessing what to highlight."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows \u241b instead of failing
    return kind(file=stream, markup=False, emoji=False, highlight=False)


def stdout_console() -> Console:
    """The console of results."""
    return make_console(sys.stdout) if sys.stdout.isatty() else make_console(sys.stdout, PipedConsole)


class PipedConsole(Console):
    """A console that nobody looks at: lines and tables are as long as what they say, so that other programs find it.

    Tables that share out the width among their columns keep the usual one.
    """

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print each object for itself, text and tables unwrapped."""
        for one in objects or ("",):
            if isinstance(one, Group):
                self.print(*one.renderables, **settings)
            elif isinstance(one, Table) and not one.expand:
                usual, self.width = self.width, UNWRAPPED
                try:
                    super().print(one, **{**settings, "width": Measurement.get(self, self.options, one).maximum})
                finally:
                    self.width = usual
            else:
                super().print(one, **({"soft_wrap": True} if isinstance(one, (str, Text)) else {}) | settings)


@contextmanager
def paged(console: Console) -> Iterator[None]:
    """Show what is printed within through the pager, if it is longer than the terminal is high."""
    if not console.is_terminal or not sys.stdin.isatty():
        yield
        return
    with console.pager(_Pager(console), styles=True):
        yield


class _Pager(Pager):
    """`$PAGER`, by default less, which is told to pass our styles on and to leave the text on the screen."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def show(self, content: str) -> None:
        command = shlex.split(os.environ.get("PAGER", "less"))
        if content.count("\n") < self.console.height or not command or shutil.which(command[0]) is None:
            self.console.file.write(content)
            self.console.file.flush()
            return
        environment = {"LESS": "FRX", "LESSCHARSET": "utf-8", **os.environ}
        with ignoring_interrupts(), subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
            try:
                process.communicate(content.encode(errors="backslashreplace"))
            except BrokenPipeError:
                process.wait()
