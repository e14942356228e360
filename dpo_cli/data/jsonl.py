"""Append-only JSONL files that survive kill -9, full disks and two commands at once.

One record is one line and one `write()`. A line that was torn by a crash is cut when the file is next opened for
writing. The last line of a key wins; `Journal.compact` drops the superseded ones. A lock file beside the journal
keeps a second writer out; on file systems without locks (GCS FUSE) there is none.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Self, TypeVar

import msgspec

from dpo_cli.data.bad_rows import Fault
from dpo_cli.data.bulk import paused_collection
from dpo_cli.data.files import PRIVATE, disk_error, encode_line, lock, sync, write_all, write_file
from dpo_cli.data.reader import decode_row
from dpo_cli.errors import UserError

T = TypeVar("T")

SYNC = "NOTHING_DPO_SYNC_SECONDS"
# What a power cut may lose; a killed process loses nothing, but on a mounted bucket, where a sync sends the whole file.
SYNC_SECONDS = float(os.environ.get(SYNC, "0.5"))
BLOCK_BYTES = 1 << 16  # decoded at once: small enough for the processor's cache


def read_rows(path: Path, kind: type[T]) -> Iterator[tuple[int, T]]:
    """Yield (line number, row) of our own records; a torn last line is passed over.

    Raises:
        UserError: `file:line` of the first line that is not such a record.
    """
    yield from _decode(path, kind, torn_end=True)


def read_rows_at(path: Path, kind: type[T]) -> Iterator[tuple[int, int, T]]:
    """As `read_rows`: (the byte at which the line begins, line number, row)."""
    decode = msgspec.json.Decoder(kind).decode
    start = 0
    for first, lines in _blocks(path):
        rows: list[T | None]
        try:
            rows = list(map(decode, lines))
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            rows = []
        for number, line in enumerate(lines, first):
            row = rows[number - first] if rows else _decode_line(path, number, line, decode, torn_end=True)
            if row is not None:
                yield start, number, row
            start += len(line)


def stream_latest(path: Path, kind: type[T]) -> Iterator[T]:
    """Rows as `read_latest` has them, one at a time: the file is read twice, and no row is kept.

    Raises:
        UserError: no such file, or `file:line` of a line that is no such record.
    """
    lines, ids = 0, set()
    for _, row in read_rows(path, _Identified):
        ids.add(hash(row.id))
        lines += 1
    if lines == len(ids):  # as every clean end of a command leaves it
        yield from (row for _, row in read_rows(path, kind))
        return
    with LatestRows(path, kind) as rows:
        yield from rows.values()


class RowReader(Generic[T]):
    """Reads rows by where their lines begin.

    Args:
        file: open for reading.
        path: its name.
        kind: what rows are read as.
    """

    def __init__(self, file: BinaryIO, path: Path, kind: type[T]) -> None:
        self._file = file
        self._path = path
        self._decode = msgspec.json.Decoder(kind).decode

    def at(self, start: int) -> T:
        """The row whose line begins at this byte.

        Raises:
            UserError: `file:line`, if it is no such record.
        """
        self._file.seek(start)
        line = self._file.readline()
        try:
            return self._decode(line)
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            self._file.seek(0)
            number = self._file.read(start).count(b"\n") + 1
            row = _decode_line(self._path, number, line, self._decode, torn_end=False)
            assert row is not None  # what can't be decoded has raised
            return row


class LatestRows(Mapping[str, T]):
    """Rows by their `id` as `read_latest` has them, each read when it is looked at; use as a context manager.

    Args:
        path: the file; none is an empty one.
        kind: what rows are read as.

    `starts` says where the last line of each id begins, in the order in which the ids first come.

    Raises:
        UserError: `file:line` of a line without an id.
    """

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        self.starts: dict[str, int] = {}
        self._kind = kind
        if path.exists():
            with paused_collection():
                self.starts = {row.id: start for start, _, row in read_rows_at(path, _Identified)}

    def __enter__(self) -> Self:
        if self.starts:
            self._file = self.path.open("rb")
            self._reader = RowReader(self._file, self.path, self._kind)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.starts:
            self._file.close()

    def __len__(self) -> int:
        return len(self.starts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.starts)

    def __contains__(self, key: object) -> bool:
        return key in self.starts

    def __getitem__(self, key: str) -> T:
        return self._reader.at(self.starts[key])


def read_latest(path: Path, kind: type[T]) -> dict[str, T]:
    """Rows by their `id`, the last line of an id winning; empty if there is no such file."""
    if not path.exists():
        return {}
    return {row.id: row for _, row in read_rows(path, kind)}  # type: ignore[attr-defined]


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Replace a file by these rows, all or nothing: readers see the old file or the new one."""
    write_file(path, encode_rows(rows), private=True)


def encode_rows(rows: Iterable[Any]) -> Iterator[bytes]:
    """The lines of these rows."""
    return (encode_line(row) + b"\n" for row in rows)


class Journal:
    """A JSONL file open for appending, by one process.

    Use as a context manager. Records must be msgspec structs or dicts with an `id`.

    Args:
        path: the file; its folder is made.
        wait: for another process that writes to it, instead of giving up.

    Raises:
        UserError: another process writes to it, or the disk is full.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        self.path = path
        self._wait = wait
        self._file = -1
        self._lock = -1
        self._synced = 0.0

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            self.close()
            raise disk_error(error, self.path) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, row: Any) -> int:
        """Append one record durably against a kill; against a power cut within half a second.

        Returns:
            Where its line begins.

        Raises:
            UserError: the disk is full; what was written of the record is taken back.
        """
        line = encode_line(row) + b"\n"
        self._open()
        start = os.lseek(self._file, 0, os.SEEK_END)
        try:
            write_all(self._file, line)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                sync(self._file, self.path)
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file, start)
            raise disk_error(error, self.path) from error
        return start

    def compact(self) -> None:
        """Drop the lines that a later line of the same id supersedes; the rest keeps its bytes and its order."""
        self._open()  # cuts a torn last line
        id_of = msgspec.json.Decoder(_Identified).decode
        last: dict[str, int] = {}  # where the last line of an id begins
        count = start = 0
        for _, lines in _blocks(self.path):
            for line in lines:
                if line.strip():
                    last[id_of(line).id] = start
                    count += 1
                start += len(line)
        if count == len(last):
            return
        with self.path.open("rb", buffering=4 * BLOCK_BYTES) as file:
            write_file(self.path, (_line_at(file, start) for start in last.values()), private=True)
        self._close_file()

    def close(self) -> None:
        """Sync and let go; safe to call twice."""
        try:
            self._close_file()
        finally:
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    def _open(self) -> None:
        """Open the file when there is something to append: what is only read, or refused, is not touched."""
        if self._file >= 0:
            return
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE)
            _repair_tail(self._file, self.path)
        except OSError as error:
            raise disk_error(error, self.path) from error

    def _close_file(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            try:
                sync(file, self.path)
            except OSError as error:
                raise disk_error(error, self.path) from error
            finally:
                os.close(file)

    def _take_lock(self) -> None:
        # Beside the journal, not on it: compacting replaces the journal's inode.
        self._lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, PRIVATE)
        if not lock(self._lock, self.path, self._wait):
            raise UserError(
                "another nothing-dpo command is writing to it", where=str(self.path), hint="wait for it, or stop it"
            )


def _line_at(file: BinaryIO, start: int) -> bytes:
    file.seek(start)
    return file.readline().strip() + b"\n"


class _Identified(msgspec.Struct):
    id: str


def _decode(path: Path, kind: type[T], torn_end: bool = False) -> Iterator[tuple[int, T]]:
    """Yield (line number, row); blank lines are passed over, and with `torn_end` a last line that is cut off."""
    decode = msgspec.json.Decoder(kind).decode
    for first, lines in _blocks(path):
        try:
            rows = list(map(decode, lines))
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            pass
        else:
            yield from enumerate(rows, first)
            continue
        for number, line in enumerate(lines, first):
            if (row := _decode_line(path, number, line, decode, torn_end)) is not None:
                yield number, row


def _decode_line(path: Path, number: int, line: bytes, decode: Callable[[bytes], T], torn_end: bool) -> T | None:
    """One row; None for a blank line, and with `torn_end` for a last line that is cut off."""
    try:
        return decode(line) if line.strip() else None
    except msgspec.ValidationError as error:
        raise UserError(_explain(error), where=f"{path}:{number}") from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        # What a crash left of a row of ours begins as one; another file's only line is not to be cut off.
        if torn_end and not line.endswith(b"\n") and line.startswith(b"{"):
            return None
        fault = decode_row(line)
        reason, hint = (str(fault), fault.hint) if isinstance(fault, Fault) else (str(error), None)
        raise UserError(reason, where=f"{path}:{number}", hint=hint) from None


def _blocks(path: Path) -> Iterator[tuple[int, list[bytes]]]:
    """Yield (number of the first, lines), some at a time."""
    try:
        file = path.open("rb", buffering=4 * BLOCK_BYTES)
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(path)) from None
    with file:
        number = 1
        while lines := file.readlines(BLOCK_BYTES):
            yield number, lines
            number += len(lines)


def _repair_tail(file: int, path: Path) -> None:
    """Cut a torn last line; end with a newline one that is whole (no prefix of a JSON object is JSON).

    Raises:
        UserError: it is not the beginning of a row of ours, nor what a power cut leaves.
    """
    size = os.lseek(file, 0, os.SEEK_END)
    start, tail = size, b""
    while start > 0 and b"\n" not in tail:
        step = min(1 << 16, start)
        start -= step
        tail = os.pread(file, step, start) + tail
    last = tail.rpartition(b"\n")[2]
    if not last:
        return
    try:
        msgspec.json.decode(last)
        os.write(file, b"\n")
    except (msgspec.DecodeError, UnicodeError):
        if last.strip(b"\0") and not last.startswith(b'{"'[: len(last)]):
            raise UserError("its last line is no row of ours", where=str(path), hint="move the file away") from None
        os.ftruncate(file, size - len(last))


def _explain(error: msgspec.ValidationError) -> str:
    """msgspec's 'Expected `str`, got `int` - at `$.completions[0]`', said as the field is named in the file."""
    text, _, place = str(error).partition(" - at `$.")
    text = text.replace("Object missing required field", "missing field")
    if not place:
        return text if text.startswith("missing") else f"not a JSON object: {text}"
    return f'"{place.rstrip("`")}": {text}'
