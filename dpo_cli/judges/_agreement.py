"""How far two judges agree on the same completions; numbers only, nothing is read or written."""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

from msgspec import Struct

from dpo_cli.data.records import Judgment
from dpo_cli.statistics import wilson


class Agreement(Struct):
    """Two judges on the pairs of candidates that both scored, pairs within a prompt only.

    `tau` is Kendall's τ-b over all pairs, None where a judge tied every one. `share` of the `alike + contrary` pairs
    that neither tied are ordered alike; `interval` is its 95% Wilson interval, a little narrow, since the pairs of one
    prompt are not independent.
    """

    prompts: int
    pairs: int
    alike: int
    contrary: int
    tau: float | None
    share: float | None
    interval: tuple[float, float]

    def __str__(self) -> str:
        if not self.pairs:
            return "no prompt that both judged"
        words = f"τ-b {'–' if self.tau is None else format(self.tau, '.2f')}"
        ordered = self.alike + self.contrary
        if self.share is not None:
            low, high = self.interval
            words += f", {self.alike} of {ordered} pairs alike, {self.share:.0%} ({low:.0%}–{high:.0%})"
        return f"{words}; tied by either: {self.pairs - ordered}; prompts: {self.prompts}"


class PairCounter:
    """Counts how two judges order the same pairs of candidates, prompt after prompt."""

    def __init__(self) -> None:
        self.pairs = self.alike = self.contrary = 0
        self._our_ties = self._their_ties = 0

    def add(self, ours: Sequence[float], theirs: Sequence[float], places: Iterable[int]) -> None:
        """Take in a prompt: the scores of its candidates, and which of them count."""
        for one, two in combinations(places, 2):
            our_gap = ours[one] - ours[two]
            their_gap = theirs[one] - theirs[two]
            self.pairs += 1
            self._our_ties += our_gap == 0
            self._their_ties += their_gap == 0
            self.alike += our_gap * their_gap > 0
            self.contrary += our_gap * their_gap < 0

    @property
    def tau(self) -> float | None:
        """Kendall's τ-b (1945, doi:10.1093/biomet/33.3.239); None where a judge tied every pair."""
        scale = math.sqrt((self.pairs - self._our_ties) * (self.pairs - self._their_ties))
        return (self.alike - self.contrary) / scale if scale else None


def agree(ours: Mapping[str, Judgment], theirs: Mapping[str, Judgment]) -> Agreement:
    """Compare judgments of the same completions, joined by id and `completions_id`.

    Args:
        ours: judgments by id, with the order in which the candidates were seen: no others are compared.
        theirs: judgments by id.
    """
    prompts, found = 0, PairCounter()
    for key, mine in ours.items():
        other = theirs.get(key)
        if not (mine.scores and mine.orders and other and other.scores):
            continue
        if other.completions_id != mine.completions_id or len(other.scores) != len(mine.scores):
            continue
        prompts += 1
        found.add(mine.scores, other.scores, mine.orders[0].order)
    ordered = found.alike + found.contrary
    return Agreement(
        prompts=prompts,
        pairs=found.pairs,
        alike=found.alike,
        contrary=found.contrary,
        tau=found.tau,
        share=found.alike / ordered if ordered else None,
        interval=wilson(found.alike, ordered),
    )
