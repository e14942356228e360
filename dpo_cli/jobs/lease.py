"""One writer a folder of the volume: two submissions of one run, from two checkouts, must not write over each other.

Each holder has a file of its own in the lease's folder, since a volume keeps the last writer of a file. One that is
about to write looks for others first, writes its file, waits until any other that looked at the same time has written
too, and looks again: the oldest stays. A holder counts while the service says that its call runs, so a killed one holds
nothing. Needs the standard library alone: a container imports it.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Longer than it takes from looking to having committed.
SETTLE_SECONDS = float(os.environ.get("NOTHING_DPO_LEASE_SECONDS", "6"))


class Holder(NamedTuple):
    """Who writes: the `call`, since when (seconds, UTC), and where it was submitted from."""

    since: float
    call: str
    owner: str


class Held(Exception):
    """Another call writes there."""

    def __init__(self, holder: Holder) -> None:
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(holder.since))
        super().__init__(f"{holder.owner or 'another job'} holds it since {when} (call {holder.call})")
        self.holder = holder


def name_of(places: Iterable[str]) -> str:
    """The lease's name, by the folders that are written."""
    return hashlib.sha256("\n".join(sorted(places)).encode()).hexdigest()[:16]


@contextmanager
def hold(
    folder: Path,
    call: str,
    owner: str,
    runs: Callable[[str], bool],
    reload: Callable[[], None],
    commit: Callable[[], None],
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[None]:
    """Hold a lease while the block runs; a further attempt of the same call has it already.

    Args:
        folder: of the lease, on the volume.
        call: the id of this call.
        owner: where it was submitted from, for people.
        runs: whether a call runs, by the service's word.
        reload: sees what others have committed.
        commit: lets others see what is written.
        wait: sleeps so many seconds.

    Raises:
        Held: another call that runs holds it.
    """
    mine = folder / f"{call}.json"
    reload()
    if not mine.exists():
        _refuse(_others(folder, call, runs))
        folder.mkdir(parents=True, exist_ok=True)
        me = Holder(time.time(), call, owner)
        mine.write_text(json.dumps(me._asdict()))
        commit()
        wait(SETTLE_SECONDS)
        reload()
        others = [other for other in _others(folder, call, runs) if other < me]
        if others:
            mine.unlink(missing_ok=True)
            commit()
        _refuse(others)
    try:
        yield
    finally:
        mine.unlink(missing_ok=True)
        commit()


def _others(folder: Path, call: str, runs: Callable[[str], bool]) -> list[Holder]:
    """Holders besides this call that still run, the oldest first."""
    found = []
    for file in folder.glob("*.json") if folder.is_dir() else ():
        try:
            holder = Holder(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError):
            continue  # torn by a kill: whoever wrote it has not gone on
        if holder.call != call and runs(holder.call):
            found.append(holder)
    return sorted(found)


def _refuse(others: list[Holder]) -> None:
    if others:
        raise Held(others[0])
