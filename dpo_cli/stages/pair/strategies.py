"""Which completions of one prompt are paired: each strategy a pure function of their scores and ranking.

A strategy takes `scores` (one a completion) and `ranking` (the indices that may be a side, best first, two or more)
and returns (chosen, rejected) candidates, the most telling first. It proposes; ties, small gaps and inverted orders
are filtered by whoever asks. Reads and writes nothing. Not covered: `stratified`, which pairs across prompts.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations, pairwise

MANY = 6  # completions from which on μ − 2σ can be another one than the worst
Pairs = list[tuple[int, int]]


def best_worst(scores: Sequence[float], ranking: Sequence[int]) -> Pairs:
    """The best against the worst: one pair, the clearest."""
    return [(ranking[0], ranking[-1])]


def all_pairs(scores: Sequence[float], ranking: Sequence[int]) -> Pairs:
    """Every completion against every worse one."""
    return _widest_first(scores, combinations(ranking, 2))


def adjacent(scores: Sequence[float], ranking: Sequence[int]) -> Pairs:
    """Every completion against the next worse one: as many pairs as distinctions, none implied by others."""
    return _widest_first(scores, pairwise(ranking))


def mu_2sigma(scores: Sequence[float], ranking: Sequence[int]) -> Pairs:
    """The best against the one whose score is nearest to μ − 2σ (arXiv:2502.16825), σ that of the population.

    The worst of many is easy to tell from the best and teaches little. Of fewer than six completions none lies below
    μ − 2σ (the least z-score of n is −√(n − 1)), and the worst is always the nearest.
    """
    ranked = [scores[index] for index in ranking]
    target = statistics.fmean(ranked) - 2 * statistics.pstdev(ranked)
    worst_first = ranking[:0:-1]  # equally near: the worse one
    return [(ranking[0], min(worst_first, key=lambda index: abs(scores[index] - target)))]


def auto(scores: Sequence[float], ranking: Sequence[int]) -> Pairs:
    """The default: best against worst, from six completions on μ − 2σ, where the two can differ."""
    return (mu_2sigma if len(ranking) >= MANY else best_worst)(scores, ranking)


def _widest_first(scores: Sequence[float], pairs: Iterable[tuple[int, int]]) -> Pairs:
    return sorted(pairs, key=lambda pair: scores[pair[1]] - scores[pair[0]])


# By the option's value; judged completions are of one prompt anyhow.
STRATEGIES: dict[str, Callable[[Sequence[float], Sequence[int]], Pairs]] = {
    "auto": auto,
    "best-worst": best_worst,
    "same-prompt": best_worst,
    "all": all_pairs,
    "adjacent": adjacent,
    "mu-2sigma": mu_2sigma,
}


def weigh(gaps: Sequence[float | None], weights: str) -> list[float]:
    """What the pairs of one prompt count in training.

    Args:
        gaps: their score gaps.
        weights: `prompt`, so that all prompts count the same, however many pairs they have; `gap`, as `prompt` but
            shared out by score gap.
    """
    if weights == "prompt" or None in gaps:
        return [1 / len(gaps) for _ in gaps]  # also of a prompt without pairs
    return [gap / sum(filter(None, gaps)) for gap in gaps if gap is not None]
