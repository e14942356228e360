"""A run's folder read back: metrics, events and report, for `inspect run`, pages, sweeps and cards."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.errors import UserError
from dpo_cli.training.gates import Gate, GateVerdict
from dpo_cli.training.inputs import Stage

MAY_LACK = ("ok", "interval", "more", "router_loss")  # of a gate and of step zero


class StepZero(Struct, omit_defaults=True):
    """The check before the first update: the preference loss, the largest margin in nats, and whether both are right.

    `router_loss` is what a mixture of experts adds to the loss, for its experts' balance.
    """

    loss: float
    margin: float
    ok: bool
    router_loss: float | None = None


class Merged(Struct):
    """A merged model that was written, and how far its log-probabilities are from the adapter's, in nats a token.

    `effect` is how far the adapter is from the base; `note` is for the user.
    """

    path: str
    dtype: str
    mean_difference: float
    largest_difference: float
    tolerance: float
    effect: float | None = None
    note: str | None = None


class Retreat(Struct, kw_only=True):
    """A checkpoint that was scaled back to the KL limit: the scale, KL in nats a token before and after.

    `rank` is that of the scaled adapter, `error` what reducing it to that left out, as a share of what DPO changed.
    """

    checkpoint: str
    scale: float
    kl_before: float
    kl: float
    rank: int
    error: float


class Trained(Struct, kw_only=True):
    """What became of a run.

    `verdict` is the worst of the gates', none for a dry run; `reasons` are those gates that do not say yes. `step`
    is that of the newest checkpoint, `ended` the fault that ended the run before its last step, `metrics` the last
    training and evaluation lines, `refused` reason -> rows, `best_of` the evaluations of the same held-out pairs
    among which `best_checkpoint` was chosen: the gates' intervals hold for all of them at once.
    """

    stage: Stage
    run: str
    adapter: str
    rows: int
    held_out: int
    steps: int
    step: int = 0
    resumed_from: int | None = None
    finished_before: bool = False
    shortened: int = 0
    refused: dict[str, int] = msgspec.field(default_factory=dict)
    step_zero: StepZero | None = None
    metrics: dict[str, Any] = msgspec.field(default_factory=dict)
    gates: dict[str, Gate] = msgspec.field(default_factory=dict)
    verdict: GateVerdict | None = None
    reasons: list[str] = msgspec.field(default_factory=list)
    ended: str | None = None
    merged: Merged | None = None
    retreat: Retreat | None = None
    best_checkpoint: str | None = None
    best_of: int = 1
    policy_sha256: str | None = None
    reference_sha256: str | None = None


class Run(Struct, kw_only=True):
    """`inspect run`: what a run folder holds.

    `series` maps a metric's name to its points (step, value) and holds evaluations under their `eval_` names; a value
    that is not a number is NaN (`null` in JSON). `last` is the last point of each. `config` is what the run was asked
    for: settings, versions, hashes of its inputs.
    """

    name: str
    series: dict[str, list[tuple[float, float]]]
    last: dict[str, float]
    events: list[dict[str, Any]]
    report: Trained | None
    config: dict[str, Any] | None = None

    def acts(self) -> list[dict[str, Any]]:
        """What the guards found and did, in order: events with an action, rollbacks, the end."""
        told = [event for event in self.events if "action" in event or event.get("event") in ("rolled_back", "ended")]
        return [event for event in told if isinstance(event.get("step"), int | float)]


def read_run(folder: Path) -> Run:
    """Metrics, events and report of a run folder; of a run in progress, what is there.

    Raises:
        UserError: there is no such folder, or a file in it is not what it should be.
    """
    if not folder.is_dir():
        near = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        hint = f"runs there: {', '.join(near)}" if near else "nothing-dpo train makes one"
        raise UserError("no such run", where=str(folder), hint=hint)
    series: dict[str, list[tuple[float, float]]] = {}
    for row in _json_lines(folder / "metrics.jsonl"):
        step = row.get("step")
        if not isinstance(step, int | float):
            continue
        for name, value in row.items():
            if name != "step" and (value is None or isinstance(value, int | float)):
                series.setdefault(name, []).append((step, math.nan if value is None else float(value)))
    report, config = folder / "report.json", folder / "config.json"
    return Run(
        name=folder.name,
        series=series,
        last={name: points[-1][1] for name, points in series.items()},
        events=_json_lines(folder / "events.jsonl"),
        report=read_report(report) if report.exists() else None,
        config=_object(config.read_text("utf-8"), str(config)) if config.exists() else None,
    )


def read_report(file: Path) -> Trained:
    """A run's report.json.

    Raises:
        UserError: it is not one; the file is named.
    """
    found = _object(file.read_text("utf-8"), str(file))
    for name in ("step_zero", "gates"):  # JSON has no NaN, so that null stands for it there
        if name in found and found[name] is not None:
            found[name] = _with_nan(found[name])
    try:
        return msgspec.convert(found, Trained)
    except msgspec.ValidationError as error:
        raise UserError(f"not a run's report: {error}", where=str(file)) from None


def read_finished(folder: Path) -> Trained | None:
    """The report of a run that has nothing left to do; None: there is no such run, or something is left."""
    file = folder / "report.json"
    report = read_report(file) if file.exists() else None
    return report if report is not None and report.best_checkpoint else None


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: None if key in MAY_LACK and one is None else _with_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_nan(one) for one in value]
    return math.nan if value is None else value


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; none if there is no file. Python's own parser, since trainers write bare NaN."""
    if not path.exists():
        return []
    lines = path.read_text("utf-8").split("\n")
    torn = lines.pop()  # what follows the last newline is nothing, or is still being written
    rows = [_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    try:
        return [*rows, _object(torn, str(path))]
    except UserError:
        return rows


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"not a JSON object: {error}", where=where) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=where)
    return msgspec.convert(value, dict[str, Any])
