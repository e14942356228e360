"""Bytes of a file unpacked, what kind they are, and their lines as UTF-8 whatever the encoding was."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from dpo_cli.errors import UserError, require

Reader: TypeAlias = "io.BufferedReader[Any]"

PEEKED = 1 << 16
RECODE = "iconv -f WINDOWS-1252 -t UTF-8 FILE > FILE.utf8, or whatever it is written in"

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be",  # before UTF-16, which begins alike
    codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}  # fmt: skip
_ARCHIVES = {b"PK\x03\x04": "a zip archive (or a spreadsheet)", b"7z\xbc\xaf": "a 7z archive", b"SQLite": "a database"}


@contextmanager
def opened(path: Path) -> Iterator[Reader]:
    """A file open for reading, unpacked on the way, that can be peeked into.

    Raises:
        UserError: it can't be read, or is damaged; also while it is read.
    """
    try:
        with path.open("rb", buffering=PEEKED) as file:
            yield _unpacked(path, cast(Reader, file))
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(
            f"the compressed file is damaged or breaks off: {error}", where=str(path), hint=_AGAIN
        ) from None
    except OSError as error:
        raise UserError((error.strerror or str(error)).lower(), where=str(path)) from None


_AGAIN = "fetch or write it again"


def _unpacked(path: Path, file: Reader) -> Reader:
    head = file.peek(PEEKED)
    if head.startswith(b"\x1f\x8b"):
        packed: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    elif head.startswith(b"BZh"):
        packed = cast(BinaryIO, bz2.BZ2File(file))
    elif head.startswith(b"\xfd7zXZ\x00"):
        packed = cast(BinaryIO, lzma.LZMAFile(file))  # noqa: SIM115 (closed with the file)
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        require("train", "reading zstd")
        import pyarrow

        packed = cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
    else:
        return _checked(path, file)
    return _checked(path, io.BufferedReader(_Raw(packed), PEEKED))


def _checked(path: Path, reader: Reader) -> Reader:
    head = reader.peek(PEEKED)
    archive = next((name for mark, name in _ARCHIVES.items() if head.startswith(mark)), None)
    if head[257:262] == b"ustar":
        archive = "a tar archive"
    if archive:
        raise UserError(f"this is {archive}", where=str(path), hint="unpack it, and name a file or the folder")
    return reader


class _Raw(io.RawIOBase):
    """A packed stream as one that `BufferedReader` takes."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray) -> int:  # type: ignore[override]
        content = self._packed.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def kind(file: Reader) -> str:
    """`parquet`, `arrow` or `text`; "" where there is nothing."""
    head = file.peek(8)[:8]
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith(b"ARROW1") or head[:4] == b"\xff\xff\xff\xff":
        return "arrow"
    return "text" if head else ""


def text_lines(path: Path, file: Reader) -> Iterator[bytes]:
    """The lines of a text as UTF-8, without byte order marks, each with its line end.

    Bytes that are no UTF-8 are passed on where no mark says what they are.

    Raises:
        UserError: `file:line` of what is not in the encoding that the byte order mark names.
    """
    head: bytes = file.peek(4)
    mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
    file.read(len(mark))
    if not mark or mark == codecs.BOM_UTF8:
        # Files that were put together have a mark in their middle.
        for line in file:
            yield line.removeprefix(codecs.BOM_UTF8)
        return
    encoding = _MARKS[mark]
    number = 0
    text = io.TextIOWrapper(file, encoding=encoding, newline="\n")
    try:
        for decoded in text:
            number += 1
            yield decoded.replace("\ufeff", "").encode("utf-8")
    except UnicodeError as error:  # also a lone surrogate, which UTF-8 can't hold
        reason = getattr(error, "reason", str(error))
        where = f"{path}:{number + 1 if isinstance(error, UnicodeDecodeError) else number}"
        raise UserError(f"not {encoding.upper()} text: {reason}", where=where, hint=_AGAIN) from None
    finally:
        text.detach()
