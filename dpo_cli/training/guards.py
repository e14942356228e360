"""What a run's numbers call for: decisions alone, without a trainer and without torch.

After each evaluation and each log the loop asks here what to do. What has been done so far is the `State`, which is
saved with every checkpoint, so that a resumed run decides as an uninterrupted one would have. Reads and writes
nothing. Not covered: guards on several GPUs, whose numbers would have to be gathered first.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import median
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.config.settings import GateSection
from dpo_cli.training.remedies import REMEDIES

LN2 = math.log(2)
KL = "eval_kl_nats_per_token"
MARGIN = "eval_rewards/margins"
BETA_FACTOR = 2.0
ADAPT_RATE = 0.1  # of beta, at an evaluation
BETA_RANGE = 10.0  # adaptive beta stays within this factor of what was set
STEADY = 8  # logs that a steady rise is told from
RECENT = 5  # logs that a spike is compared with


class GuardState(Struct):
    """What the guards have changed so far.

    `beta` None, `batch` None and `tokens_per_batch` None: as configured. `batch` is (rows a forward, forwards a step of
    all processes together). `checkpointing` is on once memory has lacked without it. `ended` is the fault that ended
    the run early.
    """

    lr_scale: float = 1.0
    beta: float | None = None
    violations: int = 0
    nans: int = 0
    batch: tuple[int, int] | None = None
    eval_batch: int | None = None
    tokens_per_batch: int | None = None
    checkpointing: bool = False
    warned: list[str] = msgspec.field(default_factory=list)
    ended: str | None = None


class GuardFinding(Struct):
    """Something that the guards saw (a key of `REMEDIES`) and what is done: halve_lr, rollback, warn and so on."""

    fault: str
    action: str
    details: dict[str, float | str]


def after_evaluation(
    state: GuardState, rows: Sequence[dict[str, Any]], gate: GateSection, beta: float
) -> list[GuardFinding]:
    """Decide after the evaluation that is the last of `rows`, and note it in `state`.

    Args:
        state: changed in place.
        rows: the log so far, as in metrics.jsonl.
        gate: limits and actions.
        beta: as configured, in force unless `state.beta` says otherwise.
    """
    evaluations = [row for row in rows if "eval_loss" in row]
    row = evaluations[-1]
    symptoms = _symptoms(row, gate, row.get("eval_beta", beta), "eval_")
    found = [_warn(state, name, details) for name, details in symptoms]
    found += _on_kl(state, row.get(KL), gate, beta)
    if gate.patience and state.ended is None and _stalled(evaluations, gate):
        state.ended = "margin_stalls"
        found.append(GuardFinding("margin_stalls", "stop", {"evaluations": gate.patience}))
    return [finding for finding in found if finding is not None]


def after_log(
    state: GuardState, rows: Sequence[dict[str, Any]], gate: GateSection, beta: float = 1.0
) -> list[GuardFinding]:
    """Look for a loss spike in the last training row; where nothing is held out, for the other symptoms as well."""
    trained = [row for row in rows if "loss" in row]
    losses = [row["loss"] for row in trained]
    before = losses[-RECENT - 1 : -1]
    found: list[GuardFinding | None] = []
    if len(before) > 1 and losses[-1] > max(gate.loss_spike * median(before), LN2):
        found.append(_warn(state, "loss_spike", {"loss": losses[-1], "before": median(before)}))
    elif rises_steadily(losses[1:][-STEADY:]) and losses[-1] > LN2:
        found.append(_warn(state, "loss_rises", {"loss": losses[-1], "before": losses[1:][-STEADY]}))
    if len(trained) == len(rows):
        found += [_warn(state, name, details) for name, details in _symptoms(trained[-1], gate, beta, "")]
    return [finding for finding in found if finding is not None]


def rises_steadily(values: Sequence[float]) -> bool:
    """Whether numbers go up by Mann and Kendall's test at about 0.1%; of fewer than `STEADY` nobody can tell."""
    n = len(values)
    if n < STEADY:
        return False
    ups = sum((later > earlier) - (later < earlier) for earlier, later in combinations(values, 2))
    return ups - 1 > 3.09 * math.sqrt(n * (n - 1) * (2 * n + 5) / 18)


def after_nan(state: GuardState, gate: GateSection) -> GuardFinding:
    """A loss that is not a number: back to the last good checkpoint at a tenth of the rate, or stop."""
    state.nans += 1
    if state.nans > gate.nan_rollbacks:
        state.ended = "nan"
        return GuardFinding("nan", "stop", {})
    state.lr_scale /= 10
    return GuardFinding("nan", "rollback", {"lr_scale": state.lr_scale})


def after_out_of_memory(
    state: GuardState,
    batch: tuple[int, int],
    eval_batch: int,
    budget: tuple[int, int] | None = None,
    may_checkpoint: bool = False,
) -> GuardFinding | None:
    """Gradient checkpointing, then fewer rows a forward with as many rows a step; None if it is one row already.

    Args:
        state: changed in place.
        batch: (rows a forward, forwards a step of all processes together) that did not fit.
        eval_batch: rows a forward in evaluation.
        budget: (most tokens a forward, tokens of the largest pair) where tokens divide a step into forwards.
        may_checkpoint: gradient checkpointing is off, and nobody has set it so.
    """
    if may_checkpoint:
        state.checkpointing = True
        return GuardFinding("out_of_memory", "checkpointing", {})
    if budget is not None:
        tokens, largest = budget
        if tokens <= largest:
            return None
        state.tokens_per_batch = max(largest, tokens // 2)
        return GuardFinding("out_of_memory", "smaller_batch", {"tokens_a_forward": state.tokens_per_batch})
    smaller = smaller_batch(*batch)
    if smaller is None and eval_batch == 1:
        return None
    state.batch = smaller or batch
    state.eval_batch = max(1, eval_batch // 2)
    rows, forwards = state.batch
    return GuardFinding("out_of_memory", "smaller_batch", {"rows_a_forward": rows, "forwards_a_step": forwards})


def smaller_batch(rows: int, forwards: int) -> tuple[int, int] | None:
    """The largest divisor of `rows` that is at most half of it, with as many rows a step."""
    fits = next((part for part in range(rows // 2, 0, -1) if rows % part == 0), None)
    return None if fits is None else (fits, forwards * (rows // fits))


def last_good(checkpoints: Iterable[int], rows: Sequence[dict[str, Any]], limit: float) -> int | None:
    """Newest checkpoint whose next evaluation, its own if it has one, was finite and within the KL limit."""
    evaluations = sorted((row["step"], is_good(row, limit)) for row in rows if "eval_loss" in row)
    good = [step for step in checkpoints if next((ok for at, ok in evaluations if at >= step), False)]
    return max(good, default=None)


def is_good(row: dict[str, Any], limit: float) -> bool:
    """Whether an evaluation is finite and within the KL limit, if it measured KL."""
    loss, kl = row["eval_loss"], row.get(KL, 0.0)  # None: not a number, in a file
    return loss is not None and kl is not None and math.isfinite(loss) and kl <= limit


def best_step(steps: Iterable[int], rows: Sequence[dict[str, Any]], metric: str, sign: int, limit: float) -> int:
    """The step with the best held-out metric among those within the KL limit, a later one winning.

    Where none is within the limit: the least KL. Where none was evaluated: the last.

    Args:
        steps: of the checkpoints, at least one.
        rows: lines of metrics.jsonl.
        metric: name of the evaluation metric; margins are compared per beta, which may have changed on the way.
        sign: 1 where larger is better, -1 where smaller is.
        limit: most KL in nats a token.
    """
    steps = list(steps)
    by_step = {row["step"]: row for row in rows if metric in row}

    def merit(step: int) -> tuple[bool, float, int]:
        row = by_step[step]
        good = is_good(row, limit)
        value = sign * row[metric] / row.get("eval_beta", 1.0) if good else -row.get(KL, math.inf)
        return good, value if math.isfinite(value) else -math.inf, step

    return max((step for step in steps if step in by_step), key=merit, default=max(steps))


def _on_kl(state: GuardState, kl: float | None, gate: GateSection, beta: float) -> list[GuardFinding]:
    if kl is None:
        return []
    if not kl <= gate.kl_limit:
        left = [] if gate.retreat else gate.kl_actions[state.violations :]
        action = left[0] if left else "stop"
        state.violations += 1
        details: dict[str, float | str] = {"kl_nats_per_token": kl, "limit": gate.kl_limit}
        if action in ("halve_lr", "rollback"):  # the same steps at the same rate would lead to the same place
            state.lr_scale /= 2
            details["lr_scale"] = state.lr_scale
        elif action == "raise_beta":
            state.beta = details["beta"] = (state.beta or beta) * BETA_FACTOR
        else:
            state.ended = "kl_limit"
        return [GuardFinding("kl_limit", action, details)]
    if gate.adaptive_beta:
        steered = adapt_beta(state.beta or beta, kl, gate.kl_target, beta)
        if steered != (state.beta or beta):
            state.beta = steered
            return [GuardFinding("kl_target", "adapt_beta", {"kl_nats_per_token": kl, "beta": steered})]
    return []


def adapt_beta(beta: float, kl: float, target: float, configured: float) -> float:
    """Raise beta by a tenth above the target, lower it by a tenth below half of the target."""
    factor = 1 + ADAPT_RATE if kl > target else 1 - ADAPT_RATE if kl < target / 2 else 1.0
    return min(max(beta * factor, configured / BETA_RANGE), configured * BETA_RANGE)


def _stalled(evaluations: Sequence[dict[str, Any]], gate: GateSection) -> bool:
    """Whether the best margin, per beta, is more than `patience` evaluations old."""
    margins = [row[MARGIN] / row.get("eval_beta", 1.0) for row in evaluations if MARGIN in row]
    return len(margins) > gate.patience and max(margins[-gate.patience :]) <= max(margins[: -gate.patience])


def _symptoms(
    row: dict[str, Any], gate: GateSection, beta: float, prefix: str
) -> list[tuple[str, dict[str, float | str]]]:
    """Faults that an evaluation shows, or a training row (prefix ""), each with the numbers that show it."""
    chosen, rejected = (row.get(f"{prefix}rewards/{side}", 0.0) / beta for side in ("chosen", "rejected"))  # nats
    found: list[tuple[str, dict[str, float | str]]] = []
    if chosen < -gate.chosen_falls and rejected < chosen:
        found.append(("one_sided", {"chosen_nats": chosen, "rejected_nats": rejected}))
    elif chosen < -gate.chosen_falls:
        found.append(("chosen_falls", {"chosen_nats": chosen}))
    lengths = row.get("eval_sampled_tokens"), row.get("eval_reference_sampled_tokens")
    if lengths[0] and lengths[1] and not 1 / gate.length_drift <= lengths[0] / lengths[1] <= gate.length_drift:
        found.append(("length_drift", {"sampled_tokens": lengths[0], "reference": lengths[1]}))
    return found


def _warn(state: GuardState, fault: str, details: dict[str, float | str]) -> GuardFinding | None:
    """A warning, the first time that a run shows the fault."""
    assert fault in REMEDIES
    if fault in state.warned:
        return None
    state.warned.append(fault)
    return GuardFinding(fault, "warn", details)
