"""Rows of whatever file people have, as dicts with their line numbers: the one opener of prompts, pairs and rollouts.

Reads JSON lines, a JSON array, an object around one (`{"data": [...]}`), objects one after the other, CSV and TSV,
parquet and Arrow; any of them packed by gzip, bzip2, xz or zstd; a folder of such files, and one of `save_to_disk`.
What a file is, its content says, not its name. Text is UTF-8 or, with a byte order mark, UTF-16 or UTF-32. Writes
nothing. A row that can't be read comes as a `Fault`, so that the reader of a file decides what becomes of the others; a
file that breaks off is an error. Not covered: archives, spreadsheets.
"""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import msgspec

from dpo_cli.data import arrow, bytes_in, tables
from dpo_cli.data.bad_rows import BadRows, Fault
from dpo_cli.data.repeated_keys import RepeatedKeys
from dpo_cli.errors import UserError

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
Found: TypeAlias = tuple[int, Row | Fault]

BLOCK_BYTES = 1 << 16  # decoded at once: small enough for the processor's cache
# What an object around the rows calls them.
WRAPPERS = ("data", "rows", "train", "examples", "instances", "items", "samples", "records")
DATA_SUFFIXES = {".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow"}
PACKED_SUFFIXES = {".gz", ".zst", ".zstd", ".bz2", ".xz"}

_decode = msgspec.json.Decoder(Row).decode


def parse_rows(
    path: Path,
    parse: Callable[[Row], T],
    bad: BadRows | None = None,
    headerless: tuple[str, ...] = (),
    texts: str | None = None,
) -> Iterator[tuple[int, T]]:
    """Yield (line number, parsed row) of a file or folder that others may have written.

    Args:
        path: the file, or a folder of files.
        parse: makes of a row what is wanted; raises ValueError where it can't.
        bad: takes the rows that can't be read; unset: the first of them is an error that counts the others.
        headerless: columns of a table without a header.
        texts: the column that an element of an array is which is a text and no object; unset: it can't be read.

    Raises:
        UserError: `file:line` of the first row that can't be read, or what is wrong with the file.
    """
    bad = BadRows() if bad is None else bad
    for file in files_of(path):
        for number, row in read_file(file, headerless):
            try:
                if texts is not None and isinstance(row, Fault) and isinstance(row.row, str):
                    row = _checked({texts: row.row})
                if isinstance(row, Fault):
                    raise row
                parsed = parse(row)
            except ValueError as error:
                bad.add(file, number, error, row)
                continue
            if not bad.stops:
                yield number, parsed
    bad.close()


def files_of(path: Path) -> list[Path]:
    """A file, or the files of a folder in their order.

    Raises:
        UserError: there is no such file, the folder holds none, or it holds several splits.
    """
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return arrow.saved_files(path)
    files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
    if not files:
        raise UserError(
            "the folder holds no data files", where=str(path), hint="JSONL, JSON, CSV, TSV, parquet or Arrow"
        )
    splits = sorted({file.name.partition("-00")[0] for file in files if "-of-0" in file.name})
    if len(splits) > 1:
        raise UserError(
            f"the folder holds the splits {', '.join(splits)}", where=str(path), hint="name the files of one of them"
        )
    return files


def has_files(folder: Path) -> bool:
    """Whether a folder holds files that are read here."""
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return saved or any(file.is_file() and _is_data(file) for file in folder.iterdir())


def _is_data(file: Path) -> bool:
    suffixes = file.suffixes[-2:]
    packed = bool(suffixes) and suffixes[-1] in PACKED_SUFFIXES
    kind = suffixes[-2] if packed and len(suffixes) > 1 else file.suffix
    return not file.name.startswith((".", "_")) and kind.lower() in DATA_SUFFIXES and file.name not in (
        "dataset_infos.json", "dataset_info.json", "state.json", "config.json"
    )  # fmt: skip


def read_file(path: Path, headerless: tuple[str, ...] = ()) -> Iterator[Found]:
    """Yield (line, row or what is wrong with it) of one file; of parquet and Arrow the row's number.

    Raises:
        UserError: there is no such file, it is of no known kind, or it breaks off.
    """
    with bytes_in.opened(path) as file:
        kind = bytes_in.kind(file)
        if kind in ("parquet", "arrow"):
            yield from arrow.rows(path, file, kind)
            return
        text = bytes_in.text_lines(path, file)
        first, lines = _first_line(text)
        start = first.lstrip()[:1]
        if start in (b"{", b"["):
            yield from _json_rows(path, first, lines)
        elif not start:
            return
        else:
            yield from tables.rows(path, lines, headerless)


def _first_line(lines: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first line that is not blank, and all lines with it."""
    passed: list[bytes] = []
    for line in lines:
        passed.append(line)
        if line.strip():
            return line, itertools.chain(passed, lines)
    return b"", iter(passed)


def _json_rows(path: Path, first: bytes, lines: Iterator[bytes]) -> Iterator[Found]:
    if first.lstrip().startswith(b"{"):
        whole = decode_row(first)
        if not isinstance(whole, Fault):
            rest, lines = _looks_ahead(lines)
            if rest or not _is_around_rows(whole):
                yield from _json_lines(lines)
                return
        elif first.rstrip()[-1:] not in (b"{", b"[", b",", b":"):
            yield from _json_lines(lines)
            return
    yield from _document(path, b"".join(lines))


def _looks_ahead(lines: Iterator[bytes]) -> tuple[bool, Iterator[bytes]]:
    """Whether a second line follows the first one, and all lines."""
    passed: list[bytes] = []
    seen = 0
    for line in lines:
        passed.append(line)
        seen += bool(line.strip())
        if seen == 2:
            break
    return seen == 2, itertools.chain(passed, lines)


def _is_around_rows(value: Row) -> bool:
    """Whether an object holds the rows of a file, not the columns of a row; or columns of all rows."""
    held = [name for name, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    if any(name in WRAPPERS for name in held) and not value.keys() & {"prompt", "messages", "chosen", "instruction"}:
        return True
    return len(value) > 1 and all(isinstance(inner, dict) and "0" in inner for inner in value.values())


def _json_lines(lines: Iterator[bytes]) -> Iterator[Found]:
    number = 1
    keys = RepeatedKeys()
    while block := list(itertools.islice(lines, 64)):
        try:
            rows = list(map(_decode, block))
        except (msgspec.MsgspecError, UnicodeError, RecursionError):
            for offset, line in enumerate(block):
                if line.strip():
                    row = decode_row(line)
                    yield number + offset, keys.checked(line, row) if keys.looking else row
        else:
            yield from enumerate(map(keys.checked, block, rows) if keys.looking else rows, number)
        number += len(block)


def _document(path: Path, content: bytes) -> Iterator[Found]:
    """Rows of one JSON text: an array, an object around one, or objects one after the other."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(_not_utf8(error), where=f"{path}:{line}", hint=bytes_in.RECODE) from None
    place = len(text) - len(text.lstrip())
    if text[place] == "[":
        yield from _elements(path, text, place + 1)
        return
    values = list(_values(path, text, place))
    if len(values) > 1 or not _is_around_rows(values[0][2]):
        yield from ((number, row) for number, row, _ in values)
        return
    whole = values[0][2]
    name = next((name for name in WRAPPERS if isinstance(whole.get(name), list)), None)
    if name is None:
        raise UserError(
            "an object of columns, not of rows",
            where=str(path),
            hint='pandas: df.to_json(FILE, orient="records", lines=True)',
        )
    start = text.index("[", text.index(f'"{name}"'))
    yield from _elements(path, text, start + 1)


_scan = json.JSONDecoder().raw_decode


def _value(path: Path, text: str, place: int) -> tuple[Any, int]:
    try:
        return _scan(text, place)
    except RecursionError:
        reason = "nested too deeply"
    except json.JSONDecodeError as error:
        reason, place = f"not JSON: {error.msg}", error.pos
    except ValueError:
        reason = "a number with more digits than can be read"
    raise UserError(reason, where=f"{path}:{text.count(chr(10), 0, place) + 1}", hint=_MEND)


_MEND = "correct the file there, or write it again as JSON lines: jq -c '.[]' FILE > FILE.jsonl"


def _values(path: Path, text: str, place: int) -> Iterator[tuple[int, Row | Fault, Any]]:
    """Yield (line, row, value) of values one after the other."""
    number, counted = 1, 0
    keys = RepeatedKeys()
    while place < len(text):
        number, counted = number + text.count("\n", counted, place), place
        value, place = _value(path, text, place)
        row = _checked(value)
        yield number, keys.checked(text[counted:place], row) if keys.looking else row, value
        place = _past_blanks(text, place)


def _elements(path: Path, text: str, place: int) -> Iterator[Found]:
    """Yield (line, row) of an array whose first element begins at `place` or after it."""
    number, counted = 1, 0
    keys = RepeatedKeys()
    place = _past_blanks(text, place)
    while text[place : place + 1] != "]":
        number, counted = number + text.count("\n", counted, place), place
        value, place = _value(path, text, place)
        row = _checked(value)
        yield number, keys.checked(text[counted:place], row) if keys.looking else row
        place = _past_blanks(text, place)
        if text[place : place + 1] == ",":
            place = _past_blanks(text, place + 1)
        elif text[place : place + 1] != "]":
            line = text.count("\n", 0, place) + 1
            reason = "the array breaks off" if place >= len(text) else "no comma after an element of the array"
            raise UserError(reason, where=f"{path}:{line}", hint=_MEND)


def _past_blanks(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n\ufeff":
        place += 1
    return place


def decode_row(line: bytes) -> Row | Fault:
    """A line of JSON as a row, or what is wrong with it."""
    try:
        return _decode(line)
    except msgspec.ValidationError as error:
        if "out of range" in str(error):
            return Fault("a number with more digits than can be read", line)
    except UnicodeDecodeError as error:
        return Fault(_not_utf8(error), line, bytes_in.RECODE)
    except (msgspec.DecodeError, RecursionError):
        pass
    if b"\x00" in line:
        return Fault("NUL bytes, which no JSON text has", line, "tr -d '\\000' < FILE > CLEAN")
    try:
        return _checked(json.loads(line))
    except RecursionError:
        return Fault("nested too deeply", line)
    except UnicodeDecodeError as error:
        return Fault(_not_utf8(error), line, bytes_in.RECODE)
    except json.JSONDecodeError as error:
        text = line.decode("utf-8", "replace").strip()
        hint = "Python's print of a dict is not JSON: write json.dumps(row)" if text.startswith("{'") else None
        return Fault(f"not a JSON object: {error.msg.lower()} (character {error.pos + 1})", line, hint)
    except ValueError:
        return Fault("a number with more digits than can be read", line)


def _checked(value: Any) -> Row | Fault:
    """A value if it is a row that can be written again. NaN stays: what it means depends on the column."""
    if not isinstance(value, dict):
        return Fault(f"not a JSON object but {_A.get(type(value), 'a value')}", value)
    if value.keys() == {"row", "row_idx", "truncated_cells"}:  # as the Hub's viewer gives rows
        value = value["row"]
    try:
        msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        return Fault(f"half of a character: the lone surrogate \\u{ord(half):04x}", None, "leave it out")
    except (msgspec.MsgspecError, RecursionError, OverflowError, TypeError):
        return Fault("nested too deeply, or a number with more digits than can be read", None)
    return value  # type: ignore[no-any-return]


_A = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "true or false", type(None): "null"}


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text: byte 0x{error.object[error.start]:02x} (byte {error.start + 1} there)"


def read_text(path: Path) -> str:
    """A whole text file in any of the encodings.

    Raises:
        UserError: it can't be read.
    """
    with bytes_in.opened(path) as file:
        content = b"".join(bytes_in.text_lines(path, file))
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(error), where=str(path), hint=bytes_in.RECODE) from None
