"""Rows put aside, in their order: in memory while they are few, else in a temporary file that nobody else sees.

What is kept of each is where it begins. Rows are read back as they would be from the file that they are written to.
"""

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from dpo_cli.data.files import disk_error, encode_line

T = TypeVar("T")

IN_MEMORY = 1 << 26  # bytes


class Spool(Generic[T]):
    """Rows of one kind; all are put aside before the first is read.

    Args:
        kind: what they are read as.

    Raises:
        UserError: the disk is full.
    """

    def __init__(self, kind: type[T]) -> None:
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY)  # noqa: SIM115  it goes when nobody holds it any more
        self._decode = msgspec.json.Decoder(kind).decode
        self._starts = array("Q")
        self._size = 0

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, row: T) -> None:
        """Put a row aside."""
        line = encode_line(row) + b"\n"
        try:
            self._file.write(line)
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from error
        self._starts.append(self._size)
        self._size += len(line)

    def extend(self, rows: Iterable[T]) -> None:
        """Put rows aside."""
        for row in rows:
            self.append(row)

    def __getitem__(self, index: int) -> T:
        self._file.seek(self._starts[index])
        return self._decode(self._file.readline())

    def __iter__(self) -> Iterator[T]:
        return map(self._decode, self.lines())

    def lines(self) -> Iterator[bytes]:
        """The rows as they are written."""
        place = 0
        while place < self._size:  # whoever looks at another row meanwhile moves the file
            self._file.seek(place)
            block = self._file.readlines(1 << 16)
            place += sum(map(len, block))
            yield from block
