"""Completions to judgments: reads completions.jsonl, has a judge rank them, writes judgments.jsonl.

A prompt is judged once: what was judged stays, unless its completions changed; errors are tried again. One file holds
judgments of one judge. Identical completions are judged once, unusable ones (empty, or without a line in the format
that `generate.keep_lines` asks for) never. Making pairs is `pair`'s work.
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, overload

import msgspec
from msgspec import Raw, Struct, field

from dpo_cli import judges
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import RowsAt, latest_starts, read_latest, stream_latest
from dpo_cli.data.records import Completions, Judgment, Usage, completions_id
from dpo_cli.data.resumable import Resumable
from dpo_cli.data.same_settings import refuse_other_settings
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.errors import UserError
from dpo_cli.judges._task import Task, make_task
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
    with (
        _open_completions(Path(config.data) / COMPLETIONS) as everything,
        Resumable(path, _Known, _same_judge(identity, path), dry_run=dry_run) as judgments,
    ):
        total = len(everything) if limit is None else min(limit, len(everything))
        tasks, skips = _plan(everything, total, judgments, config)
        before = total - len(tasks) - len(skips)
        result = Judged(
            total=total, done_before=before, owed=len(tasks), calls=judge.calls(tasks, config), path=str(path)
        )
        if dry_run:
            if (estimate := getattr(judge, "estimate", None)) is not None:
                result.estimate = estimate(tasks, config)
            return result
        for skip in skips:
            judgments.deliver(skip)
        if tasks or skips:
            tasks.flagging = True

            def deliver(judgment: Judgment) -> None:
                judgment.judge = identity
                judgment.flags = tasks.flags.pop(judgment.id, {})
                judgments.deliver(judgment)

            with judgments.reporting(progress, "judge", total, len(tasks)) as delivery:
                result.receipt = judge.judge(tasks, config, deliver, delivery)
        fresh = judgments.delivered.copy()
        if (settle := getattr(judge, "settle", None)) is not None and len(config.judge.models) > 1:
            known = read_latest(path, Judgment)
            for judgment in list(settle((_task(row, config) for row in everything), known, config)):
                judgments.deliver(judgment)
    _count(result, path, fresh)
    return result


class _Known(Struct, gc=False):
    """What is kept of a judgment: whether, and of which completions, it is one."""

    id: str
    completions_id: str
    judge: Raw = NOTHING
    error: str | None = None
    skipped: str | None = None
    failures: int = 0


class _Tasks(Sequence[Task]):
    """What the judge must see; each task is made from its line of completions.jsonl when it is looked at.

    `flags` are what is suspicious about the completions of tasks that were looked at, by task and completion; they
    are looked for only while `flagging`, which costs more than to count and to price a task.
    """

    def __init__(self, rows: RowsAt[Completions], config: Config) -> None:
        self.flags: dict[str, dict[int, list[str]]] = {}
        self.flagging = False
        self._rows = rows
        self._config = config
        self._places = array("L")
        self._failures: dict[int, int] = {}  # by place, where there are any

    def append(self, place: int, failures: int) -> None:
        """Add the task of a row; `failures` counts the former runs that ended in an error."""
        self._places.append(place)
        if failures:
            self._failures[place] = failures

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return [self[one] for one in range(len(self))[index]]
        place = self._places[index]
        task = _task(self._rows[place], self._config, self._failures.get(place, 0))
        if self.flagging:
            self._flag(task)
        return task

    def _flag(self, task: Task) -> None:
        from dpo_cli.analysis.prompt_injection import suspicious  # its patterns take 20 ms to compile

        found = {number: why for number, text in enumerate(task.completions) if (why := suspicious(text))}
        if found:
            self.flags[task.id] = found


def _open_completions(path: Path) -> RowsAt[Completions]:
    starts = latest_starts(path) if path.exists() else ()
    if not starts:
        raise UserError("no completions", where=str(path), hint="nothing-dpo generate")
    return RowsAt(path, Completions, starts)


def _plan(
    rows: RowsAt[Completions], total: int, judgments: Resumable[_Known], config: Config
) -> tuple[_Tasks, list[Judgment]]:
    """What the judge must see, and the judgments of prompts that leave it nothing to compare."""
    tasks = _Tasks(rows, config)
    skips: list[Judgment] = []
    for place in range(total):
        row = rows[place]
        old = judgments.known.get(row.id)
        if old is not None and old.completions_id != completions_id(row.completions, row.messages):
            old = None
        if old is not None and old.error is None and old.skipped != TOO_FEW:
            continue
        task = _task(row, config)
        if len(task.shown) > 1:
            tasks.append(place, old.failures if old else 0)
        elif old is None or old.skipped is None:
            skips.append(Judgment(id=row.id, completions_id=task.completions_id, skipped=TOO_FEW))
    return tasks, skips


def _task(row: Completions, config: Config, failures: int = 0) -> Task:
    pattern = _compile(config.generate.keep_lines)
    return make_task(row, lambda text: _in_format(text, pattern), failures)


@cache
def _compile(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"'{pattern}' is no regular expression: {error}", where="generate.keep_lines") from None


def _in_format(text: str, pattern: re.Pattern[str] | None) -> bool:
    return pattern is None or any(pattern.search(line) for line in text.splitlines())


def _same_judge(identity: dict[str, Any], path: Path) -> Callable[[int, _Known], None]:
    """A check of each judgment that refuses another judge's: scores of different judges do not compare."""
    checked: set[bytes] = set()

    def check(number: int, judgment: _Known) -> None:
        made_by, judgment.judge = bytes(judgment.judge), NOTHING  # it is as long as the rest
        if made_by in checked or judgment.error is not None:
            return
        checked.add(made_by)
        then = msgspec.json.decode(made_by) if made_by else {}
        if not isinstance(then, dict):
            raise UserError('"judge" is not an object', where=f"{path}:{number}")
        if not then or then == identity:
            return
        refuse_other_settings(
            "judged",
            then,
            identity,
            where=f"{path}:{number}",
            hint=f"set that back, or copy {COMPLETIONS} to another folder and use --data, or rm {path} to judge anew "
            "(replies that are paid for stay in the ledger)",
            name=lambda key: f"generate.{key}" if key == "keep_lines" else f"judge.{key}",
        )

    return check


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
