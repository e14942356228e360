"""What preference lint looks at and what it says: a pair with its place in a file, and a finding about pairs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from dpo_cli.data.jsonl import read_rows
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
    prompt_key: str
    chosen_key: str
    rejected_key: str


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


def read_pairs(path: Path, side: SplitSide) -> list[Pair]:
    """The pairs of one side of the split.

    Raises:
        UserError: no such file, or `file:line` of a row that is no pair.
    """
    return [make_pair(row, side, f"{path}:{line}") for line, row in read_rows(path, Preference)]


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


def _key(messages: list[Message], tools: list[Tool] | None = None) -> str:
    keys = list(map(message_key, messages))
    return content_id(keys, tools) if tools else content_id(keys)
