"""What an evaluation says: the rows of evaluation.jsonl, and the result, which `--json` prints as it is."""

from typing import Any

from msgspec import Struct, field

from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.stages.evaluate.divergence import Divergence
from dpo_cli.stages.evaluate.forgetting import Forgetting
from dpo_cli.statistics import Interval
from dpo_cli.training.gates import Gate

EVEN = 0.5  # a win rate that says nothing


class Sides(Struct):
    """One number for each adapter."""

    reference: float
    policy: float


class Position(Struct):
    """What the order of display did to a judge.

    `first_wins` counts the orders that it decided for the answer shown first, half of which would be chance; `flips`
    the comparisons that it decided differently once the order was reversed.
    """

    first_wins: Interval | None
    flips: Interval | None


class Evaluation(Struct, kw_only=True):
    """Policy against reference on `n` prompts.

    `win_rate` is the share of comparisons that the policy wins, ties counted half, and `interval` its 95% bootstrap
    interval by prompt; `length_controlled_win_rate` is what it would be at equal lengths. `scores` are mean ratings of
    single answers, None where the judge gives none; `lengths` mean lengths in characters, `distinct` distinct-n by n;
    `kl` is None for the reason in `no_kl`. Prompts without a result are left out: `failed` of them. `skipped` and
    `errors` count what was asked in vain, by reason: the judge's own, and those that the next run tries again.
    `repetition` is the mean share of a completion's 4-grams that it has had before; `forgetting` what other texts have
    lost, by gate.
    `waiting` requests are in batches that have not ended. `usd` is what all of this has cost, in former runs too, and
    `receipt` what this run has paid. `sides` and `judge` say what was compared, and by whom.
    """

    win_rate: float
    interval: tuple[float, float]
    length_controlled_win_rate: float
    length_controlled_interval: tuple[float, float]
    scores: Sides | None
    n: int
    usd: float
    wins: int
    ties: int
    losses: int
    lengths: Sides
    distinct: dict[int, Sides]
    kl: Divergence | None
    position: dict[str, Position]
    gates: dict[str, Gate]
    failed: int
    skipped: dict[str, int]
    errors: dict[str, int]
    waiting: int
    receipt: Receipt | None
    path: str
    sides: dict[str, dict[str, Any]]
    judge: dict[str, Any]
    no_kl: str = ""
    repetition: Sides | None = None
    forgetting: dict[str, Forgetting] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


class Planned(Struct, kw_only=True):
    """What a run would do: completions to sample, and calls to the judge; `estimate` is of what is paid."""

    prompts: int
    completions: int
    comparisons: int
    ratings: int
    estimate: Estimate | None


class Rated(Struct, kw_only=True):
    """The mean rating of an adapter's completions, each by itself, with its 95% bootstrap interval by prompt."""

    score: float
    interval: tuple[float, float]
    n: int
    usd: float
