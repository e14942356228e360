"""Completions to judgments: reads completions.jsonl, has a judge rank them, writes judgments.jsonl.

A prompt is judged once: what was judged stays, unless its completions changed; errors are tried again. One file holds
judgments of one judge. Identical completions are judged once, unusable ones (empty, or without a line in the format
that `generate.keep_lines` asks for) never. Making pairs is `pair`'s work.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, overload

import msgspec
from msgspec import Raw, Struct, field

from dpo_cli import judges
from dpo_cli.config.settings import Config
from dpo_cli.data.bulk import paused_collection
from dpo_cli.data.jsonl import LatestRows, RowReader, read_rows_at, stream_latest
from dpo_cli.data.records import Completions, Judgment, Usage, completions_id
from dpo_cli.data.resumable import Resumable
from dpo_cli.data.same_settings import refuse_other_settings
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.errors import UserError
from dpo_cli.judges._task import Task, make_task, said_by, stands_of
from dpo_cli.progress import Progress
from dpo_cli.statistics import count_alike

COMPLETIONS, JUDGMENTS = "completions.jsonl", "judgments.jsonl"
TOO_FEW = "fewer than two distinct usable completions"
NOTHING = Raw(b"")


class Judged(Struct, kw_only=True):
    """What `run` did, or with `dry_run` would do.

    `done_before` prompts needed nothing; `owed` were given to the judge, at most `calls` paid calls; `skipped` and
    `errors` count this run's reasons; `usage` and `usd` are of all judgments in the file, `weights` those of a panel's
    models. `receipt` is of this run's paid calls, where there were any; `estimate`, with `dry_run`, of those owed.
    """

    total: int
    done_before: int
    owed: int
    calls: int
    judged: int = 0
    consistent: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)
    usd: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)
    path: str = ""
    receipt: Receipt | None = None
    estimate: Estimate | None = None


def run(config: Config, progress: Progress, limit: int | None = None, dry_run: bool = False) -> Judged:
    """Judge what is not judged yet.

    Args:
        config: every setting.
        progress: where to report; units are prompts.
        limit: only the first so many prompts of completions.jsonl.
        dry_run: only say what is owed.

    Raises:
        UserError: bad completions, judgments of another judge in the file, or the judge can't go on.
    """
    path = Path(config.data) / JUDGMENTS
    judge = judges.load(config.judge.judge)
    identity = judge.identity(config)
    if config.generate.keep_lines:
        identity["keep_lines"] = config.generate.keep_lines
    former = _Former(identity, path)
    with (
        _open_completions(Path(config.data) / COMPLETIONS) as file,
        Resumable(path, _Known, former.take, dry_run=dry_run) as judgments,
    ):
        plan = _plan(file, limit, judgments, config)
        tasks, skips, total = plan.tasks, plan.skips, plan.total
        before = total - len(tasks) - len(skips)
        calls = judge.calls(tasks.shown, config)
        result = Judged(total=total, done_before=before, owed=len(tasks), calls=calls, path=str(path))
        if dry_run:
            if (estimate := getattr(judge, "estimate", None)) is not None:
                result.estimate = estimate(tasks, config)
            return result
        for skip in skips:
            judgments.deliver(skip)
        if tasks or skips:

            def deliver(judgment: Judgment) -> None:
                judgment.judge = identity
                judgment.flags = tasks.flags.pop(judgment.id, {})
                judgments.deliver(judgment)

            tasks.flagging = True
            with judgments.reporting(progress, "judge", total, len(tasks)) as delivery:
                result.receipt = judge.judge(tasks, config, deliver, delivery)
        fresh = judgments.delivered.copy()
        if (settle := getattr(judge, "settle", None)) is not None and len(config.judge.models) > 1:
            with LatestRows(path, Judgment) as known:
                for judgment in settle(_AllTasks(config), known, config):
                    judgments.deliver(judgment)
    if judgments.delivered or judgments.superseded:
        _count(result, path, fresh)
    else:
        result.usage, result.usd, result.weights = former.usage, former.usd, former.weights
    return result


class _Known(Struct, gc=False):
    """What is kept of a judgment: whether, and of which completions, it is one; the rest is for `_Former`."""

    id: str
    completions_id: str
    judge: Raw = NOTHING
    error: str | None = None
    skipped: str | None = None
    failures: int = 0
    usage: Usage | None = None
    usd: float = 0.0
    weights: dict[str, float] = {}


class _Former:
    """Takes each judgment of former runs in its turn: refuses another judge's, and adds up what they cost.

    Args:
        identity: who judges now; scores of different judges do not compare.
        path: the judgments.
    """

    def __init__(self, identity: dict[str, Any], path: Path) -> None:
        self.usage = Usage()
        self.usd = 0.0
        self.weights: dict[str, float] = {}
        self._identity = identity
        self._path = path
        self._checked: set[bytes] = set()

    def take(self, number: int, judgment: _Known) -> None:
        """Check and count the judgment of a line, and drop what is not needed again: it is most of it."""
        made_by = bytes(judgment.judge)
        self.usd += judgment.usd
        if judgment.usage is not None:
            self.usage += judgment.usage
        self.weights = self.weights or judgment.weights
        judgment.judge, judgment.usage, judgment.weights = NOTHING, None, self.weights
        if made_by not in self._checked and judgment.error is None:
            self._checked.add(made_by)
            self._refuse_another(number, made_by)

    def _refuse_another(self, number: int, made_by: bytes) -> None:
        then = msgspec.json.decode(made_by) if made_by else {}
        if not isinstance(then, dict):
            raise UserError('"judge" is not an object', where=f"{self._path}:{number}")
        if not then or then == self._identity:
            return
        refuse_other_settings(
            "judged",
            then,
            self._identity,
            where=f"{self._path}:{number}",
            hint=f"set that back, or copy {COMPLETIONS} to another folder and use --data, or rm {self._path} to judge "
            "anew (replies that are paid for stay in the ledger)",
            name=lambda key: f"generate.{key}" if key == "keep_lines" else f"judge.{key}",
        )


class _Tasks(Sequence[Task]):
    """What the judge must see; each task is made from its line of completions.jsonl when it is looked at.

    `shown` are how many completions each shows. `flags` are what is suspicious about the completions of tasks that were
    looked at, by task and completion; they are looked for only while `flagging`, which costs more than to price a task.
    """

    def __init__(self, rows: RowReader[Completions], config: Config) -> None:
        self.flags: dict[str, dict[int, list[str]]] = {}
        self.flagging = False
        self.shown = array("I")
        self._rows = rows
        self._config = config
        self._starts = array("Q")
        self._failures: dict[int, int] = {}  # by start, where there are any

    def append(self, start: int, shown: int, failures: int) -> None:
        """Add the task of the row that begins there; `failures` counts the former runs that ended in an error."""
        self._starts.append(start)
        self.shown.append(shown)
        if failures:
            self._failures[start] = failures

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        start = self._starts[index]
        task = _task(self._rows.at(start), self._config, self._failures.get(start, 0))
        if self.flagging:
            self._flag(task)
        return task

    def _flag(self, task: Task) -> None:
        from dpo_cli.analysis.prompt_injection import suspicious  # its patterns take 20 ms to compile

        found = {number: why for number, text in enumerate(task.completions) if (why := suspicious(text))}
        if found:
            self.flags[task.id] = found


class _AllTasks:
    """The task of every prompt, made when it is looked at; can be gone through again."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __iter__(self) -> Iterator[Task]:
        rows = stream_latest(Path(self._config.data) / COMPLETIONS, Completions)
        return (_task(row, self._config) for row in rows)


class _Plan(Struct):
    """What is to be done about `total` prompts: `tasks` for the judge, and `skips`, which leave it nothing to do."""

    total: int
    tasks: _Tasks
    skips: list[Judgment]


@contextmanager
def _open_completions(path: Path) -> Iterator[BinaryIO]:
    if not path.exists() or not path.stat().st_size:
        raise _no_completions(path)
    with path.open("rb") as file:
        yield file


def _no_completions(path: Path) -> UserError:
    return UserError("no completions", where=str(path), hint="nothing-dpo generate")


def _plan(file: BinaryIO, limit: int | None, judgments: Resumable[_Known], config: Config) -> _Plan:
    """What the judge must see, and the judgments of prompts that leave it nothing to compare.

    Raises:
        UserError: no completions, or a line that is none.
    """
    path = Path(file.name)
    plan = _Plan(0, _Tasks(RowReader(file, path, Completions), config), [])
    places: dict[int, int] = {}  # by hash of the id
    owed: dict[int, int | Judgment] = {}  # by place: where the row of a task begins, or its judgment
    shown = array("I")  # by place: how many of its completions a judge sees
    failures: dict[int, int] = {}  # by place
    usable = _usable(config)
    with paused_collection():
        for start, row in _rows_at(path, limit):
            place = places.setdefault(hash(row.id), len(places))
            if place == len(shown):
                shown.append(0)
            owed.pop(place, None)  # the last line of an id wins
            old = judgments.known.get(row.id)
            if old is not None and old.completions_id != completions_id(row.completions, row.messages):
                old = None
            if old is not None and old.error is None and old.skipped != TOO_FEW:
                continue
            shown[place] = sum(stand == index for index, stand in enumerate(stands_of(said_by(row), usable)))
            if shown[place] > 1:
                owed[place] = start
                if old is not None:
                    failures[place] = old.failures
            elif old is None or old.skipped is None:
                judged = completions_id(row.completions, row.messages)
                owed[place] = Judgment(id=row.id, completions_id=judged, skipped=TOO_FEW)
        for place, one in sorted(owed.items()):
            if isinstance(one, Judgment):
                plan.skips.append(one)
            else:
                plan.tasks.append(one, shown[place], failures.get(place, 0))
    plan.total = len(places)
    if not plan.total:
        raise _no_completions(path)
    return plan


def _rows_at(path: Path, limit: int | None) -> Iterator[tuple[int, Completions]]:
    """Rows with where they begin; of the first `limit` prompts only the last lines."""
    if limit is None:
        yield from ((start, row) for start, _, row in read_rows_at(path, Completions))
        return
    with LatestRows(path, Completions) as rows:
        yield from ((rows.starts[key], rows[key]) for key in islice(rows, limit))


def _task(row: Completions, config: Config, failures: int = 0) -> Task:
    return make_task(row, _usable(config), failures)


def _usable(config: Config) -> Callable[[str], bool]:
    """Whether a text is in the format that is asked for."""
    pattern = _compile(config.generate.keep_lines)
    return lambda text: _in_format(text, pattern)


@cache
def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"'{pattern}' is no regular expression: {error}", where="generate.keep_lines") from None


def _in_format(text: str, pattern: re.Pattern[str] | None) -> bool:
    return pattern is None or any(pattern.search(line) for line in text.splitlines())


class _Outcome(Struct, omit_defaults=True):
    """What is counted of a judgment."""

    id: str
    scores: Raw = NOTHING
    consistent: bool | None = None
    skipped: str | None = None
    error: str | None = None
    weights: dict[str, float] = {}
    usage: Usage = field(default_factory=Usage)
    usd: float = 0.0


def _count(result: Judged, path: Path, fresh: set[str]) -> None:
    """Count what this run has judged, and what all that is in the file has cost."""
    skipped: Counter[str] = Counter()
    errors: list[str] = []
    for row in stream_latest(path, _Outcome) if path.exists() else ():
        result.weights = result.weights or row.weights
        result.usage += row.usage
        result.usd += row.usd
        if row.id not in fresh:
            continue
        if bytes(row.scores) not in (b"", b"null"):
            result.judged += 1
            result.consistent += row.consistent is True
        if row.skipped:
            # What follows a colon is the judge's or the endpoint's own words, and different each time.
            skipped[row.skipped.partition(":")[0]] += 1
        if row.error:
            errors.append(row.error)
    result.skipped = dict(skipped)
    result.errors = count_alike(errors)
