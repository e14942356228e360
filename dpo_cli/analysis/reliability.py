"""How alike several ratings of the same completions are: Krippendorff's α, Kendall's τ-b, and flips. Pure numbers."""

from array import array
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from msgspec import Struct

from dpo_cli.judges._agreement import PairCounter
from dpo_cli.statistics import Interval, proportion

RELIABLE, TENTATIVE = 0.8, 0.667  # thresholds of α: Krippendorff, "Content Analysis" (2004), p. 241

# Completion -> score, of one reply of a judge.
ScoreByIndex = dict[int, float]


class Reliability(Struct):
    """How alike several ratings of the same completions are.

    `flips` is the share of the candidate pairs whose order two ratings of a prompt invert; `tau` is Kendall's τ-b over
    all those pairs; `alpha` is Krippendorff's α, interval metric, with the completions as units.
    """

    flips: Interval | None
    tau: float | None
    alpha: float | None


class Ratings:
    """Compares the ratings of each prompt, completion -> score, with each other; a completion may be missing."""

    def __init__(self) -> None:
        self.prompts = 0
        self._pairs = PairCounter()
        self._units = Units()

    def add(self, of_prompt: Sequence[ScoreByIndex]) -> None:
        """Take in a prompt."""
        self.prompts += 1
        for one, two in combinations(of_prompt, 2):
            common = sorted(one.keys() & two.keys())
            self._pairs.add([one[index] for index in common], [two[index] for index in common], range(len(common)))
        for index in sorted({index for rating in of_prompt for index in rating}):
            self._units.add([rating[index] for rating in of_prompt if index in rating])

    def result(self) -> Reliability:
        """How alike they are."""
        flips = proportion(self._pairs.contrary, self._pairs.pairs)
        return Reliability(flips, self._pairs.tau, self._units.alpha())


class Units:
    """The values that units were given, by whatever raters; a unit with one value pairs with nothing."""

    def __init__(self) -> None:
        self._values = array("d")
        self._observed = array("d")

    def add(self, unit: Sequence[float]) -> None:
        """Take in a unit."""
        if len(unit) > 1:
            self._values.extend(unit)
            self._observed.append(scatter(unit) * len(unit) / (len(unit) - 1))

    def alpha(self) -> float | None:
        """Krippendorff's α with the interval metric (2011, "Computing Krippendorff's Alpha-Reliability").

        α = 1 − observed / expected disagreement. With the squared difference as metric, the sum over ordered pairs of
        m values is 2m times their scatter around the mean, so no matrix of coincidences is needed. 1 where all agree, 0
        for chance; None if no two values differ.
        """
        values = self._values
        expected = scatter(values) * len(values) / (len(values) - 1) if values else 0.0
        return None if expected == 0 else 1 - sum(self._observed) / expected


def verdict(alpha: float) -> str:
    """What Krippendorff would conclude from an α."""
    return "reliable" if alpha >= RELIABLE else "tentative" if alpha >= TENTATIVE else "unreliable"


def scatter(values: Sequence[float]) -> float:
    """The sum of the squared distances from the mean."""
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)
