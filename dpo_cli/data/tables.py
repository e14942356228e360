"""CSV and TSV as rows: the delimiter is found, the header is the first row."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.data.bad_rows import Fault
from dpo_cli.data.columns import NAMES, plain_name
from dpo_cli.errors import UserError

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}


def rows(path: Path, lines: Iterator[bytes], headerless: tuple[str, ...] = ()) -> Iterator[tuple[int, Any]]:
    """Yield (line where it begins, row or what is wrong with it).

    Args:
        path: for messages.
        lines: as UTF-8.
        headerless: the columns of a table without a header, where that is allowed.

    Raises:
        UserError: no table, or no column that is known.
    """
    text = _decoded(path, lines)
    first = next((line for line in text if line.strip()), "")
    delimiter = _delimiter(path, first, headerless)
    csv.field_size_limit(1 << 30)  # the default of 128 kB is shorter than a long conversation
    reader = csv.reader(_with(first, text), delimiter=delimiter, strict=True)
    header = None
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            yield start, Fault(f"not a row of a table: {error}", None, "a quote inside a quoted cell is doubled")
            continue
        if cells is None:
            return
        if not any(cells):
            continue
        if header is None:
            header, is_data = _header(path, cells, headerless)
            if not is_data:
                continue
        if len(cells) != len(header):
            yield start, Fault(f"{len(cells)} columns, not {len(header)}", cells)
            continue
        yield start, dict(zip(header, cells, strict=True))


def _with(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _decoded(path: Path, lines: Iterator[bytes]) -> Iterator[str]:
    from dpo_cli.data.bytes_in import RECODE

    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = f"byte 0x{line[error.start]:02x} (byte {error.start + 1} there)"
            raise UserError(f"not UTF-8 text: {byte}", where=f"{path}:{number}", hint=RECODE) from None
        if "\x00" in text:
            raise UserError("NUL bytes in a text", where=f"{path}:{number}", hint="tr -d '\\000' < FILE > CLEAN")
        yield text


def _delimiter(path: Path, first: str, headerless: tuple[str, ...]) -> str:
    """What divides the first line into columns that are known, or into as many as there should be."""

    def fitness(delimiter: str) -> tuple[int, bool, bool]:
        try:
            cells = next(csv.reader([first], delimiter=delimiter), [])
        except csv.Error:
            return 0, False, False
        known = sum(plain_name(cell) in NAMES for cell in cells)
        return known, len(cells) == len(headerless) > 0, len(cells) > 1

    order = sorted(DELIMITERS, key=lambda delimiter: (delimiter == "\t") != (".tsv" in path.suffixes))
    best = max(order, key=fitness)
    if not any(fitness(best)):
        raise UserError(
            "neither JSON nor a table with columns that are known",
            where=f"{path}:1",
            hint="JSON lines; lines of text become prompts by: jq -cR '{prompt: .}' FILE > FILE.jsonl",
        )
    return best


def _header(path: Path, cells: list[str], headerless: tuple[str, ...]) -> tuple[list[str], bool]:
    """The names of the columns, and whether this row is data already."""
    names = [cell.strip() for cell in cells]
    if any(plain_name(name) in NAMES for name in names):
        return names, False
    if len(cells) == len(headerless) and any(" " in name for name in names):  # single words would be a header
        return list(headerless), True
    named = ", ".join(headerless) or "prompt"
    raise UserError(
        f"unknown columns: {', '.join(names)}", where=str(path), hint=f"name them {named}, or --columns prompt=NAME,…"
    )
