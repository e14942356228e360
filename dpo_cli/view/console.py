"""Where output goes: consoles that obey nothing but our own styles, and a pager for what is longer than the screen."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from rich.console import Console
from rich.pager import Pager

from dpo_cli.interrupts import ignoring_interrupts

NARROW = 80  # columns below which two texts don't stand side by side


def make_console(stream: IO[str]) -> Console:
    """A console on a stream: no markup, no emoji names, no guessing what to highlight."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode shows \u241b instead of failing
    return Console(file=stream, markup=False, emoji=False, highlight=False)


def stdout_console() -> Console:
    """The console of results."""
    return make_console(sys.stdout)


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
