"""The same run with several values of one setting, side by side.

Each value is a run of its own, `<name>-<setting>-<value>`, with an adapter folder of its own; a killed sweep goes on
where it stopped. Reads and writes what `train` does. Not covered: several settings at once.
"""

from pathlib import Path

import msgspec
from msgspec import Struct

from dpo_cli import backends, guards
from dpo_cli import config as configuration
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress
from dpo_cli.settings import Config
from dpo_cli.train import Trained

SETTINGS = ("beta", "learning_rate", "r")


class Point(Struct):
    """One value of the setting, and what came of it: held out, at the checkpoint that was kept."""

    value: float
    run: str
    adapter: str
    verdict: str | None
    accuracy: float | None
    margin: float | None
    loss: float | None
    kl: float | None


class Swept(Struct):
    """All points, in the order given, and the value of the best one that passes its gates; None: none does."""

    setting: str
    points: list[Point]
    kl_limit: float
    best: float | None


def run(
    config: Config, progress: Progress, text: str, name: str = "dpo", data: Path | None = None, fresh: bool = False,
    limit: int | None = None, backend: str = "local",
) -> Swept:  # fmt: skip
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
        one = msgspec.convert(msgspec.to_builtins(config), Config)
        setattr(one.train, setting, value)
        one.model.dpo_adapter = f"{config.model.dpo_adapter}-{setting}-{written}"
        progress.log(f"sweep: {setting} = {written}")
        train = backends.load(backend).train
        result = train(
            one, progress, stage="dpo", name=f"{name}-{setting}-{written}", data=data, fresh=fresh, limit=limit
        )
        points.append(_point(value, result))
    within = [point for point in points if point.verdict == "pass" and (point.kl or 0.0) <= config.gate.kl_limit]
    best = max(within, key=lambda point: (point.accuracy or 0.0, -(point.loss or 0.0)), default=None)
    return Swept(setting, points, config.gate.kl_limit, best.value if best else None)


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


def _point(value: float, result: Trained) -> Point:
    metrics = result.metrics
    return Point(
        value, result.run, result.adapter, result.verdict, metrics.get("eval_rewards/accuracies"),
        metrics.get(guards.MARGIN), metrics.get("eval_loss"), metrics.get(guards.KL),
    )  # fmt: skip
