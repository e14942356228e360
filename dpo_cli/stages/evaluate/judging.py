"""What the judge says of both adapters' completions: comparisons, and ratings of one completion at a time.

Every verdict is appended to a file of its kind in `evaluation/` under an id that hashes the judge, the prompt and the
texts: nothing is asked twice, and what was said of other texts, or by another judge, is in nobody's way.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from dpo_cli import judges
from dpo_cli.config.settings import Config
from dpo_cli.data.records import Completions, Judgment, Message, Order, Tool, canonical, content_id, said
from dpo_cli.data.resumable import Resumable
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.judges._ranking import label_of
from dpo_cli.judges._task import Task, make_task
from dpo_cli.progress import Progress
from dpo_cli.stages.evaluate.sampling import FOLDER, RunBudget
from dpo_cli.stages.evaluate.win_rate import LengthPoint, win_rate

Ask: TypeAlias = Callable[[Sequence[Task], Config, Callable[[Judgment], None], Progress], Receipt | None]


Scores: TypeAlias = dict[str, list[float]]  # of each completion, by prompt


class Comparison(Struct, kw_only=True):
    """What came of one prompt: of each comparison the share that the policy wins, and the difference in length.

    `orders` are the judge's, one list a comparison, in which completion 0 is the reference's and 1 the policy's.
    """

    points: list[LengthPoint]
    orders: list[list[Order]] = []

    @property
    def win(self) -> float:
        """The mean share that the policy wins."""
        return fmean(won for won, _ in self.points)


class EvaluationJudge:
    """One judge, and what it has said so far.

    Args:
        config: every setting.
        progress: where to report.
        purse: what its calls are paid from.

    `heard` is what it said of the tasks of this run, by id, and `waiting` how many requests are in open batches.
    """

    def __init__(self, config: Config, progress: Progress, purse: RunBudget) -> None:
        folder = Path(config.data) / FOLDER
        self.config = replace(config, data=str(folder))
        self.judge: Any = judges.load(config.judge.judge)
        self.identity = self.judge.identity(config)
        self.progress = progress
        self.purse = purse
        self.heard: dict[str, Judgment] = {}
        self.waiting = 0

    @property
    def absolute(self) -> bool:
        """Whether the judge scores each completion by itself."""
        return getattr(self.judge, "ABSOLUTE", False)

    def can(self, kind: str) -> bool:
        """Whether the judge can `rate` or `grade` a completion by itself."""
        return (self.absolute and kind == "rate") or kind in getattr(self.judge, "FORMS", {})

    def least(self, kind: str) -> int:
        """How many completions a task must show, or there is nothing to ask."""
        return 2 if kind == "compare" else 1

    def task(self, kind: str, prompt: list[Message], texts: list[str], tools: list[Tool] | None = None) -> Task:
        """What the judge is asked; its id depends on all that its answer does."""
        key = content_id(kind, self.identity, prompt, texts, *([tools] if tools else []))
        row = Completions(
            id=key, prompt=prompt, completions=texts, finish_reasons=[], model="", sampling={}, tools=tools
        )
        return make_task(row, lambda text: bool(canonical(text)))

    def owed(self, kind: str, tasks: Iterable[Task]) -> list[Task]:
        """The tasks that have no verdict yet; those with nothing to be judged never have one."""
        return self._missing(kind, tasks, Resumable.read(self._path(kind), Judgment))

    def _missing(self, kind: str, tasks: Iterable[Task], verdicts: Resumable[Judgment]) -> list[Task]:
        showing = {task.id: task for task in tasks if len(task.shown) >= self.least(kind)}
        missing = verdicts.missing(showing, lambda old, _: old.error is None)
        for key, task in missing.items():
            if key in verdicts.known:
                task.failures = verdicts.known[key].failures
        return list(missing.values())

    def ask(self, kind: str, tasks: Sequence[Task]) -> dict[str, Judgment]:
        """The verdicts on these tasks, by id, asking for those that are missing.

        Args:
            kind: `compare`, `rate` or `grade`.
            tasks: made by `task`.

        Raises:
            UserError: what the judge raises.
        """
        ask: Ask = self._in_form(kind, self.judge.judge)
        with Resumable(self._path(kind), Judgment) as verdicts:
            if missing := self._missing(kind, tasks, verdicts):

                def deliver(judgment: Judgment) -> None:
                    judgment.judge = self.identity
                    verdicts.deliver(judgment)

                total = len({task.id for task in tasks})
                with verdicts.reporting(self.progress, kind, total, len(missing)) as delivery:
                    receipt = ask(missing, self._within_budget(), deliver, delivery)
                self.purse.add(receipt)
                self.waiting = receipt.waiting if receipt else 0  # of all open batches: both kinds share their journal
        found = {task.id: verdicts.known[task.id] for task in tasks if task.id in verdicts.known}
        if kind == "compare" and (settle := getattr(self.judge, "settle", None)) is not None:
            each = {task.id: task for task in tasks}.values()
            found |= {row.id: row for row in settle(each, found, self.config)}  # a panel's weights; not kept
        self.heard |= found
        return found

    def estimate(self, kind: str, tasks: Sequence[Task]) -> Estimate | None:
        """What asking them would cost; None where the judge is not paid."""
        estimate = getattr(self.judge, "estimate", None)
        return self._in_form(kind, estimate)(tasks, self.config) if estimate and tasks else None

    def _in_form(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        forms = getattr(self.judge, "FORMS", {})
        return partial(function, form=forms[kind]) if kind in forms else function

    def _within_budget(self) -> Config:
        return replace(self.config, judge=replace(self.config.judge, max_usd=self.purse.left))

    def _path(self, kind: str) -> Path:
        return Path(self.config.data) / f"{kind}.jsonl"


def comparison_tasks(bench: EvaluationJudge, reference: Completions, policy: Completions) -> list[Task]:
    """The comparisons of one prompt, sample by sample."""
    both = zip(map(said, reference.answers), map(said, policy.answers), strict=False)
    return [bench.task("compare", reference.prompt, [*texts], reference.tools) for texts in both]


def rating_tasks(bench: EvaluationJudge, row: Completions) -> list[Task]:
    """One task a completion."""
    return [bench.task("rate", row.prompt, [said(answer)], row.tools) for answer in row.answers]


def compare(
    bench: EvaluationJudge, reference: Mapping[str, Completions], policy: Mapping[str, Completions]
) -> dict[str, Comparison]:
    """What the judge prefers, by prompt; without those of which a comparison has no verdict.

    What need not be judged is not: identical texts tie.

    Raises:
        UserError: what the judge raises.
    """
    tasks = {key: comparison_tasks(bench, row, policy[key]) for key, row in reference.items() if key in policy}
    verdicts = bench.ask("compare", [task for own in tasks.values() for task in own])
    found = {}
    for key, own in tasks.items():
        points: list[LengthPoint] = []
        orders: list[list[Order]] = []
        for task in own:
            judgment = verdicts.get(task.id)
            if None in task.stands:
                break
            if len(task.shown) < bench.least("compare"):
                won = 0.5
            elif judgment is None or not judgment.scores:
                break
            else:
                won = _won(judgment)
            points.append((won, _longer(*task.completions)))
            orders.append((judgment.orders if judgment else None) or [])
        else:
            found[key] = Comparison(points=points, orders=orders)
    return found


def compare_scores(
    reference: Mapping[str, Completions], policy: Mapping[str, Completions], ours: Scores, theirs: Scores
) -> dict[str, Comparison]:
    """Comparisons from scores that each completion has by itself: every one of the reference's with every policy's.

    Args:
        reference: completions by prompt.
        policy: completions by prompt.
        ours: the scores of the reference's.
        theirs: the scores of the policy's.
    """
    found = {}
    for key in filter(theirs.__contains__, ours):
        sides = [
            list(zip(scores[key], rows[key].completions, strict=True))
            for scores, rows in ((ours, reference), (theirs, policy))
        ]
        points = [
            (win_rate([before], [after]), _longer(old, new)) for before, old in sides[0] for after, new in sides[1]
        ]
        found[key] = Comparison(points=points)
    return found


def rate_all(bench: EvaluationJudge, *sides: Mapping[str, Completions]) -> list[Scores]:
    """How the judge rates each completion by itself, for each side; without prompts of which one has no rating.

    Raises:
        UserError: what the judge raises.
    """
    verdicts = bench.ask("rate", [task for rows in sides for row in rows.values() for task in rating_tasks(bench, row)])
    given = {key: one.scores[0] for key, one in verdicts.items() if one.scores}
    found: list[Scores] = []
    for rows in sides:
        scores: Scores = {}
        for key, row in rows.items():
            tasks = rating_tasks(bench, row)
            if all(task.id in given for task in tasks):
                scores[key] = [given[task.id] for task in tasks]
        found.append(scores)
    return found


def reasons(given: Iterable[str | None]) -> dict[str, int]:
    """How often each reason; what follows a colon is somebody's own words, and different each time."""
    return dict(Counter(reason.partition(":")[0] for reason in given if reason))


def _longer(before: str, after: str) -> float:
    return float(len(after) - len(before))


def _won(judgment: Judgment) -> float:
    """The share of the orders in which the policy is preferred, a tie counted half.

    A judge that contradicts itself when the order is reversed gives each side a half, as in MT-Bench
    (arXiv:2306.05685); a panel's models weigh as they agree.
    """
    total = whole = 0.0
    for order in judgment.orders or []:
        weight = judgment.weights.get(order.model or "", 1.0)
        by_index = {index: order.scores[label_of(place)] for place, index in enumerate(order.order)}
        total += weight * win_rate([by_index[0]], [by_index[1]])
        whole += weight
    return total / whole if whole else 0.5
