"""What preference lint looks at and what it says: a pair with its place in a file, and a finding about pairs."""

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal, NamedTuple, Self, overload

import msgspec
from msgspec import Struct

from dpo_cli.data.jsonl import read_rows_at
from dpo_cli.data.records import Message, Preference, Tool, content_id, message_key

SplitSide = Literal["train", "val"]


class Pair(Struct, kw_only=True, frozen=True):
    """A row of train.jsonl or val.jsonl.

    `where` is `file:line`. The keys stand for what the texts say (roles, and texts up to white space and Unicode
    form): equal keys, equal texts.
    """

    side: SplitSide
    where: str
    row: Preference
    prompt_key: int
    chosen_key: int
    rejected_key: int


class PairKeys(NamedTuple):
    """What tells a pair from others: its side of the split, and keys as `Pair` has them."""

    side: SplitSide
    prompt_key: int
    chosen_key: int
    rejected_key: int


class Location(Struct, frozen=True):
    """Which row a finding is about: its id and `file:line`."""

    id: str
    where: str


class Finding(Struct):
    """Something that is wrong with the data (`error`) or that a careful person would look at (`warning`)."""

    rule: str
    severity: Literal["error", "warning"]
    rows: list[Location]
    message: str


def error(rule: str, pairs: Iterable[Pair], message: str) -> Finding:
    """A finding that makes training wrong or wasteful."""
    return Finding(rule, "error", [Location(pair.row.id, pair.where) for pair in pairs], message)


def warning(rule: str, pairs: Iterable[Pair], message: str) -> Finding:
    """A finding to look at."""
    return Finding(rule, "warning", [Location(pair.row.id, pair.where) for pair in pairs], message)


class PairFiles(Sequence[Pair]):
    """The pairs of a split as they stand in its files, read when they are looked at; use as a context manager.

    Of each pair 40 bytes are kept: where it is, on which side, and its keys. A file that changes meanwhile is read as
    it was only where it is replaced, as our own commands do.

    Args:
        files: each side's file.

    Raises:
        UserError: no such file, or `file:line` of a row that is no pair.
    """

    def __init__(self, files: Mapping[SplitSide, Path]) -> None:
        self._sides = list(files)
        self._paths = list(files.values())
        self._files: list[BinaryIO] = []
        self._decode = msgspec.json.Decoder(Preference).decode
        self._side, self._start, self._line = array("B"), array("Q"), array("L")
        self._prompt, self._chosen, self._rejected = array("Q"), array("Q"), array("Q")

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            for side, path in enumerate(self._paths):
                for start, line, row in read_rows_at(path, Preference):
                    self._side.append(side)
                    self._start.append(start)
                    self._line.append(line)
                    pair = make_pair(row, self._sides[side], "")
                    self._prompt.append(pair.prompt_key)
                    self._chosen.append(pair.chosen_key)
                    self._rejected.append(pair.rejected_key)
                self._files.append(opened.enter_context(path.open("rb")))
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def __len__(self) -> int:
        return len(self._start)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...

    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return Selection(self, range(len(self))[index])
        side = self._side[index]
        file = self._files[side]
        file.seek(self._start[index])
        return Pair(
            side=self._sides[side],
            where=f"{self._paths[side]}:{self._line[index]}",
            row=self._decode(file.readline()),
            prompt_key=self._prompt[index],
            chosen_key=self._chosen[index],
            rejected_key=self._rejected[index],
        )

    def all_keys(self) -> Iterator[PairKeys]:
        """What tells the pairs from each other, without reading them."""
        for side, *keys in zip(self._side, self._prompt, self._chosen, self._rejected, strict=True):
            yield PairKeys(self._sides[side], *keys)


class Selection(Sequence[Pair]):
    """Some of the pairs, in the order of their indices; read when they are looked at."""

    def __init__(self, pairs: Sequence[Pair], indices: Iterable[int]) -> None:
        self._pairs = pairs
        self._indices = array("L", indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Pair]: ...

    def __getitem__(self, index: int | slice) -> Pair | Sequence[Pair]:
        if isinstance(index, slice):
            return Selection(self._pairs, self._indices[index])
        return self._pairs[self._indices[index]]


def keys_of(pairs: Sequence[Pair]) -> "Iterable[PairKeys | Pair]":
    """What tells pairs from each other; of pairs in files without reading them again."""
    return pairs.all_keys() if isinstance(pairs, PairFiles) else pairs


def make_pair(row: Preference, side: SplitSide, where: str) -> Pair:
    """A row with its keys."""
    return Pair(
        side=side,
        where=where,
        row=row,
        prompt_key=_key(row.prompt, row.tools),
        chosen_key=_key(row.chosen),
        rejected_key=_key(row.rejected),
    )


def _key(messages: list[Message], tools: list[Tool] | None = None) -> int:
    keys = list(map(message_key, messages))
    return int(content_id(keys, tools) if tools else content_id(keys), 16)
