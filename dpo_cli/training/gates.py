"""The quality gates of a training run: a measured value, its limit, and whether it holds."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.statistics import proportion
from dpo_cli.training.guards import KL, LN2, MARGIN, RECENT
from dpo_cli.training.inputs import Stage


class Gate(Struct):
    """One condition on the result: `value` against `limit`; `interval` is the value's 95% one, where known.

    `ok` None: too few rows to tell; that fails no run, but is said.
    """

    value: float
    limit: float
    ok: bool | None
    interval: tuple[float, float] | None = None


def check_gates(stage: Stage, rows: Sequence[dict[str, Any]], config: Config, held_out_rows: int) -> dict[str, Gate]:
    """The conditions that a result must meet, by what was measured up to its checkpoint."""
    trained = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    if stage == "sft":
        return {"loss_falls": _below(trained[-1]["loss"], trained[0]["loss"])} if len(trained) > 1 else {}
    gates = {"loss": _below(mean(row["loss"] for row in trained[-RECENT:]), LN2)}
    if not held_out:
        return gates
    last = held_out[-1]
    before = held_out[0][MARGIN] if len(held_out) > 1 else 0.0  # at step zero it is 0
    reach = 1.96 * last.get(f"{MARGIN}_stderr", float("nan"))
    gates["held_out_loss"] = _below(last["eval_loss"], LN2)
    gates["held_out_margin"] = Gate(last[MARGIN], 0.0, last[MARGIN] > 0, (last[MARGIN] - reach, last[MARGIN] + reach))
    gates["margin_rises"] = Gate(last[MARGIN], before, last[MARGIN] > before)
    correct = proportion(last["eval_pairs_correct"], held_out_rows)
    if correct is not None:
        ok = True if correct.low > 0.5 else False if correct.high < 0.5 else None
        gates["held_out_accuracy"] = Gate(correct.share, 0.5, ok, (correct.low, correct.high))
    if KL in last:
        gates["kl_nats_per_token"] = Gate(last[KL], config.gate.kl_limit, last[KL] <= config.gate.kl_limit)
    return gates


def _below(value: float, limit: float) -> Gate:
    return Gate(value, limit, value < limit)


def failure_reason(name: str, gate: Gate) -> str:
    """Why a gate does not say yes."""
    interval = f", 95% interval {gate.interval[0]:.3g} to {gate.interval[1]:.3g}" if gate.interval else ""
    said = "is not shown: too few rows" if gate.ok is None else "fails"
    return f"{name} {said} (value {gate.value:.4g}, limit {gate.limit:.4g}{interval})"
