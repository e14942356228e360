"""Who ranks the completions: one module a judge, whose name is the value of `--judge`, with hyphens for underscores.

A judge module has the three functions of `Judge`; one that is paid has a fourth, `estimate(tasks, config)`, for what
the tasks would cost, and one whose judgments depend on each other `settle(tasks, judgments, config)`, for those that
must change. A judge that scores each completion by itself says so with `ABSOLUTE = True`; one that can be asked about
one completion in other forms names them in `FORMS`, and takes one as `form`. It is handed tasks, one a prompt, and
builds each `Judgment` with `conclude`, which gives what was never shown its score: a twin that of its like, what is
unusable the lowest.
"""

import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from msgspec import Struct

from dpo_cli.errors import require
from dpo_cli.progress import Progress
from dpo_cli.schema import Completions, Judgment, Message, Order, canonical, completions_id
from dpo_cli.settings import Config

if TYPE_CHECKING:  # the names of engines and judges are wanted for --help, asyncio is not
    from dpo_cli.endpoint import Receipt

EPSILON = 1e-9  # what sums of weighted scores may be off by


class Task(Struct, kw_only=True):
    """One prompt's completions, to be judged.

    `stands` has, for each completion, the index of the one that stands for it: its own, that of an earlier identical
    one, or None if the completion is not usable. `failures` counts the former runs that ended in an error.
    """

    id: str
    completions_id: str
    prompt: list[Message]
    completions: list[str]
    stands: list[int | None]
    failures: int = 0

    @property
    def shown(self) -> list[int]:
        """Indices of the completions that a judge sees: usable, and no two identical."""
        return [index for index, stand in enumerate(self.stands) if stand == index]


class Judge(Protocol):
    """What a judge module offers."""

    def identity(self, config: Config) -> dict[str, Any]:
        """The settings that make a judgment comparable with others; one file holds judgments of one identity."""

    def calls(self, tasks: Sequence[Task], config: Config) -> int:
        """How many paid calls the tasks owe at most."""

    def judge(
        self, tasks: Sequence[Task], config: Config, deliver: Callable[[Judgment], None], progress: Progress
    ) -> "Receipt | None":
        """Judge every task and deliver its judgment as soon as it is there, in any order; return what was paid."""


def names() -> list[str]:
    """Every judge's name."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name.replace("_", "-") for name in found if not name.startswith("_"))


def load(name: str) -> Judge:
    """The judge of a name that `names` lists.

    Raises:
        UserError: it needs an extra that is not installed.
    """
    if name == "reward-model":
        require("train", "--judge reward-model")
    return cast(Judge, import_module(f"{__name__}.{name.replace('-', '_')}"))


def make_task(row: Completions, usable: Callable[[str], bool], failures: int = 0) -> Task:
    """A task for one prompt's completions; identical (see `canonical`) and unusable ones will not be shown."""
    first: dict[str, int] = {}
    stands = [
        first.setdefault(canonical(text), index) if canonical(text) and usable(text) else None
        for index, text in enumerate(row.completions)
    ]
    return Task(
        id=row.id, completions_id=completions_id(row.completions), prompt=row.prompt, completions=row.completions,
        stands=stands, failures=failures,
    )  # fmt: skip


def conclude(
    task: Task,
    scores: dict[int, float],
    tiebreak: dict[int, float] | None = None,
    orders: list[Order] | None = None,
    weights: Mapping[str, float] | None = None,
) -> Judgment:
    """The judgment of a task from the scores of what was shown.

    The ranking goes by score, then by `tiebreak` (higher is better), then by index; what was not usable scores 0, or
    the lowest score given if that is below 0, and ranks last.

    Args:
        task: what was judged.
        scores: index of a shown completion -> score.
        tiebreak: index of a shown completion -> what decides between equal scores.
        orders: what the judge saw and said.
        weights: of a panel's models.
    """
    lowest = min(0.0, *scores.values())
    rank: dict[int | None, tuple[float, float]] = {None: (lowest, -math.inf)}
    rank |= {index: (score, tiebreak[index] if tiebreak else 0.0) for index, score in scores.items()}
    ranking = sorted(range(len(task.stands)), key=lambda index: rank[task.stands[index]], reverse=True)
    shown = [index for index in ranking if task.stands[index] == index]
    orders = orders or []
    return Judgment(
        id=task.id, completions_id=task.completions_id,
        scores=[rank[stand][0] for stand in task.stands], ranking=ranking, orders=orders,
        consistent=not any_inverts(orders, shown[0], shown[-1], weights or {}), weights=dict(weights or {}),
    )  # fmt: skip


def any_inverts(orders: Sequence[Order], better: int, worse: int, weights: Mapping[str, float]) -> bool:
    """Whether any order gave the worse of two completions the higher score.

    A panel's models answer as one: of the same order, the weighted mean counts.

    Args:
        orders: what the judge saw and said.
        better: index of a completion.
        worse: index of a completion.
        weights: model -> weight; empty: equal.
    """
    gaps: dict[tuple[int, ...], float] = {}
    for order in orders:
        scores = {index: order.scores.get(label_of(place)) for place, index in enumerate(order.order)}
        high, low = scores.get(better), scores.get(worse)
        if high is not None and low is not None:
            shown = tuple(order.order)
            gaps[shown] = gaps.get(shown, 0.0) + weights.get(order.model or "", 1.0) * (high - low)
    return any(gap < -EPSILON for gap in gaps.values())


def label_of(place: int) -> str:
    """The label of the candidate shown at a place: A, B, C … Z, AA, AB …"""
    letters = ""
    place += 1
    while place:
        place, digit = divmod(place - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters
