"""The same run with several values of one setting, side by side.

Each value is a run of its own, `<name>-<setting>-<value>`, with an adapter folder of its own; a killed sweep goes on
where it stopped. Reads and writes what `train` does. Not covered: several settings at once.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

from dpo_cli.config import resolve as configuration
from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.jobs import launch
from dpo_cli.progress import Progress
from dpo_cli.training import guards, run_history
from dpo_cli.training.gates import GateVerdict, open_gates
from dpo_cli.training.run_history import Run, Trained

SETTINGS = ("beta", "learning_rate", "r")


class SweepPoint(Struct):
    """One value of the setting, and what came of it: held out, at the checkpoint that was kept.

    Margins are divided by beta: they are in nats, and those of different betas can be compared. `failed` names the
    gates that did not pass; `step` is where the run rests that a search has given up.
    """

    value: float
    run: str
    adapter: str
    verdict: GateVerdict | None
    accuracy: float | None
    margin: float | None
    loss: float | None
    kl: float | None
    accuracy_interval: tuple[float, float] | None = None
    margin_interval: tuple[float, float] | None = None
    failed: list[str] = msgspec.field(default_factory=list)
    step: int | None = None


class SweepResult(Struct):
    """All points, in the order given, and the value of the best one that passes its gates; None: none does.

    The intervals are of the level `gate.confidence`; where they overlap, the order of the points is not shown.
    `search` says that the points are those of `train --auto`, of which one went to the end.
    """

    setting: str
    points: list[SweepPoint]
    kl_limit: float
    best: float | None
    search: bool = False


def run(
    config: Config,
    progress: Progress,
    text: str,
    name: str = "dpo",
    data: Path | None = None,
    fresh: bool = False,
    limit: int | None = None,
    backend: str = "local",
) -> SweepResult:
    """Train once for each value.

    Args:
        config: every setting but the swept one.
        progress: where each run stands.
        text: `setting=value,value`, the setting being beta, learning_rate or r.
        name: what the runs' names begin with.
        data: as for `train.run`.
        fresh: start all of them over.
        limit: as for `train.run`.
        backend: where they run.

    Raises:
        UserError: the text is no such thing, r is swept with an SFT adapter at hand, or what `train.run` raises.
    """
    setting, values = parse(text)
    if setting == "r" and config.model.adapter:
        raise UserError(
            "the rank is the SFT adapter's", where="--sweep r", hint="--set model.adapter=none sweeps a fresh LoRA's"
        )
    points = []
    for value, written in values:
        one = copied(config)
        setattr(one.train, setting, value)
        if len(values) > 1 and one.train.keep_reference is None:
            one.train.keep_reference = True  # one pass of the reference serves all runs
        one.model.dpo_adapter = f"{config.model.dpo_adapter}-{setting}-{written}"
        progress.log(f"sweep: {setting} = {written}")
        result = launch.train(
            backend, one, progress, name=f"{name}-{setting}-{written}", data=data, fresh=fresh, limit=limit
        )
        points.append(point_of(value, result))
    within = [point for point in points if point.verdict == "pass" and (point.kl or 0.0) <= config.gate.kl_limit]
    best = max(within, key=lambda point: (point.accuracy or 0.0, -(point.loss or 0.0)), default=None)
    return SweepResult(setting, points, config.gate.kl_limit, best.value if best else None)


def best_said(swept: SweepResult) -> str:
    """Which one is the best, in words, and whether that can be told from chance."""
    if swept.search:
        return f"best: {swept.setting} = {swept.best:g}, of the highest lower bound of the margin; others stopped early"
    if swept.best is None:
        return f"no run stayed within {swept.kl_limit:g} nats a token and passed its gates"
    said = f"best: {swept.setting} = {swept.best:g}, the most accurate of those that pass"
    best, *others = sorted(swept.points, key=lambda point: point.value != swept.best)
    if best.accuracy_interval and any(
        other.accuracy_interval and other.accuracy_interval[1] >= best.accuracy_interval[0] for other in others
    ):
        said += "; the intervals overlap, so the held-out pairs are too few to tell"
    return said


def copied(config: Config) -> Config:
    """A copy of the settings, to be changed."""
    return msgspec.convert(msgspec.to_builtins(config), Config)


def runs_of(swept: SweepResult) -> dict[str, Run]:
    """What the run folders of the points tell, as far as they are on this machine."""
    return {point.run: run_history.read_run(Path(point.run)) for point in swept.points if Path(point.run).is_dir()}


def page_path(swept: SweepResult) -> Path:
    """Where a sweep's page goes: beside its runs, under what their names have in common."""
    first = Path(swept.points[0].run)
    return first.with_name(first.name[: first.name.rindex(f"-{swept.setting}-")] + f"-{swept.setting}.html")


def parse(text: str) -> tuple[str, list[tuple[float, str]]]:
    """Setting and values, each as a number and as written.

    Raises:
        UserError: no such setting, no values, or one that is out of its bounds.
    """
    setting, _, listed = text.partition("=")
    setting = setting.strip().removeprefix("train.")
    written = [value.strip() for value in listed.split(",") if value.strip()]
    if setting not in SETTINGS or not written:
        raise UserError(f"--sweep {text}", hint=f"--sweep SETTING=VALUE,VALUE with one of: {', '.join(SETTINGS)}")
    resolved = [configuration.resolve(sets=[f"train.{setting}={value}"], environment={}).config for value in written]
    return setting, [
        (getattr(one.train, setting), value) for one, value in zip(resolved, dict.fromkeys(written), strict=True)
    ]


def point_of(value: float, result: Trained) -> SweepPoint:
    """What came of a run, side by side with others."""
    metrics, gates = result.metrics, result.gates
    accuracy, margin = gates.get("held_out_accuracy"), gates.get("held_out_margin")
    beta = metrics.get("eval_beta") or 1.0
    return SweepPoint(
        value,
        result.run,
        result.adapter,
        result.verdict,
        accuracy.value if accuracy else None,
        margin.value / beta if margin else None,
        metrics.get("eval_loss"),
        metrics.get(guards.KL),
        accuracy.interval if accuracy else None,
        (margin.interval[0] / beta, margin.interval[1] / beta) if margin and margin.interval else None,
        open_gates(gates),
    )
