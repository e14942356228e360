"""One run in several processes, one a GPU, that torchrun has started: the first one writes, the others compute.

What they say to each other goes through accelerate; nothing here is a collective of our own.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from dpo_cli.data import jsonl

T = TypeVar("T")


def several() -> bool:
    """Whether this run has more than one process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this process has rank 0, which alone writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def broadcast(value: T) -> T:
    """The value that rank 0 has, in every process; all of them must call this."""
    if not several():
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, is_cuda_available

    PartialState(cpu=not is_cuda_available())
    values: list[T] = broadcast_object_list([value])
    return values[0]


class DiscardingJournal(jsonl.Journal):
    """The journal of a process that is not rank 0: appended rows are discarded, no file is opened."""

    def __enter__(self) -> Self:
        return self

    def append(self, row: Any) -> None:
        """Discard the row: rank 0 writes it."""


def journal(path: Path) -> jsonl.Journal:
    """A JSONL file that rank 0 appends to; in every other process appended rows are discarded."""
    return jsonl.Journal(path) if is_main_process() else DiscardingJournal(path)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Replace a JSONL file by these rows, in rank 0 alone."""
    if is_main_process():
        jsonl.write_rows(path, rows)
