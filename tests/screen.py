"""A terminal for tests, and texts that would act on one."""

import codecs
import os
import pty
import select
import subprocess
import sys
import termios
import textwrap
import time

HOSTILE = [
    "\x1b[31mred\x1b[0m \x1b[2J\x1b[H \x1b]0;title\x07 \x1b]8;;http://evil\x1b\\link \x1bP+q\x1b\\ \x1b[?1049h",
    "\x9b31m \x9d0;title\x9c \x90",
    "bell\x07 back\x08\x08 feed\x0c vertical\x0b shift\x0e\x0f null\x00 delete\x7f return\rover tab\tbed",
    "\u202eright to left\u202c \u2066isolate\u2069 \u061c\u200f\u200e",
    "zero\u200bwidth\u200c\u200d\u2060\ufeff soft\u00adhyphen \u2028line\u2029paragraph \u00a0no break",
    "[bold red]markup[/] [link=http://evil]x[/link] [/] \\[ :smile: [@click=app.quit]y[/]",
    "tags \U000e0041\U000e0042 selector a\ufe0f\ufe00 filler \u3164\u115f surrogate \ud800",
    "wide 漢字 emoji ❤️ 👩 שלום",
]
FORBIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


class Terminal:
    """A program in a terminal of its own: what it draws, what is typed."""

    def __init__(self, code, *arguments, columns=100, lines=24):
        self.main, self.side = pty.openpty()
        termios.tcsetwinsize(self.side, (lines, columns))
        self.before = termios.tcgetattr(self.side)
        environment = {**os.environ, "TERM": "xterm-256color", "PAGER": "cat"}
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *arguments],
            stdin=self.side, stdout=self.side, stderr=self.side, start_new_session=True, env=environment,
        )  # fmt: skip
        self.drawn = self.everything = ""

    def wait_for(self, expected):
        """Read until a text is drawn after what was awaited before."""
        end = time.monotonic() + 60
        while expected not in self.drawn:
            assert time.monotonic() < end, f"no {expected!r} in {self.drawn!r}"
            if select.select([self.main], [], [], 0.1)[0]:
                self.read()
        self.drawn = self.drawn.partition(expected)[2]

    def read(self):
        new = self._decode(os.read(self.main, 65536))
        self.drawn += new
        self.everything += new

    def type(self, keys):
        os.write(self.main, keys.encode())

    def finish(self):
        """Exit code, and whether the terminal's settings are as before."""
        end = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < end:
            if select.select([self.main], [], [], 0.05)[0]:
                self.read()
        code = self.process.wait(1)
        while select.select([self.main], [], [], 0)[0]:
            self.read()
        after = termios.tcgetattr(self.side)
        os.close(self.main)
        os.close(self.side)
        return code, after == self.before
