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
    """Whether there are others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main_process() -> bool:
    """Whether this is the process that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def broadcast(value: T) -> T:
    """The first process's value, once all of them ask."""
    if not several():
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, is_cuda_available

    PartialState(cpu=not is_cuda_available())
    values: list[T] = broadcast_object_list([value])
    return values[0]


class Unwritten(jsonl.Journal):
    """A journal of a process that writes nothing."""

    def __enter__(self) -> Self:
        return self

    def append(self, row: Any) -> None:
        """Nothing."""


def journal(path: Path) -> jsonl.Journal:
    """A JSONL file open for appending, in the first process."""
    return jsonl.Journal(path) if is_main_process() else Unwritten(path)


def write_rows_once(path: Path, rows: Iterable[Any]) -> None:
    """As `store.write_rows`, in the first process."""
    if is_main_process():
        jsonl.write_rows(path, rows)
