"""Pairs, or what else stands in JSONL files, one after the other, with keys: `inspect pairs --browse`."""

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from dpo_cli.data.records import Preference, text_of
from dpo_cli.data.row_index import IndexedRow, Rows
from dpo_cli.errors import UserError
from dpo_cli.terminal import Keys, keys_of
from dpo_cli.view.pairs import pair_view
from dpo_cli.view.text import safe_line

HELP = "n next · p back · g row · / search · q quit · ? all keys"
ALL_KEYS = "n j → next · p k ← back · space b ↑ ↓ scroll · g row · G last · / search · s system · q quit"
COUNTING = "counting rows …"
SLOW_KEYS = ("g", "G", "end", "/")  # Ctrl-C stops what they do; elsewhere it leaves
RESIZE_SECONDS = 0.5  # how soon a new size of the window is seen


class Look(NamedTuple):
    """How rows of one kind are browsed: `draw` takes a row, the width, its file and whether to be brief."""

    kind: type[Any]
    draw: Callable[[Any, int, str, bool], RenderableType]
    texts: Callable[[Any], Sequence[str]]
    noun: str


PAIRS = Look(
    Preference, pair_view, lambda pair: [text_of(pair.prompt), text_of(pair.chosen), text_of(pair.rejected)], "pair"
)


def browse(console: Console, rows: Rows, first: int = 0, look: Look = PAIRS) -> None:
    """Show rows until `q`.

    Args:
        console: a terminal.
        rows: files of rows of one kind, read as far as the reader goes.
        first: number of the row to begin with, from 0.
        look: what kind that is.

    Raises:
        UserError: no terminal, or no rows.
    """
    if not console.is_terminal or not sys.stdin.isatty():
        raise UserError("--browse needs a terminal", hint="the same command without it")
    if not rows.slice(0, 1):
        raise UserError(f"no {look.noun}s to browse")
    with keys_of(sys.stdin.fileno()) as keys, console.screen():
        _Browser(console, rows, keys, first, look).run()


class _Browser:
    def __init__(self, console: Console, rows: Rows, keys: Keys, first: int, look: Look) -> None:
        self.console = console
        self.rows = rows
        self.keys = keys
        self.look = look
        self.index = 0
        self.top = 0
        self.brief = True
        self.message = ""
        self.searched = ""
        self.go(first)

    def run(self) -> None:
        while True:
            lines = self.draw()
            size = self.console.size
            key = self.keys.read(RESIZE_SECONDS)
            while key is None and self.console.size == size:
                key = self.keys.read(RESIZE_SECONDS)
            if key == "q":
                return
            if key is not None:
                self.message = ""
                try:
                    self.obey(key, lines)
                except KeyboardInterrupt:
                    if key not in SLOW_KEYS:
                        raise
                    self.message = "stopped"

    def obey(self, key: str, lines: int) -> None:
        page = self.height - 1
        match key:
            case "n" | "j" | "right" | "enter":
                self.go(self.index + 1)
            case "p" | "k" | "left" | "backspace":
                self.go(self.index - 1)
            case "G" | "end":
                self.draw(COUNTING)
                self.go(self.rows.last())
            case "home":
                self.go(0)
            case "g":
                self.ask_row()
            case "/":
                self.search(self.ask("/", self.searched))
            case "s":
                self.brief = not self.brief
            case " " | "page down":
                self.scroll(page, lines)
            case "b" | "page up":
                self.scroll(-page, lines)
            case "down":
                self.scroll(1, lines)
            case "up":
                self.scroll(-1, lines)
            case _:
                self.message = ALL_KEYS

    def go(self, index: int) -> None:
        """Show a row, as far as there is one."""
        if index < 0:
            self.message = f"this is the first {self.look.noun}"
        elif not self.rows.slice(index, 1):
            self.message = f"this is the last {self.look.noun}"
            index = self.rows.last()
        self.index, self.top = max(0, index), 0

    def scroll(self, lines: int, all_lines: int) -> None:
        self.top = max(0, min(self.top + lines, all_lines - self.height))

    def ask_row(self) -> None:
        answer = (self.ask("row ") or "").replace(",", "").strip()
        if answer.isdecimal() and int(answer):
            self.draw(COUNTING)
            self.go(int(answer) - 1)
        elif answer:
            self.message = f"'{answer}' is no row number"

    def search(self, text: str | None) -> None:
        """Go to the next row that has a text, from the row after this one on, then from the beginning."""
        if not text:
            return
        self.searched = text
        self.draw(f"searching for '{text}' …")
        here = self.rows.slice(self.index, 1)[0].start
        found = next(self.having(text, here + 1), None)
        if found is None:
            found = next(self.having(text, 0), None)
            self.message = "from the beginning" if found else f"nothing has '{text}'"
        if found is not None:
            self.index, self.top = self.rows.number(found), 0

    def having(self, text: str, start: int) -> Iterator[IndexedRow]:
        """Rows whose id begins with a text, or whose texts have it as it is written."""
        forms = {json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True)}
        pattern = re.compile(b"|".join(re.escape(form.encode(errors="surrogateescape")) for form in forms))
        for row in self.rows.matches(pattern, start):
            if row.start < start:  # the match is in the rest of the row that is shown
                continue
            found = self.rows.decode(row, self.look.kind)
            if found.id.startswith(text) or any(text in part for part in self.look.texts(found)):
                yield row

    def ask(self, question: str, before: str = "") -> str | None:
        """A line of text, or None where Escape was pressed; Enter alone repeats what was asked before."""
        typed = ""
        while True:
            self.draw(f"{question}{typed}█" + (f"  (Enter: {before})" if before and not typed else ""))
            key = self.keys.read()
            if key == "enter":
                return typed or before
            if key == "escape":
                return None
            if key == "backspace":
                typed = typed[:-1]
            elif key is not None and len(key) == 1:
                typed += key

    @property
    def height(self) -> int:
        """Lines for the row: all but the status line."""
        return max(1, self.console.height - 1)

    def draw(self, status: str = "") -> int:
        """Draw the screen; the number of lines that the whole row takes."""
        row = self.rows.slice(self.index, 1)[0]
        try:
            found = self.rows.decode(row, self.look.kind)
            shown = self.look.draw(found, self.console.width, self.rows.name(row), self.brief)
        except UserError as error:
            shown = safe_line(str(error), "red")
        lines = self.console.render_lines(shown, self.console.options.update(height=None))
        self.scroll(0, len(lines))
        total, exact = self.rows.total()
        more = len(lines) - self.top - self.height
        left = f" {self.index + 1:,} of {'' if exact else 'about '}{total:,} "
        right = status or self.message or (f"{more} more lines: space · " if more > 0 else "") + HELP
        bar = Text(left, "reverse", no_wrap=True, overflow="crop", end="")
        bar.append(" ", "not reverse").append_text(safe_line(right, "not reverse dim"))
        self.console.update_screen(Group(_Window(lines[self.top : self.top + self.height], self.height), bar))
        return len(lines)


class _Window:
    """Lines that were rendered before, filled up to a height."""

    def __init__(self, lines: list[list[Segment]], height: int) -> None:
        self.lines = lines
        self.height = height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in self.lines:
            yield from line
            yield Segment.line()
        for _ in range(self.height - len(self.lines)):
            yield Segment.line()
