"""High scores against low ones, also of different prompts: which of many sides are paired, by their numbers alone.

A side is a place in `rewards` and `prompts`; what it says is asked for only where it is drawn. Reads and writes
nothing.
"""

import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from dpo_cli.config.settings import PairSection

EPSILON = 1e-9  # 0.9 - 0.7 is 0.20000000000000007, and 0.7 - 0.5 is 0.19999999999999996


def is_wide(gap: float, min_gap: float) -> bool:
    """Whether two sides are far enough apart: a tie teaches nothing, whatever the least gap."""
    return gap > EPSILON and gap >= min_gap - EPSILON


def stratified_scores(
    scores: Sequence[float], prompts: Sequence[int], said: Sequence[int], settings: PairSection, min_gap: float
) -> list[tuple[int, int]]:
    """`stratified_places` of scores on any scale: its thresholds are shares of their range.

    Args:
        scores: of each side.
        prompts: which prompt each side answers.
        said: a hash of what each says; those that say the same are no pair.
        settings: `high`, `low`, `max_pairs` and `seed`.
        min_gap: least difference of the scores.
    """
    lowest, highest = min(scores, default=0.0), max(scores, default=0.0)
    high, low = (round(lowest + share * (highest - lowest), 9) for share in (settings.high, settings.low))

    def is_pair(good: int, bad: int) -> bool:
        return is_wide(scores[good] - scores[bad], min_gap) and said[good] != said[bad]

    return stratified_places(
        scores,
        prompts,
        is_pair,
        min_gap=min_gap,
        high=high,
        low=low,
        max_pairs=settings.max_pairs,
        seed=settings.seed,
    )


def stratified_places(
    rewards: Sequence[float],
    prompts: Sequence[str] | Sequence[int],
    is_pair: Callable[[int, int], bool],
    *,
    min_gap: float,
    high: float,
    low: float,
    max_pairs: int,
    seed: int,
) -> list[tuple[int, int]]:
    """(chosen, rejected) sides: rewards of at least `high` against those of at most `low`.

    Where there are more than `max_pairs`, those of one prompt come first, then a random choice of the others: a pair
    across prompts also teaches what belongs to the prompt at all.

    Args:
        rewards: of each side.
        prompts: which prompt each side answers, by ids that can be sorted.
        is_pair: whether two sides differ enough, in whatever they say.
        min_gap: least difference of the rewards.
        high: least reward of a chosen side.
        low: greatest reward of a rejected side.
        max_pairs: most pairs.
        seed: seed of the choice among them.
    """
    chosen = array("Q", (side for side, reward in enumerate(rewards) if reward >= high))
    rejected = array(
        "Q", sorted((side for side, reward in enumerate(rewards) if reward <= low), key=rewards.__getitem__)
    )
    by_prompt = array("Q", sorted(rejected, key=prompts.__getitem__))  # in each prompt by reward, as before
    asked = [prompts[side] for side in by_prompt]
    begins = array("Q", (bisect_left(asked, prompts[good]) for good in chosen))
    ends = array("Q", (bisect_right(asked, prompts[good]) for good in chosen))
    rng = random.Random(seed)

    def far_enough(partners: Sequence[int], begins: Sequence[int], ends: Sequence[int]) -> Iterator[int]:
        """How many partners of each chosen side, from the first on, are far enough below it."""
        levels = array("d", (rewards[side] for side in partners))
        for good, begin, end in zip(chosen, begins, ends, strict=True):
            yield bisect_right(levels, rewards[good] - min_gap + EPSILON, begin, end) - begin

    def draw(partners: Sequence[int], begins: Sequence[int], ends: Sequence[int], count: int) -> list[tuple[int, int]]:
        """Up to `count` pairs, drawn evenly from all that there are, without listing them."""
        totals = array("Q", accumulate(far_enough(partners, begins, ends)))
        drawn: list[int] = []
        numbers = _shuffled(totals[-1] if totals else 0, rng)

        def sides(number: int) -> tuple[int, int]:
            row = bisect_right(totals, number)
            return chosen[row], partners[begins[row] + number - (totals[row - 1] if row else 0)]

        while len(drawn) < count and (number := next(numbers, None)) is not None:
            good, bad = sides(number)
            if is_pair(good, bad) and (partners is by_prompt or prompts[good] != prompts[bad]):
                drawn.append(number)
        return [sides(number) for number in sorted(drawn)]

    same = draw(by_prompt, begins, ends, max_pairs)
    everywhere = [0] * len(chosen), [len(rejected)] * len(chosen)
    return same + draw(rejected, *everywhere, max_pairs - len(same))


def _shuffled(n: int, rng: random.Random) -> Iterator[int]:
    """0 to n - 1 in random order (Fisher-Yates), in memory for what was taken only."""
    moved: dict[int, int] = {}
    for index in range(n):
        other = rng.randrange(index, n)
        yield moved.get(other, other)
        moved[other] = moved.pop(index, index)
