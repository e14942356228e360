"""Completions to judgments: reads completions.jsonl, has a judge rank them, writes judgments.jsonl.

A prompt is judged once: what was judged stays, unless its completions changed; errors are tried again. One file holds
judgments of one judge. Identical completions are judged once, unusable ones (empty, or without a line in the format
that `generate.keep_lines` asks for) never. Making pairs is `pair`'s work.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from dpo_cli import judges
from dpo_cli.analysis.prompt_injection import suspicious
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import read_latest
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
    everything = _read_completions(Path(config.data) / COMPLETIONS)
    rows = everything[:limit]
    judge = judges.load(config.judge.judge)
    identity = judge.identity(config)
    if config.generate.keep_lines:
        identity["keep_lines"] = config.generate.keep_lines
    with Resumable(path, Judgment, _same_judge(identity, path), dry_run=dry_run) as judgments:
        tasks, skips = _plan(rows, judgments, config)
        before = len(rows) - len(tasks) - len(skips)
        result = Judged(
            total=len(rows), done_before=before, owed=len(tasks), calls=judge.calls(tasks, config), path=str(path)
        )
        if dry_run:
            if (estimate := getattr(judge, "estimate", None)) is not None:
                result.estimate = estimate(tasks, config)
            return result
        for skip in skips:
            judgments.deliver(skip)
        if tasks or skips:
            flags = {task.id: _flags(task) for task in tasks}

            def deliver(judgment: Judgment) -> None:
                judgment.judge = identity
                judgment.flags = flags.get(judgment.id, {})
                judgments.deliver(judgment)

            with judgments.reporting(progress, "judge", len(rows), len(tasks)) as delivery:
                result.receipt = judge.judge(tasks, config, deliver, delivery)
        fresh = judgments.delivered.copy()
        if (settle := getattr(judge, "settle", None)) is not None:
            for judgment in list(settle((_task(row, config) for row in everything), judgments.known, config)):
                judgments.deliver(judgment)
        _count(result, [judgments.known[key] for key in fresh], judgments.known.values())
    return result


def _read_completions(path: Path) -> list[Completions]:
    rows = list(read_latest(path, Completions).values())
    if not rows:
        raise UserError("no completions", where=str(path), hint="nothing-dpo generate")
    return rows


def _plan(
    rows: Iterable[Completions], judgments: Resumable[Judgment], config: Config
) -> tuple[list[Task], list[Judgment]]:
    """What the judge must see, and the judgments of prompts that leave it nothing to compare."""

    def settles(old: Judgment, row: Completions) -> bool:
        return _same_texts(old, row) and old.error is None and old.skipped != TOO_FEW

    tasks: list[Task] = []
    skips: list[Judgment] = []
    for row in judgments.missing({row.id: row for row in rows}, settles).values():
        old = judgments.known.get(row.id)
        if old is not None and not _same_texts(old, row):
            old = None
        task = _task(row, config, old.failures if old else 0)
        if len(task.shown) > 1:
            tasks.append(task)
        elif old is None or old.skipped is None:
            skips.append(Judgment(id=row.id, completions_id=task.completions_id, skipped=TOO_FEW))
    return tasks, skips


def _same_texts(judgment: Judgment, row: Completions) -> bool:
    return judgment.completions_id == completions_id(row.completions, row.messages)


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


def _flags(task: Task) -> dict[int, list[str]]:
    """What is suspicious about each completion of which anything is."""
    return {index: found for index, text in enumerate(task.completions) if (found := suspicious(text))}


def _same_judge(identity: dict[str, Any], path: Path) -> Callable[[int, Judgment], None]:
    """A check of each judgment that refuses another judge's: scores of different judges do not compare."""

    def check(number: int, judgment: Judgment) -> None:
        if not judgment.judge or judgment.judge == identity or judgment.error is not None:
            return
        refuse_other_settings(
            "judged",
            judgment.judge,
            identity,
            where=f"{path}:{number}",
            hint=f"set that back, or copy {COMPLETIONS} to another folder and use --data, or rm {path} to judge anew "
            "(replies that are paid for stay in the ledger)",
            name=lambda key: f"generate.{key}" if key == "keep_lines" else f"judge.{key}",
        )

    return check


def _count(result: Judged, fresh: list[Judgment], everything: Collection[Judgment]) -> None:
    scored = [judgment for judgment in fresh if judgment.scores is not None]
    result.judged = len(scored)
    result.consistent = sum(judgment.consistent is True for judgment in scored)
    # What follows a colon is the judge's or the endpoint's own words, and different each time.
    result.skipped = dict(Counter(row.skipped.partition(":")[0] for row in fresh if row.skipped))
    result.errors = count_alike(row.error for row in fresh)
    result.weights = next((row.weights for row in everything if row.weights), {})
    result.usage = sum((row.usage for row in everything), Usage())
    result.usd = sum(row.usd for row in everything)
