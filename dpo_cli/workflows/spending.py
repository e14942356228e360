"""What the stages of a round have cost, from what they left on the disk, and what one budget leaves them.

Sums the usage of every completion and the dollars of every judgment in a round's folder, of all attempts. Writes
nothing. Not covered: calls that were paid and never answered, and rows that a changed setting has replaced.
"""

from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import read_latest
from dpo_cli.data.records import Completions, Judgment
from dpo_cli.endpoint.prices import price_of

COMPLETIONS = "completions.jsonl"
JUDGED = ("judgments.jsonl", "evaluation/compare.jsonl", "evaluation/rate.jsonl")


def sampling_usd(config: Config) -> float:
    """Dollars for the completions of a round's folder, and for both sides' of its evaluation."""
    folder, settings = Path(config.data), config.generate
    if settings.engine != "endpoint" or not settings.url:
        return 0.0
    total = 0.0
    for file in (folder / COMPLETIONS, *sorted(folder.glob(f"evaluation/*/{COMPLETIONS}"))):
        for row in read_latest(file, Completions).values():
            price = price_of(settings.url, row.model, settings.price)
            total += price.usd(row.usage) if price else 0.0
    return total


def judging_usd(config: Config) -> float:
    """Dollars for the judgments of a round's folder, its evaluation's among them."""
    files = (Path(config.data) / name for name in JUDGED)
    return sum(row.usd for file in files for row in read_latest(file, Judgment).values())


def spent(rounds: Iterable[Config]) -> float:
    """Dollars that all rounds have cost so far."""
    return sum(sampling_usd(config) + judging_usd(config) for config in rounds)


def capped(config: Config, left: float | None) -> Config:
    """The settings of one stage, which may spend no more than is left; None: as they say themselves.

    Args:
        config: settings of the round.
        left: dollars.
    """
    if left is None:
        return config

    def least(own: float | None) -> float:
        return left if own is None else min(own, left)

    return replace(
        config,
        generate=replace(config.generate, max_usd=least(config.generate.max_usd)),
        judge=replace(config.judge, max_usd=least(config.judge.max_usd)),
        evaluate=replace(config.evaluate, max_usd=least(config.evaluate.max_usd)),
    )
