"""From scores to a ranking: what every judge builds its `Judgment` with."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

from dpo_cli.data.records import Judgment, Order
from dpo_cli.judges._task import Task

EACH = 3  # orders of which each must agree; of eight noisy ones, most pairs would be inverted by some
EPSILON = 1e-9  # what sums of weighted scores may be off by


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
        id=task.id,
        completions_id=task.completions_id,
        scores=[rank[stand][0] for stand in task.stands],
        ranking=ranking,
        orders=orders,
        consistent=not any_inverts(orders, shown[0], shown[-1], weights or {}),
        weights=dict(weights or {}),
    )


def any_inverts(orders: Sequence[Order], better: int, worse: int, weights: Mapping[str, float]) -> bool:
    """Whether the orders contradict each other on which of two completions is the better one.

    Of up to `EACH` different orders, any that gives the worse one the higher score inverts the pair. Of more, some do
    so by chance: there the orders that show the better one first count together, and those that show it later. A
    panel's models answer as one: of the same order, the weighted mean counts.

    Args:
        orders: what the judge saw and said.
        better: index of a completion.
        worse: index of a completion.
        weights: model -> weight; empty: equal.
    """
    gaps: dict[tuple[int, ...], float] = defaultdict(float)
    for order in orders:
        scores = {index: order.scores.get(label_of(place)) for place, index in enumerate(order.order)}
        high, low = scores.get(better), scores.get(worse)
        if high is not None and low is not None:
            gaps[tuple(order.order)] += weights.get(order.model or "", 1.0) * (high - low)
    if len(gaps) > EACH:
        halves: dict[bool, float] = defaultdict(float)
        for shown, gap in gaps.items():
            halves[shown.index(better) < shown.index(worse)] += gap
        return any(gap < -EPSILON for gap in halves.values())
    return any(gap < -EPSILON for gap in gaps.values())


@cache
def label_of(place: int) -> str:
    """The label of the candidate shown at a place: A, B, C … Z, AA, AB …"""
    letters = ""
    place += 1
    while place:
        place, digit = divmod(place - 1, 26)
        letters = chr(ord("A") + digit) + letters
    return letters
