"""Look into JSONL files of any size without reading them: rows by number, by id, by text.

Reads; writes nothing. Rows are indexed as far as somebody has looked, so the first screen of a million rows costs the
bytes of one screen. Several files are read as one, in their order. Blank lines and a torn last line are no rows. A file
that grows is seen as it was when it was opened.
"""

import mmap
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar

import msgspec

from dpo_cli.data.columns import Cells
from dpo_cli.data.formats.preferences import read_pair
from dpo_cli.data.records import Preference, preference_id
from dpo_cli.errors import UserError

T = TypeVar("T")

_COUNT_BLOCK = 1 << 20
INDEXED = 1 << 20  # bytes; rows of smaller files are found
COUNTED = 1 << 28  # and of these, counted; of larger ones, estimated
AMBIGUOUS_SHOWN = 5


class IndexedRow(NamedTuple):
    """A row and where it begins: `start` counts bytes over all files, one after the other."""

    start: int
    line: bytes


class Rows:
    """The rows of JSONL files, read as they are looked at.

    Args:
        files: open for reading in binary.
    """

    def __init__(self, files: Sequence[BinaryIO]) -> None:
        self._files = list(files)
        self._bases = [0, *accumulate(file.seek(0, 2) for file in self._files)]
        self._starts = array("q")
        self._scanned = 0

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Self:
        """Open files by name; use as a context manager.

        Raises:
            UserError: naming the file that can't be read.
        """
        with ExitStack() as opened:
            files = []
            for path in paths:
                try:
                    files.append(opened.enter_context(path.open("rb")))
                except OSError as error:
                    raise UserError((error.strerror or str(error)).lower(), where=str(path)) from None
            opened.pop_all()
        return cls(files)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def slice(self, first: int, count: int) -> list[IndexedRow]:
        """Up to `count` rows from number `first` (from 0) on."""
        self._index(first + count)
        return [self._read(start) for start in self._starts[first : first + count]]

    def total(self) -> tuple[int, bool]:
        """How many rows there are, and whether that is exact or estimated from the bytes of the rows so far."""
        size = self._bases[-1]
        self._index(None if size < INDEXED else 1)
        seen = len(self._starts)
        if self._scanned >= size:
            return seen, True
        if size < COUNTED and (counted := self._count_lines()) is not None:
            return counted, True
        return max(seen + 1, round(seen * size / self._scanned)), False

    def _count_lines(self) -> int | None:
        """Lines of all files, a thousand times faster than finding them; None where not every line is a row."""
        count = 0
        for file in self._files:
            file.seek(0)
            end = b"\n"
            while block := file.read(_COUNT_BLOCK):
                count += block.count(b"\n")
                if b"\n\n" in block or b"\n\r" in block or (end.endswith(b"\n") and block[:1] in b"\r\n"):
                    return None
                end = block
            if not end.endswith(b"\n"):
                return None
        return count

    def last(self) -> int:
        """Number of the last row, -1 where there is none; indexes everything."""
        self._index(None)
        return len(self._starts) - 1

    def number(self, row: IndexedRow) -> int:
        """Number of a row that `matches` found."""
        while self._scanned <= row.start:
            self._index(len(self._starts) + 1)
        return bisect_left(self._starts, row.start)

    def matches(self, pattern: re.Pattern[bytes], start: int = 0) -> Iterator[IndexedRow]:
        """Rows whose bytes match, in order, from a byte on; nothing is decoded."""
        for index, file in enumerate(self._files):
            base, size = self._bases[index], self._bases[index + 1] - self._bases[index]
            position = max(0, start - base)
            if position >= size:
                continue
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as content:
                while match := pattern.search(content, position):
                    begin = content.rfind(b"\n", 0, match.start()) + 1
                    end = content.find(b"\n", match.end())
                    position = size if end < 0 else end + 1
                    yield IndexedRow(base + begin, content[begin:position])

    def name(self, row: IndexedRow) -> str:
        """Name of the file of a row."""
        return str(self._files[self._locate(row.start)[0]].name)

    def place(self, row: IndexedRow) -> str:
        """`file:line` of a row; counts the lines before it."""
        index, offset = self._locate(row.start)
        file, lines = self._files[index], 1
        file.seek(0)
        while offset > 0 and (block := file.read(min(_COUNT_BLOCK, offset))):
            lines += block.count(b"\n")
            offset -= len(block)
        return f"{self._files[index].name}:{lines}"

    def decode(self, row: IndexedRow, kind: type[T]) -> T:
        """A row as one of our records; preferences also in the forms that other tools write.

        Raises:
            UserError: `file:line` of a row that is no such record.
        """
        try:
            return parse_pair(row.line) if kind is Preference else _decoder(kind).decode(row.line)  # type: ignore[return-value]
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise UserError(str(error), where=self.place(row)) from None

    def _index(self, count: int | None) -> None:
        """Find where rows begin, until `count` of them are known; None: all."""
        while self._scanned < self._bases[-1] and (count is None or len(self._starts) < count):
            index, offset = self._locate(self._scanned)
            file, end = self._files[index], self._bases[index + 1]
            file.seek(offset)
            while self._scanned < end and (count is None or len(self._starts) < count):
                line = file.readline()
                if not line.isspace() and (line.endswith(b"\n") or _is_json(line)):
                    self._starts.append(self._scanned)
                self._scanned += len(line) or end - self._scanned

    def _locate(self, start: int) -> tuple[int, int]:
        """File and byte in the file of a byte over all files."""
        index = bisect_right(self._bases, start) - 1
        return index, start - self._bases[index]

    def _read(self, start: int) -> IndexedRow:
        index, offset = self._locate(start)
        self._files[index].seek(offset)
        return IndexedRow(start, self._files[index].readline())


def find(rows: Rows, prefix: str, kind: type[T]) -> tuple[IndexedRow, T]:
    """The one row whose id begins with `prefix`.

    The bytes are searched for the id before anything is decoded. Preferences of other tools that carry no id are
    found by the id that their content has.

    Raises:
        UserError: no row, or rows of several ids begin so.
    """
    pattern = re.compile(rb'"id": ?"' + re.escape(prefix.encode("utf-8", "surrogateescape")))
    found: dict[str, IndexedRow] = {}
    for row in rows.matches(pattern):
        identity = _identity(row.line)
        if identity.startswith(prefix):
            found[identity] = row  # the last line of an id wins
            if len(found) > AMBIGUOUS_SHOWN:
                break
    if not found and kind is Preference:
        identified = ((rows.decode(row, Preference).id, row) for row in _without_id(rows))
        found = {identity: row for identity, row in identified if identity.startswith(prefix)}
    if not found:
        raise UserError(f"no row has an id that begins with '{prefix}'", hint="the list shows the ids")
    if len(found) > 1 and prefix not in found:
        few = ", ".join(list(found)[:AMBIGUOUS_SHOWN])
        raise UserError(f"several ids begin with '{prefix}': {few}{' …' * (len(found) > AMBIGUOUS_SHOWN)}")
    row = found[prefix] if prefix in found else next(iter(found.values()))
    return row, rows.decode(row, kind)


def read_pairs(path: Path) -> Iterator[Preference]:
    """Every pair of a file, as a stream.

    Raises:
        UserError: `file:line` of the first line that is no pair.
    """
    with Rows.open([path]) as rows:
        number = 0
        while some := rows.slice(number, 1024):
            for row in some:
                yield rows.decode(row, Preference)
            number += len(some)


def parse_pair(line: bytes) -> Preference:
    """A pair from one line, in our own form (fast) or another tool's.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        pair: Preference = _decoder(_Pair).decode(line)
    except msgspec.ValidationError:
        pair = read_pair(Cells(msgspec.json.decode(line, type=dict[str, Any])))[1]
    if not pair.id:
        pair.id = preference_id(pair.prompt, pair.chosen, pair.rejected)
    return pair


class _Pair(Preference, kw_only=True):
    id: str = ""


class _Identified(msgspec.Struct):
    id: str = ""


_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    if kind not in _decoders:
        _decoders[kind] = msgspec.json.Decoder(kind)
    return _decoders[kind]


def _identity(line: bytes) -> str:
    try:
        return str(_decoder(_Identified).decode(line).id)
    except msgspec.MsgspecError:
        return ""


def _is_json(line: bytes) -> bool:
    try:
        msgspec.json.decode(line)
    except msgspec.DecodeError:
        return False
    return True


def _without_id(rows: Rows) -> Iterator[IndexedRow]:
    """Rows without an id; none where the first row has one, since a file is of one kind."""
    first = rows.slice(0, 1)
    if first and not _identity(first[0].line):
        for number in range(rows.last() + 1):
            yield from rows.slice(number, 1)
