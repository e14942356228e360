"""Rows that can't be read: the first is an error that counts the others, or all are left out and written down."""

from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.data.files import explained, write_file
from dpo_cli.errors import UserError

FILE = "rejected-rows.jsonl"
SKIP = "--skip-bad leaves such rows out and writes them to rejected-rows.jsonl"


class Fault(ValueError):
    """What is wrong with one row: the reason, the row as far as it is known, and how to mend it."""

    def __init__(self, reason: str, row: Any = None, hint: str | None = None) -> None:
        super().__init__(reason)
        self.row = row
        self.hint = hint


class BadRow(Struct, omit_defaults=True):
    """One line of rejected-rows.jsonl: where the row stands, why it was left out, and what it says."""

    file: str
    line: int
    reason: str
    row: Any = None


class BadRows:
    """Takes the rows of a file, or of several, that can't be read.

    Args:
        skip: leave them out. Without it the first one is an error, raised at the end to say how many more there are.
        offer: that error says that they can be left out; not every command can.
    """

    def __init__(self, skip: bool = False, offer: bool = False) -> None:
        self.skip = skip
        self.offer = offer
        self.rows: list[BadRow] = []
        self._first: UserError | None = None
        self._more: Counter[str] = Counter()

    @property
    def stops(self) -> bool:
        """Whether the reading has failed, and only counts on."""
        return self._first is not None

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> rows that were left out."""
        return dict(Counter(row.reason for row in self.rows).most_common())

    def add(self, file: Path, line: int, error: Exception, row: Any) -> None:
        """Take a row that can't be read."""
        reason = str(error)
        if self.skip:
            known = row.row if isinstance(row, Fault) else row
            self.rows.append(BadRow(str(file), line, reason, _plain(known)))
        elif self._first is None:
            hint = error.hint if isinstance(error, Fault) else getattr(error, "hint", None)
            self._first = UserError(reason, where=f"{file}:{line}", hint=hint)
        else:
            self._more[reason] += 1

    def close(self) -> None:
        """All rows were read.

        Raises:
            UserError: the first that couldn't be, without `skip`.
        """
        error = self._first
        if error is None:
            return
        if more := self._more.total():
            kinds = f", of {len(self._more)} kinds" if len(self._more) > 1 else ""
            error = UserError(f"{error.message}; {more:,} more bad rows{kinds}", where=error.where, hint=error.hint)
        if self.offer:
            error.hint = f"{error.hint}; {SKIP}" if error.hint else SKIP
        raise error

    def write(self, folder: Path) -> str | None:
        """Write rejected-rows.jsonl, or take away one of before; returns its path where there is one."""
        path = folder / FILE
        if not self.rows:
            with explained(path):
                path.unlink(missing_ok=True)
            return None
        write_file(path, (_encode(row) + b"\n" for row in self.rows), private=True)
        return str(path)


def _encode(row: BadRow) -> bytes:
    try:
        return msgspec.json.encode(row, enc_hook=str)
    except (UnicodeEncodeError, msgspec.MsgspecError, RecursionError, OverflowError, ValueError):
        return msgspec.json.encode(BadRow(row.file, row.line, row.reason))


def _plain(row: Any) -> Any:
    return row.decode("utf-8", "replace").rstrip("\n") if isinstance(row, bytes) else row
