"""`train --auto`: finds the learning rate at a part of the steps, and trains the winner to its end.

Successive halving (arXiv:1502.07943): six rates, half a decade apart, go a quarter of a run's steps; the two best go on
to the half, and the better of those to the end. A rate is worth the lower bound of the held-out margin, divided by
beta, of its best evaluation within the KL limit; as long as that is not above 0, what counts is how many standard
errors are missing, since by its bound alone a rate that does nothing would beat all that are not shown yet. An eighth
of the steps would be hardly past the warm-up. Each rate is a run of its own on the whole schedule that rests in
between, so that the winner is the same run, bit for bit, as `train` with that rate, and the number of epochs is found
by its best checkpoint. All of it costs at most two and a half runs, of steps as of evaluations; the reference is asked
once for all. Writes the runs, and in `runs/` NAME-auto.json, what has been decided, so that a killed search goes on as
it would have gone. Not covered: beta, whose effect at a given KL is small; other machines than this one.
"""

import math
from pathlib import Path

import msgspec
from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.files import read_json, write_json
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress
from dpo_cli.stages import train
from dpo_cli.training import plan
from dpo_cli.training.gates import held_out_interval
from dpo_cli.training.guards import KL, MARGIN
from dpo_cli.training.run_folder import publish
from dpo_cli.training.run_history import Trained
from dpo_cli.workflows.sweep import SweepPoint, SweepResult, copied, point_of

RATES = (1 / 30, 1 / 10, 1 / 3, 1.0, 3.0, 10.0)  # times the highest that `inspect plan` takes without a warning
EIGHTHS = ((2, 6), (4, 2), (8, 1))  # how far a round goes, in eighths of the steps, and how many rates go there
LEAST_STEPS = 8


class Search(Struct):
    """What a search will cost: the rates, the steps of one run, of all, and as a multiple of one run."""

    rates: list[float]
    steps: int
    all_steps: int
    runs: float


class _Decision(Struct):
    """The worth of each rate after a round, and those that go on."""

    step: int
    worth: dict[str, float | None]
    kept: list[str]


def planned(config: Config, rows: int) -> Search:
    """What a search on so many pairs will cost.

    Raises:
        UserError: there are too few steps to look at an eighth of them.
    """
    steps = plan.steps(config.train, rows)
    if steps < LEAST_STEPS:
        raise UserError(f"{steps} steps are too few to search in", where="--auto", hint="raise train.num_train_epochs")
    unit = steps // LEAST_STEPS
    done, total = 0, 0
    for eighths, count in EIGHTHS:
        reached = steps if eighths == LEAST_STEPS else eighths * unit
        total, done = total + count * (reached - done), reached
    return Search(rates(config), steps, total, total / steps)


def rates(config: Config) -> list[float]:
    """Learning rates to try; the configured one takes the place of the nearest where it is among them."""
    high = plan.high_rate(config.train)
    tried = [float(f"{high * factor:.1g}") for factor in RATES]
    own = config.train.learning_rate
    if own > 0 and tried[0] <= own <= tried[-1]:
        nearest = min(range(len(tried)), key=lambda place: abs(math.log(tried[place] / own)))
        tried[nearest] = own
    return tried


def run(
    config: Config,
    progress: Progress,
    name: str = "dpo",
    data: Path | None = None,
    fresh: bool = False,
    limit: int | None = None,
) -> SweepResult:
    """Search for the learning rate, and publish the adapter of the best.

    Args:
        config: every setting but the rate, and how often is evaluated.
        progress: where each run stands.
        name: what the runs' names begin with.
        data: as for `train.run`.
        fresh: start all of them over.
        limit: as for `train.run`.

    Raises:
        UserError: nothing is held out, there are too few steps, or what `train.run` raises.
    """
    asked = train.run(config, progress, name=name, data=data, limit=limit, dry_run=True)
    if not asked.held_out:
        raise UserError("a search needs held-out pairs", where="--auto", hint="pair.val_share above 0, and pair again")
    found = planned(config, asked.rows)
    progress.log(said(found))
    journal = Path(config.runs) / f"{name}-auto.json"
    if fresh:
        journal.unlink(missing_ok=True)
    decisions = [msgspec.convert(one, _Decision) for one in read_json(journal)["rounds"]] if journal.exists() else []

    alive = {f"{rate:g}": rate for rate in found.rates}
    results: dict[str, Trained] = {}
    unit = found.steps // LEAST_STEPS
    for number, (eighths, _) in enumerate(EIGHTHS):
        last = eighths == LEAST_STEPS
        step = found.steps if last else eighths * unit
        for key, rate in alive.items():
            if number < len(decisions) and not last:  # decided before; what it measured then is read, not trained
                progress.log(f"auto: {key} was at step {step:,}")
            results[key] = train.run(
                _of_rate(config, rate, unit, key),
                progress,
                name=f"{name}-auto-{key}",
                data=data,
                fresh=fresh and number == 0,
                limit=limit,
                pause_at=None if last else step,
            )
        if last:
            break
        if number == len(decisions):
            decisions.append(_decide(results, alive, step, EIGHTHS[number + 1][1], config))
            write_json(journal, {"rounds": msgspec.to_builtins(decisions)})
        alive = {key: alive[key] for key in decisions[number].kept}
        progress.log(f"auto: at step {step:,} of {found.steps:,} {', '.join(alive)} go on")

    (winner,) = alive
    if alive[winner] in (found.rates[0], found.rates[-1]):
        progress.log(f"auto: {winner} is at the end of what was tried: train.learning_rate beyond it may be better")
    publish(Path(results[winner].adapter), Path(config.model.dpo_adapter), config.model.base)
    points = [_point(rate, results[f"{rate:g}"]) for rate in found.rates]
    return SweepResult("learning_rate", points, config.gate.kl_limit, alive[winner], search=True)


def said(found: Search) -> str:
    """What a search will cost, in words."""
    return (
        f"auto: {len(found.rates)} learning rates from {found.rates[0]:g} to {found.rates[-1]:g}, {found.all_steps:,} "
        f"steps in all: {found.runs:.2f} times one run of {found.steps:,}"
    )


def page_path(config: Config, name: str) -> Path:
    """Where the search's page goes: beside its runs."""
    return Path(config.runs) / f"{name}-auto.html"


def _of_rate(config: Config, rate: float, unit: int, key: str) -> Config:
    one = copied(config)
    one.train.learning_rate = rate
    one.train.eval_steps = one.train.save_steps = unit
    one.train.logging_steps = min(one.train.logging_steps, unit)
    if one.train.keep_reference is None:
        one.train.keep_reference = True  # one pass of the reference serves all runs
    one.model.dpo_adapter = f"{config.model.dpo_adapter}-auto-{key}"
    return one


def _decide(results: dict[str, Trained], alive: dict[str, float], step: int, count: int, config: Config) -> _Decision:
    worth = {key: worth_of(results[key], config) for key in alive}
    # Where all are over the limit, those of the least KL: their rates are lowered on the way.
    kl = {key: results[key].metrics.get(KL, 0.0) for key in alive}
    order = sorted(alive, key=lambda key: (worth[key] is None, kl[key] if worth[key] is None else -(worth[key] or 0.0)))
    return _Decision(step, worth, order[:count])


def worth_of(result: Trained, config: Config) -> float | None:
    """What a rate has shown: the lower bound of the held-out margin over beta, in nats, where that is above 0.

    Else, below 0, the standard errors that the margin lacks for it. None: over the KL limit, or not a number.
    """
    metrics = result.metrics
    if MARGIN not in metrics or not metrics.get(KL, 0.0) <= config.gate.kl_limit:
        return None
    margin = held_out_interval(metrics, MARGIN, result.held_out, config.gate.confidence)
    if not math.isfinite(margin.low):
        return None
    if margin.low > 0:
        return float(margin.low / metrics.get("eval_beta", 1.0))
    return float(margin.low / margin.error) if margin.error else 0.0


def _point(rate: float, result: Trained) -> SweepPoint:
    point = point_of(rate, result)
    point.step = result.step
    return point
