"""Work that a stopped command goes on with: what is known, what is missing, and a line for each row as it comes.

Every stage that pays or computes for its rows works in this way: it reads the rows that former runs left, finds those
that are missing, appends each new one as soon as it is there, and at a clean end drops the lines that later ones
supersede. A command that is killed in between loses what was in flight, and the same command again goes on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from dpo_cli.data.bulk import paused_collection
from dpo_cli.data.jsonl import Journal, read_rows
from dpo_cli.progress import Progress, Silent


class Identified(Protocol):
    """A record with an id."""

    id: str


T = TypeVar("T", bound=Identified)
Wanted = TypeVar("Wanted")


class Resumable(Generic[T]):
    """A JSONL file of rows with an `id` that one process at a time fills. Use as a context manager.

    Args:
        path: the file; made by the first row that is delivered.
        kind: what its rows are read as; with fewer fields than they have, the rest is passed over.
        check: called with each line's number and row, to refuse rows that new ones must not be mixed with.
        wait: for another process that writes to it, instead of giving up.
        dry_run: only read: nothing is locked, made or delivered.

    `known` are the rows of former runs by id, the last line of an id winning; delivered rows of `kind` join them.
    `delivered` are the ids of this run's own, `superseded` says whether any line is not its id's last.

    Raises:
        UserError: another process writes to it, a line is no such row, or the disk is full.
    """

    def __init__(
        self,
        path: Path,
        kind: type[T],
        check: Callable[[int, T], None] | None = None,
        wait: bool = False,
        dry_run: bool = False,
    ) -> None:
        self.path = path
        self.known: dict[str, T] = {}
        self.delivered: set[str] = set()
        self._kind = kind
        self._check = check
        self._journal = None if dry_run else Journal(path, wait)
        self.superseded = False

    def __enter__(self) -> Self:
        if self._journal is not None:
            self._journal.__enter__()
        try:
            self._read()
        except BaseException:
            if self._journal is not None:
                self._journal.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._journal is None:
            return
        try:
            if error is None and self.superseded:
                self._journal.compact()
        finally:
            self._journal.close()

    @classmethod
    def read(cls, path: Path, kind: type[T]) -> Self:
        """What is known, to be looked at only."""
        with cls(path, kind, dry_run=True) as rows:
            return rows

    def missing(
        self, wanted: Mapping[str, Wanted], settles: Callable[[T, Wanted], bool] | None = None
    ) -> dict[str, Wanted]:
        """What no known row settles, in its order.

        Args:
            wanted: whatever is asked for, by the id that its row will have.
            settles: whether a known row is an answer to what is asked for; None: every row is.
        """
        known = self.known
        if settles is None:
            return {key: one for key, one in wanted.items() if key not in known}
        return {key: one for key, one in wanted.items() if key not in known or not settles(known[key], one)}

    def deliver(self, row: Any) -> None:
        """Append one row; it is on the disk when this returns, and supersedes an earlier one of its id.

        Raises:
            UserError: the disk is full.
        """
        assert self._journal is not None, "a dry run delivers nothing"
        self._journal.append(row)
        self.superseded |= row.id in self.known or row.id in self.delivered
        self.delivered.add(row.id)
        if isinstance(row, self._kind):
            self.known[row.id] = row

    @contextmanager
    def reporting(self, progress: Progress, stage: str, total: int, owed: int) -> Iterator["Delivery"]:
        """Progress of a stage of `total` units, `owed` of which are still to be delivered."""
        before = total - owed - len(self.delivered)
        progress.begin(stage, total, total - owed)
        try:
            yield Delivery(progress, lambda: before + len(self.delivered))
        finally:
            progress.end()

    def _read(self) -> None:
        if not self.path.exists():
            return
        lines = 0
        with paused_collection():
            for number, row in read_rows(self.path, self._kind):
                if self._check is not None:
                    self._check(number, row)
                self.known[row.id] = row
                lines += 1
        self.superseded = lines > len(self.known)


class Delivery(Silent):
    """Progress of whoever delivers the rows: what is done is counted in rows, the counters are its own.

    Args:
        progress: where to report.
        done: how many units are done.
    """

    def __init__(self, progress: Progress, done: Callable[[], int]) -> None:
        self._progress = progress
        self._done = done
        self._totals: dict[str, float] = {}
        self._part: dict[str, float] = {}
        self._former: dict[str, float] = {}

    def update(self, done: int, **counters: float) -> None:
        """Take the totals of whoever delivers; what is done the rows say."""
        self._part |= counters
        self.note()

    def note(self, **totals: float) -> None:
        """Report, with totals of the stage's own."""
        self._totals |= totals
        part = {name: self._former.get(name, 0) + value for name, value in self._part.items()}
        self._progress.update(self._done(), **self._totals, **part)

    def next_part(self) -> None:
        """Whoever delivers has finished, and will count from zero when it is called again."""
        self._former = {name: self._former.get(name, 0) + value for name, value in self._part.items()}
        self._part = dict.fromkeys(self._part, 0.0)

    def log(self, text: str) -> None:
        """Pass a line on."""
        self._progress.log(text)

    def aside(self) -> AbstractContextManager[None]:
        """Leave the screen to somebody else within."""
        return self._progress.aside()
