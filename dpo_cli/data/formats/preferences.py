"""Preference files of other tools to `Preference` rows; the format is told from the first row.

Reads TRL (conversational, plain, and with the prompt inside both sides), UltraFeedback (binarized), Anthropic HH, and
(prompt, good, bad) as JSONL, CSV or TSV; any of them gzipped, the JSONL ones also as parquet. Writes nothing. Every
row must be of the format of the first. Not covered: rankings of more than two answers, images, tool calls, and plain
`chosen`/`rejected` texts without a prompt: where the prompt would end is not in the file.
"""

import csv
import gzip
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.data.records import Message, Preference, canonical, preference_id, read_messages, read_preference
from dpo_cli.errors import UserError, require

Cells = dict[str, Any]

# Column names of (prompt, good, bad), as people call them.
PROMPT = ("prompt", "question", "instruction", "input")
GOOD = ("good", "chosen", "better", "preferred", "accepted")
BAD = ("bad", "rejected", "worse", "dispreferred")

DELIMITERS = {".csv": ",", ".tsv": "\t"}
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_preferences(path: Path) -> tuple[str, Iterator[Preference]]:
    """The format of a preference file, and its rows as they are read.

    Returns:
        The format's name (`trl-conversational`, `trl-plain`, `trl-implicit-prompt`, `ultrafeedback`, `hh`,
        `prompt-good-bad`) and the rows; a fault in a later row is raised when it is reached.

    Raises:
        UserError: the file is missing, empty or of no known format; or `file:line` of a row that is not of it.
    """
    rows = _rows(path)
    first = next(rows, None)
    if first is None:
        raise UserError("the file holds no rows", where=str(path))
    try:
        name, read = detect(first[1])
    except ValueError as error:
        raise UserError(str(error), where=f"{path}:{first[0]}", hint=_HINT) from None
    return name, _parse(itertools.chain([first], rows), read, name, path)


_HINT = (
    'one object a line with "prompt", "chosen" and "rejected" (texts or lists of {"role", "content"} messages), '
    "or a table with the columns prompt, good, bad"
)


def detect(row: Cells) -> tuple[str, Callable[[Cells], Preference]]:
    """Name and reader of the format that a row is of.

    Raises:
        ValueError: it is of no known format.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if "score_chosen" in row and "score_rejected" in row:
            return "ultrafeedback", _ultrafeedback
        return ("trl-conversational" if "prompt" in row else "trl-implicit-prompt"), _conversations
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" in row:
            return "trl-plain", _with_own_id
        if _HH_TURN.match(chosen):
            return "hh", _hh
    if all(any(name in row for name in names) for names in (PROMPT, GOOD, BAD)):
        return "prompt-good-bad", _prompt_good_bad
    raise ValueError(f"no known preference format; the row has {', '.join(sorted(row)) or 'nothing'}")


def _parse(
    rows: Iterable[tuple[int, Cells]], read: Callable[[Cells], Preference], name: str, path: Path
) -> Iterator[Preference]:
    for line, row in rows:
        try:
            yield read(row)
        except ValueError as error:
            raise UserError(f"{error} (read as {name})", where=f"{path}:{line}") from None


def _conversations(row: Cells) -> Preference:
    """TRL's conversational format. Sides that hold the whole conversation share its beginning, which is the prompt."""
    chosen = read_messages(row.get("chosen"), "chosen", role="assistant")
    rejected = read_messages(row.get("rejected"), "rejected", role="assistant")
    if "prompt" in row and chosen[0]["role"] == rejected[0]["role"] == "assistant":
        return _with_own_id(row)
    # As in TRL's `extract_prompt`, but each side keeps a message where both are identical.
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise ValueError('"chosen" and "rejected" share no first message that could be the prompt')
    if not chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise ValueError('"chosen" and "rejected" part before an assistant message')
    if "prompt" in row:
        prompt = _longer(prompt, read_messages(row["prompt"], "prompt"))
    return Preference(id=preference_id(prompt, chosen, rejected), prompt=prompt, chosen=chosen, rejected=rejected)


def _longer(shared: list[Message], given: list[Message]) -> list[Message]:
    """The prompt, where both its own field and the sides hold it: one of them may lack the system message."""
    texts = [[(message["role"], canonical(message["content"])) for message in messages] for messages in (shared, given)]
    if texts[0][-len(given) :] == texts[1]:
        return shared
    if texts[1][-len(shared) :] == texts[0]:
        return given
    raise ValueError('"prompt" is not what "chosen" and "rejected" begin with')


def _with_own_id(row: Cells) -> Preference:
    """TRL's format with a prompt; an `id` that is no text (a row number) is replaced by ours."""
    return read_preference(row if isinstance(row.get("id"), str) else {**row, "id": None})


def _ultrafeedback(row: Cells) -> Preference:
    pair = _conversations(row)
    try:
        good, bad = (msgspec.convert(row[f"score_{side}"], float) for side in ("chosen", "rejected"))
    except (KeyError, msgspec.ValidationError):
        raise ValueError('"score_chosen" or "score_rejected" is not a number') from None
    pair.chosen_score, pair.rejected_score, pair.score_gap = good, bad, good - bad
    return pair


def _hh(row: Cells) -> Preference:
    r"""Anthropic HH: each side is a transcript, `\n\nHuman: … \n\nAssistant: …`, its last turn the answer."""
    return _conversations({side: _transcript(row.get(side), side) for side in ("chosen", "rejected")})


def _transcript(text: Any, field: str) -> list[Message]:
    start, *turns = _HH_TURN.split(text) if isinstance(text, str) else ("not a text",)
    if start.strip() or not turns or turns[-2] != "Assistant":
        raise ValueError(f'"{field}" is not a "\\n\\nHuman: … \\n\\nAssistant: …" transcript')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _prompt_good_bad(row: Cells) -> Preference:
    values: Cells = {}
    for field, names in (("prompt", PROMPT), ("chosen", GOOD), ("rejected", BAD)):
        name = next((name for name in names if name in row), names[0])
        if not isinstance(row.get(name), (str, list)):
            raise ValueError(f'no "{name}"')
        values[field] = row[name]
    return read_preference(values)


def _rows(path: Path) -> Iterator[tuple[int, Cells]]:
    """Yield (line, row); for a table the line is where the row ends, for parquet the row's number."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind in DELIMITERS:
        return _table_rows(path, DELIMITERS[kind])
    return _json_rows(path)


def _lines(path: Path) -> Iterator[str]:
    try:
        # A byte order mark is what spreadsheets put first. newline="": the csv reader counts and joins lines itself.
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield from file
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: {error.reason}", where=str(path)) from None
    except (OSError, EOFError) as error:
        raise UserError(getattr(error, "strerror", None) or str(error), where=str(path)) from None


def _json_rows(path: Path) -> Iterator[tuple[int, Cells]]:
    decode = msgspec.json.Decoder(Cells).decode
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield number, decode(line)
        except msgspec.MsgspecError as error:
            raise UserError(f"not a JSON object: {error}", where=f"{path}:{number}") from None


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[int, Cells]]:
    """Rows of a table. Without a header that names them, three columns are prompt, good and bad."""
    csv.field_size_limit(1 << 30)  # the default of 128 kB is shorter than a long conversation
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            if not any(cells):
                continue
            if header is None:
                names = [cell.strip().lower() for cell in cells]
                if all(set(names) & set(known) for known in (PROMPT, GOOD, BAD)):
                    header = names
                    continue
                if not any(" " in cell.strip() for cell in cells):  # single words: a header, not data
                    raise UserError(
                        f"unknown columns: {', '.join(names)}", where=str(path), hint="name them prompt, good, bad"
                    )
                header = [PROMPT[0], GOOD[0], BAD[0]]
            if len(cells) != len(header):
                raise UserError(f"{len(cells)} columns, not {len(header)}", where=f"{path}:{reader.line_num}")
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"not a table: {error}", where=f"{path}:{reader.line_num}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Cells]]:
    require("train", "reading parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1024))
            yield from enumerate(rows, 1)
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"not a parquet file: {error}", where=str(path)) from None
