"""Encoded rows in an Arrow file: made once in chunks, read in place by every run over the same rows.

`<folder>/<key>.arrow` holds token ids under the names that TRL's trainers read, and what a loss reads of a pair;
`<key>.json`, written after it, its size and its hash, without which it counts for nothing. The key is a hash of all
that decides the ids: the rows, the tokenizer's files, the encoder's settings, the code, the versions of the libraries.
Both can be deleted at any time. Whoever uses a file holds a shared lock on it, and marks its note as used; `prune`
removes those that nobody has used for a month. Needs pyarrow and no torch.
"""

import hashlib
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, overload

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Struct

from dpo_cli.data import files, thinking
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import file_sha256
from dpo_cli.progress import Progress
from dpo_cli.training import encode
from dpo_cli.training.encode import IGNORED, EncodedRow, Encoder, Sequences
from dpo_cli.training.encode_inputs import exchange
from dpo_cli.training.inputs import TrainingRow
from dpo_cli.training.plan import TokenLengths

CHUNK = 256  # rows encoded at once
KEPT_SECONDS = 30 * 86_400.0  # since a file was last used
IDS = pa.list_(pa.int32())
SHARED = {"gap": pa.float64(), "weight": pa.float64(), "chosen_score": pa.float64(), "rejected_score": pa.float64()}
PAIR = {"prompt_ids": IDS, "chosen_ids": IDS, "rejected_ids": IDS}
DEMONSTRATION = {"input_ids": IDS, "labels": IDS}
TOKENIZER_FILES = (
    "config.json", "tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken",
)  # fmt: skip
PACKAGES = ("transformers", "tokenizers", "jinja2")


class StoredRow:
    """One row of a table, read when it is asked for."""

    def __init__(self, batch: pa.RecordBatch, index: int) -> None:
        self._batch, self._index = batch, index

    def _value(self, name: str) -> Any:
        return self._batch.column(name)[self._index].as_py()

    @property
    def _is_pair(self) -> bool:
        return "prompt_ids" in self._batch.schema.names

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        found: list[int]
        if self._is_pair:
            found = self._value("prompt_ids")
            return found
        labels, found = self._value("labels"), self._value("input_ids")
        return found[: next((at for at, label in enumerate(labels) if label != IGNORED), len(labels))]

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of each completion."""
        if self._is_pair:
            return [self._value("chosen_ids"), self._value("rejected_ids")]
        return [[label for label in self._value("labels") if label != IGNORED]]

    @property
    def gap(self) -> float | None:
        """How far apart the scores of a pair are; None: not known."""
        found: float | None = self._value("gap")
        return found

    @property
    def weight(self) -> float:
        """What the pair counts."""
        found: float = self._value("weight")
        return found

    @property
    def scores(self) -> tuple[float, float] | None:
        """Scores of chosen and rejected; None: not known."""
        chosen, rejected = self._value("chosen_score"), self._value("rejected_score")
        return None if chosen is None else (chosen, rejected)


class StoredRows(Sequence[StoredRow]):
    """Rows of a table; `held` is its file, open and locked as long as somebody has the rows."""

    def __init__(self, table: pa.Table, held: BinaryIO | None = None) -> None:
        self.table = table
        self._held = held
        self._places = [(batch, index) for batch in table.to_batches() for index in range(batch.num_rows)]

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> StoredRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredRow]: ...
    def __getitem__(self, index: int | slice) -> StoredRow | list[StoredRow]:
        if isinstance(index, slice):
            return [StoredRow(*place) for place in self._places[index]]
        return StoredRow(*self._places[index])

    def lengths(self) -> list[TokenLengths]:
        """Tokens of each pair's prompt, and of its completions."""
        counts = [pc.list_value_length(self.table.column(name)).to_pylist() for name in PAIR]
        return [TokenLengths(prompt, completions) for prompt, *completions in zip(*counts, strict=True)]


class EncodedFile(Struct):
    """Usable rows, how many were shortened, and reason -> rows refused."""

    rows: StoredRows
    shortened: int
    refused: dict[str, int]


class Note(Struct):
    """What stands beside an Arrow file: its key, size in bytes and hash, and what became of the rows."""

    key: str
    size: int
    sha256: str
    shortened: int
    refused: dict[str, int]


def encode_rows(
    encoder: Encoder, rows: Sequence[TrainingRow], folder: Path, base: Path, progress: Progress
) -> EncodedFile:
    """Rows as token ids, from their Arrow file where they have been encoded before.

    Args:
        encoder: of the base.
        rows: in the order in which they are wanted; all pairs, or all demonstrations.
        folder: where the files are, and go.
        base: folder of the base model.
        progress: hears of a file that is damaged.

    Raises:
        UserError: what the encoder raises, or the file can't be written.
    """
    if not rows:
        return EncodedFile(StoredRows(table_of([])), 0, {})
    key = content_key(encoder, rows, base)
    path = folder / f"{key[:32]}.arrow"
    found = _read(path, key, progress)
    if found is None:
        with _one_at_a_time(folder):
            found = _read(path, key)  # another process has made it meanwhile
            if found is None:
                _write(path, key, encoder, rows)
                found = _read(path, key)
    if found is None:
        raise UserError("the encoded rows are not what was written", where=str(path), hint="check the disk")
    return found


def content_key(encoder: Encoder, rows: Sequence[TrainingRow], base: Path) -> str:
    """Hash of all that decides what the rows' file holds."""
    found = {file.name: file_sha256(file) for pattern in TOKENIZER_FILES for file in base.glob(pattern)}
    code = [Path(str(module.__file__)) for module in (encode, thinking)] + [Path(__file__)]
    settings = [
        dict(sorted(found.items())),
        encoder.settings(),
        [files.sha256(file) for file in code],
        [version(package) for package in PACKAGES],
    ]
    digest = hashlib.sha256(msgspec.json.encode(settings, order="sorted"))
    pack = msgspec.msgpack.Encoder().encode
    for row in rows:
        digest.update(pack(row._replace(where="")))
    return digest.hexdigest()


def prune(folder: Path, progress: Progress) -> None:
    """Remove the files of a folder that nobody uses, nor has used for a month; says how many.

    Nothing is removed while another process encodes rows there.
    """
    try:
        with _one_at_a_time(folder, wait=False) as alone:
            if not alone:
                return
            files.clean_up(folder / "*.arrow")  # what killed runs have left of theirs
            stems = sorted(
                {file.with_suffix("") for pattern in ("[!.]*.arrow", "[!.]*.json") for file in folder.glob(pattern)}
            )
            sizes = [size for stem in stems if (size := _remove_unused(stem)) is not None]
    except (OSError, UserError):  # it is another user's: to do without costs nothing but space
        return
    if sizes:
        what = f"the encoded rows of {len(sizes):,} data sets, {sum(sizes) / 1e6:,.0f} MB"
        progress.log(f"{folder}: removed {what}, which no run has used for {KEPT_SECONDS / 86_400:.0f} days")


def _remove_unused(stem: Path) -> int | None:
    """Remove a file and its note, if they are not in use and were not of late; returns their bytes."""
    path, note = stem.with_suffix(".arrow"), stem.with_suffix(".json")
    with ExitStack() as opened:
        if path.exists() and not files.lock(opened.enter_context(path.open("rb")).fileno(), path, wait=False):
            return None
        there = [file.stat() for file in (note, path) if file.exists()]  # no sooner: it may have been used meanwhile
        if not there or time.time() - max(one.st_mtime for one in there) < KEPT_SECONDS:
            return None
        note.unlink(missing_ok=True)  # first, since it alone makes the other count
        path.unlink(missing_ok=True)
        return sum(one.st_size for one in there)


def table_of(rows: Sequence[EncodedRow]) -> pa.Table:
    """A table of rows in memory."""
    return pa.Table.from_batches([_batch(rows)])


def columns(rows: Sequence[EncodedRow], more: Mapping[str, Sequence[float]] | None = None) -> pa.Table:
    """What a trainer reads of rows: token ids in place, and other columns."""
    table = rows.table if isinstance(rows, StoredRows) else table_of(rows)
    table = table.select([name for name in table.schema.names if name not in SHARED])
    for name, values in (more or {}).items():
        table = table.append_column(name, pa.array(values, pa.float64()))
    return table


def _batch(rows: Sequence[EncodedRow]) -> pa.RecordBatch:
    """Columns of rows: of pairs, or of demonstrations with the prompt's labels ignored."""
    columns: dict[str, list[Any]]
    if rows and len(rows[0].completions) == 1:
        kinds = DEMONSTRATION
        columns = {
            "input_ids": [row.prompt + row.completions[0] for row in rows],
            "labels": [[IGNORED] * len(row.prompt) + row.completions[0] for row in rows],
        }
    else:
        kinds = PAIR
        columns = {
            "prompt_ids": [row.prompt for row in rows],
            "chosen_ids": [row.completions[0] for row in rows],
            "rejected_ids": [row.completions[1] for row in rows],
        }
    scores = [row.scores or (None, None) for row in rows]
    columns |= {
        "gap": [row.gap for row in rows],
        "weight": [row.weight for row in rows],
        "chosen_score": [chosen for chosen, _ in scores],
        "rejected_score": [rejected for _, rejected in scores],
    }
    schema = pa.schema(kinds | SHARED)
    return pa.record_batch([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


class _Parts(io.RawIOBase):
    """Takes what is written, to be handed on in parts."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, block: Any) -> int:
        self.parts.append(bytes(block))
        return len(block)

    def taken(self) -> bytes:
        """What was written since the last time."""
        block, self.parts = b"".join(self.parts), []
        return block


def _write(path: Path, key: str, encoder: Encoder, rows: Sequence[TrainingRow]) -> None:
    """Encode rows into a file, a chunk at a time, and note its hash beside it."""
    note = Note(key, 0, "", 0, {})
    digest = hashlib.sha256()

    def parts() -> Iterator[bytes]:
        sink = _Parts()
        empty = [Sequences([], [[] for _ in rows[0].completions])]
        with pa.ipc.new_stream(sink, _batch(empty).schema) as writer:
            for first in range(0, len(rows), CHUNK):
                encoded = _encode(encoder, rows[first : first + CHUNK], note)
                if encoded:
                    writer.write_batch(_batch(encoded))
                yield sink.taken()
        yield sink.taken()

    def counted() -> Iterator[bytes]:
        for part in parts():
            digest.update(part)
            note.size += len(part)
            yield part

    path.with_suffix(".json").unlink(missing_ok=True)
    files.write_file(path, counted(), private=True)
    note.sha256 = digest.hexdigest()
    files.write_json(path.with_suffix(".json"), note)


def _encode(encoder: Encoder, rows: Sequence[TrainingRow], note: Note) -> list[Sequences]:
    """Usable rows of a chunk, with what a loss reads besides their tokens; the others are counted."""
    found = encoder.encode([exchange(row) for row in rows])
    for sequences, index in zip(found.rows, found.kept, strict=True):
        row = rows[index]
        sequences.gap, sequences.weight, sequences.scores = row.gap, row.weight, row.scores
    note.shortened += found.shortened
    for reason, count in found.refused.items():
        note.refused[reason] = note.refused.get(reason, 0) + count
    return found.rows


def _read(path: Path, key: str, progress: Progress | None = None) -> EncodedFile | None:
    """What a file holds, in place; None: it is not there, or not what its note says."""
    beside = path.with_suffix(".json")
    try:
        content = beside.read_bytes()
    except OSError:
        return None
    try:
        held = path.open("rb")
        files.lock(held.fileno(), path, wait=True, shared=True)
        note = msgspec.json.decode(content, type=Note)
        if (note.key, note.size, note.sha256) == (key, path.stat().st_size, files.sha256(path)):
            with suppress(OSError):  # another user's
                os.utime(beside)
            return EncodedFile(StoredRows(_mapped(path), held), note.shortened, note.refused)
    except (OSError, msgspec.MsgspecError, pa.ArrowException):
        pass
    if progress is not None and beside.exists():  # else it was removed meanwhile
        progress.log(f"{path} is damaged: the rows are encoded again")
    return None


def _mapped(path: Path) -> pa.Table:
    """The table in an Arrow file, in place; where the file system has no way for that, in memory."""
    try:
        source = pa.memory_map(str(path))
    except OSError:
        source = pa.OSFile(str(path))
    with pa.ipc.open_stream(source) as stream:
        return stream.read_all()


@contextmanager
def _one_at_a_time(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Let other processes that want the same rows wait, and find them made; whether it is our turn."""
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDONLY | os.O_CREAT, 0o644)  # a run's own lock is as open
    try:
        with files.explained(folder):
            alone = files.lock(handle, folder / ".lock", wait)
        yield alone
    finally:
        os.close(handle)
