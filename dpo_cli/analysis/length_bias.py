"""How much of a score is length: the slope within prompts, and judgments without it.

Length is in characters of the completion as it stands. The slope is taken within prompts: a prompt that asks for long
answers, or that is judged mildly as a whole, has no part in it. Only what is linear in length is removed, as in
length-controlled AlpacaEval (arXiv:2404.04475), whose regression is over win or loss and is here over scores. Not
covered: that longer can be better; a slope does not tell taste for length from length that is earned.
"""

import math
from array import array
from collections.abc import Mapping, Sequence
from operator import mul

import msgspec
from msgspec import Struct

from dpo_cli.data.records import Completions, Judgment, Order, canonical, completions_id
from dpo_cli.judges._ranking import any_inverts, label_of

UNIT = 100  # characters; what one point of a slope is for

# Completion -> (its length in units, its score), both less their means over the completions of the prompt.
Deviations = dict[int, tuple[float, float]]


class Slope(Struct):
    """Points per 100 characters, with its standard error, from `n` completions of `prompts` prompts."""

    value: float
    error: float
    n: int
    prompts: int


class Points:
    """Deviations of many prompts, as numbers alone."""

    def __init__(self) -> None:
        self._lengths = array("d")
        self._scores = array("d")
        self._prompts = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def add(self, found: Deviations) -> None:
        """Take in those of a prompt, if it has any."""
        self._prompts += bool(found)
        for length, score in found.values():
            self._lengths.append(length)
            self._scores.append(score)

    def some(self, step: int) -> list[tuple[float, float]]:
        """Every `step`-th of them, from the first on."""
        return list(zip(self._lengths[::step], self._scores[::step], strict=True))

    def slope(self) -> Slope | None:
        """Least squares of score on length with an intercept for each prompt (the within, or fixed-effects, estimator).

        With x and y the deviations from the prompt's means: slope = Σxy / Σx², and its variance is
        Σ(y − slope·x)² / df / Σx², where df = completions − prompts − 1. None where lengths don't differ, or too few
        completions leave no df.
        """
        xx = sum(map(mul, self._lengths, self._lengths))
        xy = sum(map(mul, self._lengths, self._scores))
        yy = sum(map(mul, self._scores, self._scores))
        free = len(self) - self._prompts - 1
        if xx == 0 or free < 1:
            return None
        value = xy / xx
        return Slope(value, math.sqrt(max(0.0, yy - value * xy) / free / xx), len(self), self._prompts)


def deviations(judgment: Judgment, row: Completions | None) -> Deviations:
    """Those of a prompt; none if the judgment is not of these completions, or scored fewer than two of them."""
    scores = judgment.scores
    if row is None or not scores or judgment.completions_id != completions_id(row.completions, row.messages):
        return {}
    if len(scores) != len(row.completions) or sorted(judgment.ranking or []) != list(range(len(scores))):
        return {}
    seen = _seen(judgment, row.completions)
    if len(seen) < 2:
        return {}
    length = sum([len(row.completions[index]) for index in seen]) / len(seen)
    score = sum([scores[index] for index in seen]) / len(seen)
    return {index: ((len(row.completions[index]) - length) / UNIT, scores[index] - score) for index in seen}


def rescored(found: Deviations, scores: Sequence[float]) -> Deviations:
    """The deviations of a prompt under other scores of the same completions."""
    score = sum([scores[index] for index in found]) / len(found)
    return {index: (length, scores[index] - score) for index, (length, _) in found.items()}


def _seen(judgment: Judgment, texts: Sequence[str]) -> list[int]:
    """Indices of what the judge scored, each text once."""
    if judgment.orders:
        return sorted({index for order in judgment.orders for index in order.order if index < len(texts)})
    first = {canonical(text): index for index, text in reversed(list(enumerate(texts)))}
    return sorted(index for text, index in first.items() if text)


def without_length(judgment: Judgment, row: Completions, slope: float) -> Judgment:
    """A judgment with length's linear effect removed from every score, and ranked again.

        score' = score − slope · (length − mean length of the prompt's completions)

    The scores of each order move as the mean does, so that an order inverts a pair only by what length does not
    explain. What is equal keeps its old rank; a twin has the score of its like; what the judge never saw stays the
    lowest. The mean score of a prompt does not change. A judgment without deviations stays as it is.
    """
    found = deviations(judgment, row)
    return controlled(judgment, row.completions, found, slope) if found else judgment


def controlled(judgment: Judgment, texts: Sequence[str], found: Deviations, slope: float) -> Judgment:
    """`without_length` of a judgment whose deviations are known."""
    given, old = judgment.scores or [], judgment.ranking or []
    shift = {index: -slope * length for index, (length, _) in found.items()}
    by_text = {canonical(texts[index]): given[index] + by for index, by in shift.items()}
    lowest = min(by_text.values())
    scores = [by_text.get(canonical(text), min(lowest, score)) for text, score in zip(texts, given, strict=True)]
    ranking = sorted(old, key=lambda index: -scores[index])
    orders = [_shifted(order, shift) for order in judgment.orders or []]
    seen = [index for index in ranking if index in shift]
    consistent = not any_inverts(orders, seen[0], seen[-1], judgment.weights) if orders else judgment.consistent
    return msgspec.structs.replace(
        judgment, scores=scores, ranking=ranking, consistent=consistent, orders=orders or judgment.orders
    )


def _shifted(order: Order, shift: Mapping[int, float]) -> Order:
    by_label = {label_of(place): shift.get(index, 0.0) for place, index in enumerate(order.order)}
    scores = {label: score + by_label.get(label, 0.0) for label, score in order.scores.items()}
    return msgspec.structs.replace(order, scores=scores)
