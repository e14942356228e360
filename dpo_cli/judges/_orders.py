"""In which orders a judge is shown the candidates, and what it said over all of them; pure functions.

Permuted orders: arXiv:2406.07791, 2603.20562. The mean of the scores: arXiv:2503.03064.
"""

from collections.abc import Sequence

from msgspec import Struct

from dpo_cli.config.settings import JudgeSection, Orders
from dpo_cli.data.records import Order, content_id
from dpo_cli.judges._forms import Verdict
from dpo_cli.judges._ranking import conclude, label_of
from dpo_cli.judges._task import Task

MOST = 8  # orders of one prompt, whatever the number of candidates


class Vote(Struct, frozen=True):
    """One order in which a judge is asked, and how often it was asked in the same order before."""

    order: list[int]
    repeat: int = 0


class OrderVerdict(Struct):
    """A verdict: the order and its scores, and completion indices, best first.

    `ranked`: the judge ranked equal scores as well; else they share their places.
    """

    order: Order
    best_first: list[int]
    ranked: bool = True


def cyclic_orders(task: Task, orders: Orders, seed: int) -> list[list[int]]:
    """Orders of what is shown: a seeded random one and cyclic shifts of it, evenly spread; never one twice.

    Args:
        task: what is judged.
        orders: how many at most; `full`: every shift, up to `MOST`; `auto`: those of 2, and a third in reserve.
        seed: of the first order.
    """
    base = sorted(task.shown, key=lambda index: content_id(seed, task.id, index))
    size = len(base)
    count, reserve = _cyclic(size, orders)
    shifts = [turn * size // count for turn in range(count)]
    if reserve:
        shifts.append((shifts[1] + size) // 2)
    return [base[shift:] + base[:shift] for shift in shifts]


def _cyclic(size: int, orders: Orders) -> tuple[int, bool]:
    """How many cyclic orders of so many completions are asked, and whether there is one in reserve."""
    count = min(size, MOST if orders == "full" else 2 if orders == "auto" else orders)
    return count, orders == "auto" and size > 2


def plan_votes(task: Task, settings: JudgeSection) -> list[Vote]:
    """The votes that are asked of each model.

    Without `judge.votes`, the orders of `judge.orders`. With it, that many: cyclic shifts, evenly spread while they
    last; then their reversals, in which what stood before another stands behind it; then the same orders again.
    """
    if settings.votes is None:
        return [Vote(order) for order in cyclic_orders(task, settings.orders, settings.seed)]
    shifts = cyclic_orders(task, min(settings.votes, len(task.shown)), settings.seed)
    reversals = [order[::-1] for order in shifts]
    distinct = shifts + [order for order in reversals if order not in shifts]
    return [Vote(distinct[asked % len(distinct)], asked // len(distinct)) for asked in range(settings.votes)]


def count_votes(shown: int, settings: JudgeSection) -> int:
    """How many votes `plan_votes` plans for a task that shows so many completions."""
    if settings.votes is not None:
        return settings.votes
    count, more = _cyclic(shown, settings.orders)
    return count + more


def is_enough(task: Task, settings: JudgeSection, asked: int, verdicts: Sequence[OrderVerdict]) -> bool:
    """Whether no further vote need be asked: with `judge.orders` `auto`, after two that do not conflict.

    They conflict where one of them inverts the best and the worst of their mean; as long as one of the two is without
    a verdict, nothing calls for a third.
    """
    if settings.orders != "auto" or settings.votes is not None or asked < 2:
        return False
    return len(verdicts) < 2 or conclude(task, *aggregate(verdicts), [one.order for one in verdicts]).consistent is True


def order_verdict(order: Order, verdict: Verdict) -> OrderVerdict:
    """What a verdict says of the completions that were shown in an order."""
    return OrderVerdict(order, preference(order.order, verdict), ranked=bool(verdict.ranking))


def preference(order: list[int], verdict: Verdict) -> list[int]:
    """Completion indices, best first: by score, and by the judge's ranking only between equal scores.

    A ranking that contradicts its scores is so overruled; it stays in the record, as the judge wrote it.
    """
    index_of = {label_of(place): index for place, index in enumerate(order)}
    labels = sorted(verdict.ranking or verdict.scores, key=lambda label: -verdict.scores[label])
    return [index_of[label] for label in labels]


def aggregate(verdicts: Sequence[OrderVerdict]) -> tuple[dict[int, float], dict[int, float]]:
    """Mean score and mean Borda points (the number of candidates beaten in an order) of each completion."""
    total = dict.fromkeys(sorted(verdicts[0].best_first), 0.0)
    borda = dict(total)
    for one in verdicts:
        scores = {index: one.order.scores[label_of(place)] for place, index in enumerate(one.order.order)}
        points = {index: len(one.best_first) - 1.0 - place for place, index in enumerate(one.best_first)}
        for index, score in scores.items():
            equals = [points[other] for other in scores if scores[other] == score]
            total[index] += score
            borda[index] += points[index] if one.ranked else sum(equals) / len(equals)
    count = len(verdicts)  # dividing the sum, so that thirds break no tie
    return {index: score / count for index, score in total.items()}, {key: sum_ / count for key, sum_ in borda.items()}
