"""Intervals, spreads and histograms, for every room that reports a number with its uncertainty."""

import math
import random
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import NormalDist, fmean

from msgspec import Struct

CONFIDENCE = 0.95


class Interval(Struct, omit_defaults=True):
    """A measured value with the ends of its confidence interval.

    `n` is the number of observations, 0 where it is not known; `count` how many of them were counted, where the value
    is a share; `error` the standard error, where the ends come from one; `confidence` the level.
    """

    value: float
    low: float
    high: float
    n: int = 0
    count: int | None = None
    error: float | None = None
    confidence: float = CONFIDENCE

    def holds(self, number: float) -> bool:
        """Whether a number is within the interval."""
        return self.low <= number <= self.high

    @property
    def z(self) -> float:
        """Distance of a share from one half, in the standard errors of a fair coin."""
        return (self.value - 0.5) / math.sqrt(0.25 / self.n)


def quantile(confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of the normal distribution: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def bootstrap(values: Sequence[float], resamples: int, seed: int, confidence: float = CONFIDENCE) -> Interval:
    """The mean with its percentile bootstrap interval (Efron 1979).

    It knows no spread but that of `values`: if all are equal, it has no width.
    """
    draw = random.Random(seed)
    means = sorted(fmean(draw.choices(values, k=len(values))) for _ in range(resamples))
    outside = int(resamples * (1 - confidence) / 2)
    return Interval(fmean(values), means[outside], means[-1 - outside], n=len(values), confidence=confidence)


def wilson(count: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, doi:10.1080/01621459.1927.10502953); all of it if n is 0.

    A count may have halves: those of ties.
    """
    if n == 0:
        return 0.0, 1.0
    z = quantile(confidence)
    share, shrink = count / n, 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (max(0.0, centre - half) if count else 0.0), (min(1.0, centre + half) if count < n else 1.0)


def student(n: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t for a mean of `n` values, by Cornish and Fisher's expansion.

    Within 2% from five values on; for fewer it is too small.
    """
    z, freedom = quantile(confidence), max(1, n - 1)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def of_mean(value: float, error: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """A mean of `n` values and its standard error as an interval of Student's t."""
    reach = student(n, confidence) * error
    return Interval(value, value - reach, value + reach, n=n, error=error, confidence=confidence)


def normal(value: float, error: float, n: int = 0, confidence: float = CONFIDENCE) -> Interval:
    """A value and its standard error as an interval of the normal distribution."""
    reach = quantile(confidence) * error
    return Interval(value, value - reach, value + reach, n=n, error=error, confidence=confidence)


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


def proportion(count: int, n: int, confidence: float = CONFIDENCE) -> Interval | None:
    """A share with its Wilson score interval; None if n is 0."""
    if n == 0:
        return None
    return Interval(count / n, *wilson(count, n, confidence), n=n, count=count, confidence=confidence)


def count_alike(reasons: Iterable[str | None]) -> dict[str, int]:
    """How often each reason, most frequent first; those that differ in numbers alone go by the first of them."""
    first: dict[str, str] = {}
    counts = Counter(
        first.setdefault(re.sub(r"[0-9a-f]{12,}|\d[\d,.]*", "#", reason), reason) for reason in reasons if reason
    )
    return dict(counts.most_common())
