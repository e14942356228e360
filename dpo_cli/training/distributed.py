"""One run in several processes, one a GPU, that torchrun has started: the first one writes, the others compute.

What they say to each other goes through accelerate; nothing here is a collective of our own. A process that runs out of
memory can't tell the others, which wait for it in a collective: it leaves a note in the run's folder and ends, torchrun
ends the others, and `jobs/worker.py` starts all of them again.
"""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import msgspec

from dpo_cli.data import jsonl
from dpo_cli.data.files import write_json

T = TypeVar("T")
RESTART = "restart.json"  # in a run's folder: all processes are to start again
RESTARTED = "restarted.json"  # the same note once they have
RESTART_CODE = 75  # EX_TEMPFAIL of sysexits.h


def count() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Whether this run has more than one process."""
    return count() > 1


def shards(section: object) -> bool:
    """Whether the processes share out the weights: all are trained. An adapter is small, its base is on each card."""
    return several() and bool(getattr(section, "full", False))


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    """Whether this process has rank 0, which alone writes files."""
    return rank() == 0


def broadcast(value: T) -> T:
    """The value that rank 0 has, in every process; all of them must call this."""
    if not several():
        return value
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list, is_cuda_available

    PartialState(cpu=not is_cuda_available())
    values: list[T] = broadcast_object_list([value])
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in every process; all of them must call this."""
    if not several():
        return [value]
    from accelerate.utils import gather_object

    values: list[T] = gather_object([value])
    return values


def restart(folder: Path, note: object) -> NoReturn:
    """End this process so that all are started again; `note` is what `restart_note` will give them."""
    write_json(folder / RESTART, note)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(RESTART_CODE)  # no cleanup: it would wait for the other processes


def restart_note(folder: Path) -> Any:
    """What a process of the last start left when it ended all of them, in every process and once; None: nothing."""
    file = folder / RESTARTED
    note = None
    if is_main_process() and file.exists():
        note = msgspec.json.decode(file.read_bytes())
        file.unlink()
    return broadcast(note)


class DiscardingJournal(jsonl.Journal):
    """The journal of a process that is not rank 0: appended rows are discarded, no file is opened."""

    def __enter__(self) -> Self:
        return self

    def append(self, row: Any) -> int:
        """Discard the row: rank 0 writes it."""
        return 0


def journal(path: Path) -> jsonl.Journal:
    """A JSONL file that rank 0 appends to; in every other process appended rows are discarded."""
    return jsonl.Journal(path) if is_main_process() else DiscardingJournal(path)


def write_rows_once(path: Path, rows: Iterable[Any]) -> None:
    """Replace a JSONL file by these rows, in rank 0 alone."""
    if is_main_process():
        jsonl.write_rows(path, rows)
