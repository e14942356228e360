"""Which completions each strategy pairs, worked by hand."""

import pytest

from dpo_cli.config.settings import Strategy
from dpo_cli.stages.pair.strategies import STRATEGIES

SCORES = [5.0, 9.0, 6.0, 2.0]
RANKING = [1, 2, 0, 3]


@pytest.mark.parametrize(
    ("strategy", "pairs"),
    [
        ("best-worst", [(1, 3)]),
        ("same-prompt", [(1, 3)]),
        ("all", [(1, 3), (1, 0), (2, 3), (1, 2), (0, 3), (2, 0)]),  # gaps 7, 4, 4, 3, 3, 1
        ("adjacent", [(1, 2), (0, 3), (2, 0)]),  # gaps 3, 3, 1
        ("mu-2sigma", [(1, 3)]),  # 5.5 - 2 x 2.5 = 0.5
    ],
)
def test_pairs_of_four_completions(strategy, pairs):
    assert STRATEGIES[strategy](SCORES, RANKING) == pairs


def test_mu_2sigma_passes_over_the_very_worst_of_many():
    scores = [10.0, *[9.0] * 10, 6.0, 1.0]  # 8.23 - 2 x 2.26 = 3.71: 6 is 2.29 off, 1 is 2.71 off
    assert STRATEGIES["mu-2sigma"](scores, list(range(13))) == [(0, 11)]
    scores[11] = 7.0  # 8.31 - 2 x 2.20 = 3.91: 7 is 3.09 off, 1 is 2.91 off
    assert STRATEGIES["mu-2sigma"](scores, list(range(13))) == [(0, 12)]


def test_what_is_not_ranked_has_no_part():
    scores = [8.0, 0.0, 6.0, 5.0]  # the second is empty
    for strategy, propose in STRATEGIES.items():
        assert all(1 not in pair for pair in propose(scores, [0, 2, 3])), strategy
    assert STRATEGIES["mu-2sigma"](scores, [0, 2, 3]) == [(0, 3)]


def test_every_setting_has_its_strategy():
    assert set(Strategy.__args__) == {*STRATEGIES, "stratified"}
