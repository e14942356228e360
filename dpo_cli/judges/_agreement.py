"""How far two judges agree on the same completions; numbers only, nothing is read or written."""

import math
from collections.abc import Mapping
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


def agree(ours: Mapping[str, Judgment], theirs: Mapping[str, Judgment]) -> Agreement:
    """Compare judgments of the same completions, joined by id and `completions_id`.

    τ-b: Kendall 1945, doi:10.1093/biomet/33.3.239.

    Args:
        ours: judgments by id, with the order in which the candidates were seen: no others are compared.
        theirs: judgments by id.
    """
    prompts = pairs = alike = contrary = our_ties = their_ties = 0
    for key, mine in ours.items():
        other = theirs.get(key)
        if not (mine.scores and mine.orders and other and other.scores):
            continue
        if other.completions_id != mine.completions_id or len(other.scores) != len(mine.scores):
            continue
        prompts += 1
        for one, two in combinations(mine.orders[0].order, 2):
            our_gap = mine.scores[one] - mine.scores[two]
            their_gap = other.scores[one] - other.scores[two]
            pairs += 1
            our_ties += our_gap == 0
            their_ties += their_gap == 0
            alike += our_gap * their_gap > 0
            contrary += our_gap * their_gap < 0
    scale = math.sqrt((pairs - our_ties) * (pairs - their_ties))
    ordered = alike + contrary
    return Agreement(
        prompts=prompts,
        pairs=pairs,
        alike=alike,
        contrary=contrary,
        tau=(alike - contrary) / scale if scale else None,
        share=alike / ordered if ordered else None,
        interval=wilson(alike, ordered),
    )
