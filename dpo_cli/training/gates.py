"""Quality gates: a measured value with its interval, a limit, and one of three verdicts, worded here for everybody.

A gate passes where the whole interval is on the right side of the limit, and fails where the whole interval is on the
wrong one; else the data show neither, and it is said how many rows would. The KL limit alone is compared with the
measured value, as the guards compare it: it is a limit that somebody chose, not an effect to be shown.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from dpo_cli.config.settings import WARMUP, Config, TrainSection
from dpo_cli.statistics import Interval, of_mean, proportion, quantile
from dpo_cli.training.guards import KL, LN2, MARGIN, RECENT
from dpo_cli.training.plan import high_rate, warmup_steps

if TYPE_CHECKING:  # views show gates without reading inputs
    from dpo_cli.training.inputs import Stage

GateVerdict = Literal["pass", "fail", "not shown"]
WORDS: dict[bool | None, GateVerdict] = {True: "pass", False: "fail", None: "not shown"}
STILL = 0.01  # of the KL limit: less than that nobody would see in the text
AIM = 0.25  # of the KL limit
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
    interval = (found.low, found.high) if math.isfinite(found.low) and math.isfinite(found.high) else None
    return Gate(found.value, limit, ok, interval, _more(found, limit, above) if ok is None else None)


def _more(found: Interval, limit: float, above: bool) -> int | None:
    """Rows beyond `found.n` whose interval would clear the limit, if the value stayed: its width falls with 1/√n.

    Wilson's interval clears a limit where the score test rejects it, whose width is that of the limit, not the value.
    """
    distance = (found.value - limit) * (1 if above else -1)
    reach = (found.high - found.low) / 2
    if found.count is not None:
        reach = quantile(found.confidence) * math.sqrt(limit * (1 - limit) / found.n)
    if not found.n or not distance > 0 or not math.isfinite(reach):
        return None
    rows = found.n * (reach / distance) ** 2
    return max(1, math.ceil(rows) - found.n) if rows < MOST_ROWS else None


def check_gates(
    stage: "Stage", rows: Sequence[dict[str, Any]], config: Config, held_out_rows: int, best_of: int = 1
) -> dict[str, Gate]:
    """The conditions that a result must meet, by what was measured up to its checkpoint.

    Where something is held out, the training loss is no gate: it is measured on what was learnt from. The pairs that
    judge a checkpoint also chose it; of several evaluations without any effect the best looks like one, so that each
    interval is wide enough for all of them to hold at once (Bonferroni).

    Args:
        stage: dpo or sft.
        rows: lines of metrics.jsonl up to the checkpoint.
        config: `[gate]` holds the level of the intervals and the KL limit.
        held_out_rows: pairs that were held out.
        best_of: evaluations among which the checkpoint was chosen.
    """
    trained = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "eval_loss" in row]
    confidence = config.gate.confidence
    if stage == "sft":
        return {"loss_falls": _below(trained[-1]["loss"], trained[0]["loss"])} if len(trained) > 1 else {}
    if not held_out:
        return _training_loss([row["loss"] - row.get("router_loss", 0.0) for row in trained], confidence)
    last = held_out[-1]
    gates, of_all = {}, 1 - (1 - confidence) / best_of
    if "eval_loss_stderr" in last:  # of other losses than DPO's, ln 2 is no limit
        gates["held_out_loss"] = compared(held_out_interval(last, "eval_loss", held_out_rows, of_all), LN2, above=False)
    gates["held_out_margin"] = compared(held_out_interval(last, MARGIN, held_out_rows, of_all), 0.0)
    correct = proportion(last["eval_pairs_correct"], held_out_rows, of_all)
    if correct is not None:
        gates["held_out_accuracy"] = compared(correct, 0.5)
    if KL in last:
        kl = held_out_interval(last, KL, config.train.kl_prompts, confidence)
        interval = (max(0.0, kl.low), kl.high) if math.isfinite(kl.high) else None
        gates["kl_nats_per_token"] = Gate(kl.value, config.gate.kl_limit, kl.value <= config.gate.kl_limit, interval)
    return gates


def held_out_interval(row: dict[str, Any], name: str, n: int, confidence: float) -> Interval:
    """A metric of the held-out pairs with its standard error; of a single pair anything may be true."""
    error = row.get(f"{name}_stderr")
    return of_mean(row[name], math.inf if error is None else error, n, confidence)


def _training_loss(losses: Sequence[float], confidence: float) -> dict[str, Gate]:
    """The last logged losses against ln 2; the first one, from before any update, is ln 2 itself."""
    last = losses[1:][-RECENT:]
    error = stdev(last) / math.sqrt(len(last)) if len(last) > 1 else math.inf
    return {"loss": compared(of_mean(mean(last or losses), error, len(last), confidence), LN2, above=False)}


def has_moved(gates: Mapping[str, Gate]) -> bool:
    """Whether the policy writes otherwise than the reference; true where KL was not measured.

    It does not where KL is a hundredth of its limit at most, however clear the margin: a small change in the right
    direction shows on all pairs, and in no text. Nor where neither margin nor KL can be told from 0.
    """
    margin, kl = gates.get("held_out_margin"), gates.get("kl_nats_per_token")
    if margin is None or kl is None:
        return True
    still = margin.interval is not None and margin.interval[0] <= 0 <= margin.interval[1]
    return not (kl.value < STILL * kl.limit or (still and kl.interval is not None and kl.interval[0] <= 0))


def why_unmoved(gates: Mapping[str, Gate], section: TrainSection, steps: int, kl_limit: float) -> str:
    """What to raise, and to what, for a policy that has not moved.

    Early in a run KL grows with the square of the learning rate, since the change of the weights grows with the rate
    itself: a rate that is so many times higher aims at a quarter of the limit. No more is advised than what
    `inspect plan` would accept.
    """
    said = (
        f"the policy has not moved: KL {gates['kl_nats_per_token'].value:.1g} nats a token, the limit is {kl_limit:g}"
    )
    warmup = warmup_steps(section, steps)
    if warmup >= steps:
        return f"{said}; warmup takes {warmup} of {steps} steps: set train.warmup_ratio = {WARMUP:g}"
    kl, high = gates["kl_nats_per_token"].value, high_rate(section)
    factor = math.sqrt(AIM * kl_limit / kl) if kl > 0 else math.inf
    wanted = min(section.learning_rate * factor, high)
    if wanted > section.learning_rate * 1.5:
        return f"{said}; raise train.learning_rate from {section.learning_rate:.2g} to {wanted:.1g}"
    return f"{said}; raise train.num_train_epochs from {section.num_train_epochs:g} to {4 * section.num_train_epochs:g}"


def _below(value: float, limit: float) -> Gate:
    return Gate(value, limit, value < limit)


def open_gates(gates: Mapping[str, Gate]) -> list[str]:
    """Names of the gates that did not pass."""
    return [name for name, gate in gates.items() if not gate.ok]


def numbers(gate: Gate) -> str:
    """Value, interval, where it is known, and limit, in words."""
    interval = f" [{gate.interval[0]:.4g}, {gate.interval[1]:.4g}]" if gate.interval else ""
    return f"{gate.value:.4g}{interval}, limit {gate.limit:.4g}"


def describe(name: str, gate: Gate, unit: str = "held-out pairs") -> str:
    """A gate's verdict as a sentence, with what would show an effect that was seen but not shown."""
    said = f"{name}: {gate.verdict} ({numbers(gate)})"
    if gate.more:
        said += f"; about {gate.more:,} more {unit} would show this effect, if it is there"
    return said
