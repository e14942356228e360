"""What a careful person would want to know before believing an evaluation, in words."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from dpo_cli.analysis.prompt_injection import suspicious
from dpo_cli.data.records import Compared
from dpo_cli.stages.evaluate.results import EVEN, Evaluation
from dpo_cli.training.remedies import REMEDIES

MANY_FLIPS = 0.3  # of the comparisons; then the judge hardly tells the two apart
LONGER = 1.2  # times
REPEATS = 0.05  # of a completion's 4-grams
TIMID = 0.01  # nats a token


def find(result: Evaluation, rows: Sequence[Compared]) -> list[str]:
    """What stands out; empty if nothing does."""
    found = [*_position(result), *_length(result), *_texts(result, rows), *_adapters(result)]
    return [*found, *_forgotten(result), *_remedies(result)]


def _position(result: Evaluation) -> Iterator[str]:
    for name, found in result.position.items():
        wins, flips = found.first_wins, found.flips
        if wins is not None and not wins.low <= EVEN <= wins.high:
            verb = "prefers" if wins.value > EVEN else "avoids"
            yield (
                f"{name} {verb} what it is shown first: it wins in {wins.value:.0%} of {wins.n:,} orders. Both orders "
                "are asked, so this makes ties, not wins."
            )
        if flips is not None and flips.value > MANY_FLIPS:
            yield (
                f"{name} contradicts itself in {flips.value:.0%} of {flips.n:,} comparisons once the order is reversed."
            )


def _length(result: Evaluation) -> Iterator[str]:
    longer = result.lengths.policy / result.lengths.reference if result.lengths.reference else 1.0
    if not 1 / LONGER <= longer <= LONGER:
        yield f"The policy's completions are {longer:.2f} times as long as the reference's."
    if result.interval[0] > EVEN >= result.length_controlled_interval[0]:
        yield "The win rate is above one half, but not clearly once length is controlled."


def _texts(result: Evaluation, rows: Sequence[Compared]) -> Iterator[str]:
    for name in ("reference", "policy") if result.judge.get("judge") == "llm" else ():
        flagged = [bool(suspicious(text)) for row in rows for text in getattr(row, name)]
        if any(flagged):
            yield f"{sum(flagged):,} of the {name}'s completions look as if they were written for the judge."
    same = fmean(fmean(text in row.reference for text in row.policy) for row in rows)
    if same > EVEN:
        yield f"{same:.0%} of the policy's completions are word for word the reference's."


def _forgotten(result: Evaluation) -> Iterator[str]:
    for one in result.forgetting.values():
        change = one.change
        if change.low > 0:
            yield (
                f"{one.source} has become less likely by {change.value:.3f} nats a token "
                f"[{change.low:.3f}, {change.high:.3f}], of {one.reference:.3f}."
            )
    sides = result.repetition
    if sides is not None and sides.policy > sides.reference + REPEATS:
        yield f"The policy repeats itself: {sides.policy:.0%} of its 4-grams; the reference {sides.reference:.0%}."


def _remedies(result: Evaluation) -> Iterator[str]:
    """What to change, by symptom, where the result is no better or something was forgotten."""
    if any(name.startswith("forgetting") and gate.ok is False for name, gate in result.gates.items()):
        yield _remedy("forgetting")
    if result.interval[0] > EVEN:
        return
    timid = result.kl is not None and result.kl.nats_per_token < TIMID
    yield _remedy("too_conservative" if timid else "no_effect")


def _remedy(name: str) -> str:
    remedy = REMEDIES[name]
    return f"{name.replace('_', ' ').capitalize()}: {remedy.symptom}. Try: {'; '.join(remedy.remedies)}."


def _adapters(result: Evaluation) -> Iterator[str]:
    adapters = {str(side.get("adapter")) for side in result.sides.values() if side.get("adapter")}
    if len(adapters) == 1 and all(side.get("adapter") for side in result.sides.values()):
        yield "Both sides are the same adapter: the interval is expected to hold one half."
