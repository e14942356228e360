"""Intervals, spreads and histograms, for every room that reports a number with its uncertainty."""

import math
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from msgspec import Struct

CONFIDENCE = 0.95


class Interval(Struct):
    """A number and its 95% interval."""

    value: float
    low: float
    high: float


class Effect(Interval):
    """A number with its 95% interval and standard error, from `n` observations."""

    error: float
    n: int


def bootstrap(values: Sequence[float], resamples: int, seed: int) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979).

    It knows no spread but that of `values`: if all are equal, it has no width.
    """
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    outside = int(resamples * (1 - CONFIDENCE) / 2)
    return Interval(fmean(values), means[outside], means[-1 - outside])


Z95 = 1.959963984540054  # two-sided 95% quantile of the normal distribution


def wilson(count: int, n: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953); all of it if n is 0."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = count / n, 1 + Z95**2 / n
    centre = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, centre - half), min(1.0, centre + half)


BINS = 10


class Spread(Struct):
    """Where a set of numbers lies."""

    n: int
    min: float
    median: float
    mean: float
    max: float


class Histogram(Struct):
    """Counts from one edge up to, and without, the next; `edges` has one element more than `counts`.

    `whole` says that the values are whole numbers and each bin is one of them.
    """

    edges: list[float]
    counts: list[int]
    whole: bool = False

    @property
    def labels(self) -> list[str]:
        """What each bin holds, in words."""
        names = [f"{edge:,.6g}" for edge in self.edges]
        return names[:-1] if self.whole else [f"{low} – {high}" for low, high in pairwise(names)]


class Proportion(Struct):
    """A share with its 95% Wilson interval; `z` is the distance from one half in standard errors."""

    count: int
    n: int
    share: float
    low: float
    high: float
    z: float


def spread(values: Sequence[float]) -> Spread | None:
    """Where numbers lie; None if there are none."""
    if not len(values):
        return None
    return Spread(len(values), min(values), statistics.median(values), statistics.fmean(values), max(values))


def histogram(values: Sequence[float]) -> Histogram | None:
    """Counts in at most ten or so bins whose width is 1, 2 or 5 times a power of ten; None if there are no numbers."""
    if not len(values):
        return None
    low, high = min(values), max(values)
    # Gaps of scores are whole or half numbers; finer bins would stand empty between them.
    grain = next((grain for grain in (1.0, 0.5) if all(value % grain == 0 for value in values)), 0.0)
    width = max(grain, _round_width((high - low) / BINS))
    first = math.floor(low / width)
    counts = [0] * (math.floor(high / width) - first + 1)
    for value in values:
        counts[math.floor(value / width) - first] += 1
    return Histogram([(first + i) * width for i in range(len(counts) + 1)], counts, whole=grain == width == 1)


def _round_width(least: float) -> float:
    if least == 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)


def proportion(count: int, n: int) -> Proportion | None:
    """A share with its Wilson score interval; None if n is 0."""
    if n == 0:
        return None
    share = count / n
    return Proportion(count, n, share, *wilson(count, n), (share - 0.5) / math.sqrt(0.25 / n))
