"""The arithmetic of an evaluation: wins, intervals, the win rate without length, diversity; pure functions."""

import math
from collections.abc import Sequence
from statistics import fmean

from dpo_cli.statistics import CONFIDENCE, Interval, bootstrap, quantile, wilson

PRIOR_SD = 3.0  # of the length coefficient: a weak pull to 0, so that it stays finite where length tells all
STEPS, LONGEST_STEP = 100, 1.0  # of Newton's method
CLOSE = 1e-10

# Of one comparison: how much of it the policy wins (0 to 1), and how much longer its text is.
LengthPoint = tuple[float, float]


def win_rate(reference: Sequence[float], policy: Sequence[float]) -> float:
    """Share of all pairs, one score from each side, in which the policy's is higher; a tie counts half."""
    wins = sum((ours > theirs) + 0.5 * (ours == theirs) for ours in policy for theirs in reference)
    return wins / (len(policy) * len(reference))


def length_controlled_win_rate(prompts: Sequence[Sequence[LengthPoint]], confidence: float = CONFIDENCE) -> Interval:
    """The win rate that would be if both sides wrote at the same length (AlpacaEval 2, arXiv:2404.04475).

        logit P(policy wins) = θ + φ · tanh(Δ / σ)      LC win rate = 1 / (1 + exp(−θ))

    with Δ the difference in length, in characters, and σ its standard deviation, fitted by maximum likelihood; a part
    of a win is a soft label. As in the paper, but without its term for the difficulty of each instruction, which
    needs many models that answered the same prompts; φ has a normal prior of standard deviation `PRIOR_SD` in place
    of its cross-validated penalty. The interval is θ ± 1.96 standard errors, from the sandwich estimator with prompts
    as clusters (Liang and Zeger 1986), carried to the share. What is not linear in tanh(Δ/σ) is not removed, nor can
    length that is earned be told from length that pleases.

    Args:
        prompts: the comparisons of each prompt; prompts weigh the same.
        confidence: level of the interval.
    """
    points = [(won, longer, 1 / len(own)) for own in prompts for won, longer in own]
    first = points[0][0]
    if all(won == first for won, _, _ in points):
        ends = wilson(first * len(prompts), len(prompts), confidence)
        return Interval(first, *ends, n=len(prompts), confidence=confidence)
    mean = fmean(longer for _, longer, _ in points)
    spread = math.sqrt(fmean((longer - mean) ** 2 for _, longer, _ in points))
    rows = [(won, math.tanh(longer / spread) if spread else 0.0, weight) for won, longer, weight in points]
    theta, phi = _fit(rows)

    information = _information(rows, theta, phi)
    scatter = [[0.0, 0.0], [0.0, 0.0]]
    index = 0
    for own in prompts:
        score = [0.0, 0.0]
        for won, x, weight in rows[index : index + len(own)]:
            off = weight * (won - _logistic(theta + phi * x))
            score = [score[0] + off, score[1] + off * x]
        index += len(own)
        for i in range(2):
            for j in range(2):
                scatter[i][j] += score[i] * score[j]
    a, b, c = information
    determinant = a * c - b * b
    bread = (c / determinant, -b / determinant)  # the first row of the inverse
    variance = sum(bread[i] * scatter[i][j] * bread[j] for i in range(2) for j in range(2))
    error = math.sqrt(max(0.0, variance) * len(prompts) / max(1, len(prompts) - 1))
    reach = quantile(confidence) * error
    return Interval(
        _logistic(theta), _logistic(theta - reach), _logistic(theta + reach), n=len(prompts), confidence=confidence
    )


def distinct(texts: Sequence[str], size: int) -> float:
    """distinct-n (arXiv:1510.03055): distinct n-grams of words over all of them, in all texts together.

    It falls as texts get longer, so compare it at like lengths. 0 where no text has so many words.
    """
    grams = [
        gram
        for text in texts
        if (words := text.lower().split())
        for gram in zip(*(words[start:] for start in range(size)), strict=False)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(texts: Sequence[str], size: int = 4) -> float:
    """Mean share of a text's n-grams of words that it has had before; texts too short to have two count as 0."""
    shares = []
    for text in texts:
        words = text.lower().split()
        grams = list(zip(*(words[start:] for start in range(size)), strict=False))
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return fmean(shares) if shares else 0.0


def share_of_wins(wins: Sequence[float], resamples: int, seed: int, confidence: float = CONFIDENCE) -> Interval:
    """Mean of the wins with its bootstrap interval, by prompt.

    Where all prompts are alike a bootstrap has no width, however few they are: then it is Wilson's interval.
    """
    found = bootstrap(wins, resamples, seed, confidence)
    if found.low < found.high:
        return found
    ends = wilson(found.value * len(wins), len(wins), confidence)
    return Interval(found.value, *ends, n=len(wins), confidence=confidence)


def _fit(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """θ and φ at the maximum of the penalised likelihood, by Newton's method in bounded steps."""
    theta = phi = 0.0
    for _ in range(STEPS):
        slope = [0.0, -phi / PRIOR_SD**2]
        for won, x, weight in rows:
            off = weight * (won - _logistic(theta + phi * x))
            slope[0] += off
            slope[1] += off * x
        a, b, c = _information(rows, theta, phi)
        determinant = a * c - b * b
        move = ((c * slope[0] - b * slope[1]) / determinant, (a * slope[1] - b * slope[0]) / determinant)
        scale = min(1.0, LONGEST_STEP / max(abs(move[0]), abs(move[1]), CLOSE))
        theta, phi = theta + scale * move[0], phi + scale * move[1]
        if max(map(abs, move)) < CLOSE:
            break
    return theta, phi


def _information(rows: Sequence[tuple[float, float, float]], theta: float, phi: float) -> tuple[float, float, float]:
    """Minus the second derivatives of the penalised likelihood: θθ, θφ, φφ."""
    a = b = 0.0
    c = 1 / PRIOR_SD**2
    for _, x, weight in rows:
        p = _logistic(theta + phi * x)
        curve = weight * p * (1 - p)
        a, b, c = a + curve, b + curve * x, c + curve * x * x
    return a, b, c


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
