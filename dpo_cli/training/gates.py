"""Quality gates: a measured value with its interval, a limit, and one of three verdicts, worded here for everybody.

A gate passes where the whole interval is on the right side of the limit, and fails where the whole interval is on the
wrong one; else the data show neither, and it is said how many rows would. The KL limit alone is compared with the
measured value, as the guards compare it: it is a limit that somebody chose, not an effect to be shown.
"""

import math
from collections.abc import Iterable, Sequence
from statistics import mean
from typing import Any, Literal

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.statistics import Interval, proportion
from dpo_cli.training.guards import KL, LN2, MARGIN, RECENT
from dpo_cli.training.inputs import Stage

GateVerdict = Literal["pass", "fail", "not shown"]
WORDS: dict[bool | None, GateVerdict] = {True: "pass", False: "fail", None: "not shown"}
MOST_ROWS = 1e6  # an effect that would need more is none
MARKS: dict[GateVerdict, str] = {"pass": "✓", "fail": "✗", "not shown": "?"}


class Gate(Struct):
    """One condition on a result: `value` against `limit`; `interval` is the value's, where it is known.

    `ok` None: the data show neither yes nor no. `more` is how many further rows would show the effect that was seen,
    where there is one.
    """

    value: float
    limit: float
    ok: bool | None
    interval: tuple[float, float] | None = None
    more: int | None = None

    @property
    def verdict(self) -> GateVerdict:
        """`ok` as a word."""
        return WORDS[self.ok]


def worst(verdicts: Iterable[GateVerdict]) -> GateVerdict:
    """The verdict on all of them: fail before not shown before pass."""
    return max(verdicts, key=("pass", "not shown", "fail").index, default="pass")


def compared(found: Interval, limit: float, above: bool = True) -> Gate:
    """The gate that asks for a value above its limit, or below it."""
    sure, refuted = (found.low > limit, found.high < limit) if above else (found.high < limit, found.low > limit)
    ok = True if sure else False if refuted else None
    return Gate(found.value, limit, ok, (found.low, found.high), _more(found, limit, above) if ok is None else None)


def _more(found: Interval, limit: float, above: bool) -> int | None:
    """Rows beyond `found.n` whose interval would clear the limit, if the value stayed: its width falls with 1/√n."""
    distance = (found.value - limit) * (1 if above else -1)
    reach = (found.high - found.low) / 2
    if not found.n or not distance > 0 or not math.isfinite(reach):
        return None
    rows = found.n * (reach / distance) ** 2
    return max(1, math.ceil(rows) - found.n) if rows < MOST_ROWS else None


def check_gates(stage: Stage, rows: Sequence[dict[str, Any]], config: Config, held_out_rows: int) -> dict[str, Gate]:
    """The conditions that a result must meet, by what was measured up to its checkpoint."""
    trained = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    if stage == "sft":
        return {"loss_falls": _below(trained[-1]["loss"], trained[0]["loss"])} if len(trained) > 1 else {}
    gates = {"loss": _below(mean(row["loss"] - row.get("router_loss", 0.0) for row in trained[-RECENT:]), LN2)}
    if not held_out:
        return gates
    last = held_out[-1]
    before = held_out[0][MARGIN] if len(held_out) > 1 else 0.0  # at step zero it is 0
    reach = 1.96 * last.get(f"{MARGIN}_stderr", float("nan"))
    gates["held_out_loss"] = _below(last["eval_loss"] - last.get("eval_router_loss", 0.0), LN2)
    gates["held_out_margin"] = Gate(last[MARGIN], 0.0, last[MARGIN] > 0, (last[MARGIN] - reach, last[MARGIN] + reach))
    gates["margin_rises"] = Gate(last[MARGIN], before, last[MARGIN] > before)
    correct = proportion(last["eval_pairs_correct"], held_out_rows)
    if correct is not None:
        gates["held_out_accuracy"] = compared(correct, 0.5)
    if KL in last:
        gates["kl_nats_per_token"] = Gate(last[KL], config.gate.kl_limit, last[KL] <= config.gate.kl_limit)
    return gates


def _below(value: float, limit: float) -> Gate:
    return Gate(value, limit, value < limit)


def numbers(gate: Gate) -> str:
    """Value, interval, where it is known, and limit, in words."""
    interval = ""
    if gate.interval is not None and all(map(math.isfinite, gate.interval)):
        interval = f" [{gate.interval[0]:.4g}, {gate.interval[1]:.4g}]"
    return f"{gate.value:.4g}{interval}, limit {gate.limit:.4g}"


def describe(name: str, gate: Gate, unit: str = "held-out pairs") -> str:
    """A gate's verdict as a sentence, with what would show an effect that was seen but not shown."""
    said = f"{name}: {gate.verdict} ({numbers(gate)})"
    if gate.more:
        said += f"; about {gate.more:,} more {unit} would show this effect, if it is there"
    return said
