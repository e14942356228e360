"""The win rate without length, by hand and on worlds whose truth is known; and diversity."""

import math
import random
from statistics import fmean

import pytest

from dpo_cli.stages.evaluate.win_rate import PRIOR_SD, distinct, length_controlled_win_rate
from dpo_cli.statistics import wilson


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def world(n: int, theta: float, phi: float, drift: float, seed: int) -> list[list[tuple[float, float]]]:
    """Comparisons whose log-odds are `theta` + `phi` tanh(Δ/σ), Δ normal around `drift` standard deviations."""
    draw = random.Random(seed)
    longer = [draw.gauss(drift, 1) for _ in range(n)]
    return [[(float(draw.random() < logistic(theta + phi * math.tanh(x))), 100 * x)] for x in longer]


def test_by_hand():
    # Two lengths, whose tanh is ±t: without a prior, the fit goes through both shares, and θ is their mean log-odds.
    prompts = [[(float(i < 75), 10.0)] for i in range(100)] + [[(float(i < 40), -10.0)] for i in range(100)]
    wanted = logistic((math.log(0.75 / 0.25) + math.log(0.4 / 0.6)) / 2)
    assert length_controlled_win_rate(prompts).value == pytest.approx(wanted, abs=0.001)  # the prior is weak
    assert fmean(won for own in prompts for won, _ in own) == 0.575 != pytest.approx(wanted, abs=0.005)


def test_it_is_the_maximum_of_the_penalised_likelihood():
    prompts = world(60, 0.4, 1.5, 0.7, 3)
    points = [point for own in prompts for point in own]
    mean = fmean(x for _, x in points)
    spread = math.sqrt(fmean((x - mean) ** 2 for _, x in points))

    def objective(theta: float, phi: float) -> float:
        fitted = [(won, logistic(theta + phi * math.tanh(x / spread))) for won, x in points]
        return sum(math.log(p if won else 1 - p) for won, p in fitted) - phi**2 / PRIOR_SD**2 / 2

    found = length_controlled_win_rate(prompts).value
    theta = math.log(found / (1 - found))
    best = {shift: max(objective(theta + shift, phi / 200) for phi in range(-1000, 1000)) for shift in (-0.02, 0, 0.02)}
    assert best[0] == max(best.values())


@pytest.mark.parametrize(("theta", "phi", "drift"), [(0.0, 2.0, 0.8), (0.6, -1.5, 0.5), (0.0, 0.0, 0.0)])
def test_worlds_in_which_length_pleases(theta, phi, drift):
    """The interval holds the truth about as often as it says, where the plain win rate is off."""
    found = [length_controlled_win_rate(world(150, theta, phi, drift, seed)) for seed in range(120)]
    covered = fmean(one.low <= logistic(theta) <= one.high for one in found)
    assert 0.88 <= covered <= 1.0
    assert fmean(one.value for one in found) == pytest.approx(logistic(theta), abs=0.025)
    if phi and drift:
        plain = fmean(won for own in world(4000, theta, phi, drift, 0) for won, _ in own)
        assert abs(plain - logistic(theta)) > 0.08


def test_the_samples_of_one_prompt_are_no_independent_evidence():
    prompts = world(40, 0.5, 0.5, 0.2, 5)
    once, ten_times = length_controlled_win_rate(prompts), length_controlled_win_rate([own * 10 for own in prompts])
    assert (ten_times.value, ten_times.low) == (pytest.approx(once.value), pytest.approx(once.low))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_where_all_are_alike_there_is_nothing_to_fit(share):
    found = length_controlled_win_rate([[(share, x)] for x in (-9.0, 0.0, 50.0)])
    assert (found.value, found.low, found.high) == (share, *wilson(3 * share, 3))


def test_lengths_that_tell_all_leave_it_finite():
    prompts = [[(1.0, 10.0 + i)] for i in range(10)] + [[(0.0, -10.0 - i)] for i in range(10)]
    found = length_controlled_win_rate(prompts)
    assert found.value == pytest.approx(0.5, abs=0.01)
    assert 0 < found.low < 0.5 < found.high < 1
    same = length_controlled_win_rate([[(float(i % 4 > 0), 7.0)] for i in range(40)])
    assert same.value == pytest.approx(0.75)


def test_distinct_by_hand():
    texts = ["The soup was the soup", "the ladder"]
    assert distinct(texts, 1) == 4 / 7  # the, soup, was, ladder
    assert distinct(texts, 2) == 4 / 5  # the soup twice
    assert distinct(["", "one"], 2) == 0
