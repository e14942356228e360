"""How much of a score is length: the slope within prompts, and judgments without it.

Length is in characters of the completion as it stands. The slope is taken within prompts: a prompt that asks for long
answers, or that is judged mildly as a whole, has no part in it. Only what is linear in length is removed, as in
length-controlled AlpacaEval (arXiv:2404.04475), whose regression is over win or loss and is here over scores. Not
covered: that longer can be better; a slope does not tell taste for length from length that is earned.
"""

import math
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from dpo_cli.judges import inverts, label_of
from dpo_cli.schema import Completions, Judgment, Order, canonical, completions_id

UNIT = 100  # characters; what one point of a slope is for


class Slope(Struct):
    """Points per 100 characters, with its standard error, from `n` completions of `prompts` prompts."""

    value: float
    error: float
    n: int
    prompts: int


def shown(judgment: Judgment, row: Completions | None) -> list[int]:
    """Indices of the completions that the judge scored, each text once; none if the judgment is not of this row."""
    if row is None or not judgment.scores or judgment.completions_id != completions_id(row.completions):
        return []
    everything = range(len(row.completions))
    if len(judgment.scores) != len(everything) or sorted(judgment.ranking or []) != list(everything):
        return []
    if judgment.orders:
        return sorted({index for order in judgment.orders for index in order.order if index in everything})
    first = {canonical(text): index for index, text in reversed(list(enumerate(row.completions)))}
    return sorted(index for text, index in first.items() if text)


def deviations(judgment: Judgment, row: Completions | None) -> dict[int, tuple[float, float]]:
    """Completion -> (its length, its score), both less their means over the prompt; the length in 100 characters."""
    seen = shown(judgment, row)
    if row is None or judgment.scores is None or len(seen) < 2:
        return {}
    length = sum(len(row.completions[index]) for index in seen) / len(seen)
    score = sum(judgment.scores[index] for index in seen) / len(seen)
    return {
        index: ((len(row.completions[index]) - length) / UNIT, judgment.scores[index] - score) for index in seen
    }  # fmt: skip


def length_slope(judgments: Mapping[str, Judgment], completions: Mapping[str, Completions]) -> Slope | None:
    """Least squares of score on length with an intercept for each prompt (the within, or fixed-effects, estimator).

    With x and y less their means over the prompt: slope = Σxy / Σx², and its variance is Σ(y − slope·x)² / df / Σx²,
    where df = completions − prompts − 1. None where lengths don't differ, or too few completions leave no df.
    """
    prompts = n = 0
    xx = xy = yy = 0.0
    for key, judgment in judgments.items():
        found = deviations(judgment, completions.get(key))
        prompts += bool(found)
        n += len(found)
        for x, y in found.values():
            xx, xy, yy = xx + x * x, xy + x * y, yy + y * y
    free = n - prompts - 1
    if xx == 0 or free < 1:
        return None
    value = xy / xx
    return Slope(value, math.sqrt(max(0.0, yy - value * xy) / free / xx), n, prompts)


def length_controlled(
    judgments: Mapping[str, Judgment], completions: Mapping[str, Completions]
) -> Mapping[str, Judgment]:
    """The judgments with length's linear effect removed from every score, and ranked again.

        score' = score − slope · (length − mean length of the prompt's completions)

    The slope is that of all judgments (`length_slope`). The scores of each order move as the mean does, so that an
    order inverts a pair only by what length does not explain. What is equal keeps its old rank; a twin has the score
    of its like; what the judge never saw stays the lowest. The mean score of a prompt does not change.
    """
    slope = length_slope(judgments, completions)
    if slope is None:
        return judgments
    return {key: _controlled(judgment, completions.get(key), slope.value) for key, judgment in judgments.items()}


def _controlled(judgment: Judgment, row: Completions | None, slope: float) -> Judgment:
    shift = {index: -slope * length for index, (length, _) in deviations(judgment, row).items()}
    if row is None or judgment.scores is None or judgment.ranking is None or not shift:
        return judgment
    by_text = {canonical(row.completions[index]): judgment.scores[index] + by for index, by in shift.items()}
    lowest = min(by_text.values())
    scores = [
        by_text.get(canonical(text), min(lowest, score))
        for text, score in zip(row.completions, judgment.scores, strict=True)
    ]
    ranking = sorted(judgment.ranking, key=lambda index: -scores[index])
    orders = [_shifted(order, shift) for order in judgment.orders or []]
    seen = [index for index in ranking if index in shift]
    consistent = not any(inverts(order, seen[0], seen[-1]) for order in orders) if orders else judgment.consistent
    return msgspec.structs.replace(
        judgment, scores=scores, ranking=ranking, consistent=consistent, orders=orders if orders else judgment.orders
    )


def _shifted(order: Order, shift: Mapping[int, float]) -> Order:
    by_label = {label_of(place): shift.get(index, 0.0) for place, index in enumerate(order.order)}
    scores = {label: score + by_label.get(label, 0.0) for label, score in order.scores.items()}
    return msgspec.structs.replace(order, scores=scores)
