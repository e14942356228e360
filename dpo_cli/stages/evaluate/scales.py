"""Win rate and KL along the line through the SFT adapter and the DPO adapter, and the best point of it.

Each scale is an adapter of its own (`training/scale_adapter.py`), sampled and judged like any other: the SFT adapter
answers once, and nothing is asked twice. The best is chosen on one half of the held-out prompts; reported, and given a
verdict, on the other, since the best of several is better on the prompts that chose it than it is. Reads what
`evaluate` reads; writes the scaled adapters in `evaluation/` of `data`, scales.json, and the picked adapter beside
`model.dpo_adapter`. Not covered: adapters on a server, which has those alone that it was given.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_json
from dpo_cli.data.records import split_side
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress
from dpo_cli.stages.evaluate.divergence import Divergence, Unmeasurable, measure
from dpo_cli.stages.evaluate.gates import read_gates
from dpo_cli.stages.evaluate.judging import EvaluationJudge, compare, compare_scores, rate_all
from dpo_cli.stages.evaluate.results import EVEN
from dpo_cli.stages.evaluate.sampling import (
    FOLDER,
    POLICY,
    REFERENCE,
    RunBudget,
    held_out_prompts,
    make_side,
    sample,
)
from dpo_cli.stages.evaluate.win_rate import share_of_wins
from dpo_cli.statistics import Interval
from dpo_cli.training.gates import GateVerdict, compared
from dpo_cli.training.run_folder import publish

if TYPE_CHECKING:
    from dpo_cli.training.scale_adapter import Scaled

RESULT = "scales.json"
MOST = 100.0


class ScalePoint(Struct, kw_only=True):
    """The adapter at one scale against the SFT adapter.

    `win_rate` is on all prompts; `chosen_on` and `reported_on` on either half. `rank` is that of the adapter, `error`
    what reducing it to that left out, as a share of what DPO changed. `ok`: its interval on the first half clears the
    gate, and its KL is within the limit; None where KL can't be measured.
    """

    scale: float
    adapter: str
    rank: int
    error: float
    win_rate: Interval
    chosen_on: Interval
    reported_on: Interval
    kl: Divergence | None
    ok: bool | None


class Scales(Struct, kw_only=True):
    """Every point, in the order of the scales; `picked` is the one that was chosen, and `adapter` where it is now.

    `verdict` is the gate's on the half that did not choose; where no point clears it on the other half within the KL
    limit, `fail`, or `not shown` if one might.
    """

    points: list[ScalePoint]
    gate: float
    kl_limit: float
    n: int
    usd: float
    path: str
    verdict: GateVerdict | None = None
    picked: float | None = None
    adapter: str | None = None


def read_scales(text: str) -> list[float]:
    """The scales of `--scales 0.5,1,1.5`, ascending.

    Raises:
        UserError: one is no positive number.
    """
    try:
        scales = sorted({float(part) for part in text.split(",")})
    except ValueError:
        scales = []
    if not scales or not 0 < scales[0] <= scales[-1] <= MOST:
        raise UserError(f"'{text}' are no scales", where="--scales", hint="--scales 0.5,1,1.5,2")
    return scales


def run(
    config: Config, progress: Progress, scales: list[float], pick: bool = False, limit: int | None = None
) -> Scales:
    """Measure every scale, and pick one if asked to.

    Args:
        config: every setting; the first gate of `evaluate.gate` is what a point must clear, and `gate.kl_limit` the
            most KL in nats a token.
        progress: where to report.
        scales: 0 would be the SFT adapter, 1 is the DPO adapter.
        pick: publish the best point.
        limit: only the first so many prompts.

    Raises:
        UserError: sampling is a server's; an adapter that can't be scaled; what `evaluate` raises.
    """
    if config.generate.engine == "endpoint" and config.generate.url:
        hint = "--engine transformers samples in this process"
        raise UserError("a server has no scaled adapters", where="generate.url", hint=hint)
    gate = next(iter(read_gates(config.evaluate.gates).values()), EVEN)
    budget = RunBudget(config.evaluate.max_usd)
    bench = EvaluationJudge(config, progress, budget)
    prompts = held_out_prompts(config, progress, limit)
    reference_side = make_side(REFERENCE, config, progress)
    reference = sample(reference_side, prompts, progress, budget).rows
    points = []
    for scale in scales:
        made = _adapter(config, scale)
        progress.log(f"scale {scale:g}: rank {made.rank}, off by {made.error:.2g} of what DPO changed")
        mine = replace(config, model=replace(config.model, dpo_adapter=made.path))
        side = make_side(POLICY, mine, progress)
        policy = sample(side, prompts, progress, budget).rows
        absolute = bench.absolute
        scores = rate_all(bench, reference, policy) if absolute else []
        found = compare_scores(reference, policy, *scores) if absolute else compare(bench, reference, policy)
        if not found:
            raise UserError(f"scale {scale:g}: no prompt has a result", hint="nothing-dpo evaluate says why")
        if len(found) < len(prompts):
            progress.log(f"scale {scale:g}: {len(prompts) - len(found)} of {len(prompts)} prompts have no result")
        kl: Divergence | None = None
        try:
            if config.evaluate.kl_prompts:
                kl = measure(reference_side, side, prompts, mine, progress, budget)
        except Unmeasurable as error:
            progress.log(f"scale {scale:g}: no KL: {error}")
        points.append(_point(made, {key: one.win for key, one in found.items()}, kl, gate, config))
    result = Scales(
        points=points,
        gate=gate,
        kl_limit=config.gate.kl_limit,
        n=len(prompts),
        usd=sum(judgment.usd for judgment in bench.heard.values()),
        path=str(Path(config.data) / RESULT),
    )
    if pick:
        _pick(result, config)
    write_json(Path(result.path), result)
    return result


def _point(made: "Scaled", wins: dict[str, float], kl: Divergence | None, gate: float, config: Config) -> ScalePoint:
    halves: dict[bool, list[float]] = {True: [], False: []}
    for key, win in wins.items():
        halves[split_side(key, config.evaluate.seed, 0.5)].append(win)
    chosen, reported = _rate(halves[True], config), _rate(halves[False], config)
    clears = chosen.low > gate
    return ScalePoint(
        scale=made.scale,
        adapter=made.path,
        rank=made.rank,
        error=made.error,
        win_rate=_rate(list(wins.values()), config),
        chosen_on=chosen,
        reported_on=reported,
        kl=kl,
        ok=(clears and kl.nats_per_token <= config.gate.kl_limit) if kl else (None if clears else False),
    )


def best(points: list[ScalePoint]) -> ScalePoint | None:
    """Of the points that are `ok` the one that wins most on the prompts that choose; of equals the nearest."""
    good = [point for point in points if point.ok]
    return max(good, key=lambda point: (point.chosen_on.value, -point.scale), default=None)


def _pick(result: Scales, config: Config) -> None:
    point = best(result.points)
    if point is None:
        near = [one for one in result.points if one.kl is None or one.kl.nats_per_token <= result.kl_limit]
        open_ = any(compared(one.chosen_on, result.gate).ok is None for one in near)
        result.verdict = "not shown" if open_ else "fail"
        return
    result.verdict = compared(point.reported_on, result.gate).verdict
    result.picked, result.adapter = point.scale, config.model.dpo_adapter
    if point.scale != 1:
        result.adapter = f"{config.model.dpo_adapter}-x{point.scale:g}"
        publish(Path(point.adapter), Path(result.adapter), config.model.base)


def _adapter(config: Config, scale: float) -> "Scaled":
    """The adapter at a scale; the DPO adapter itself at 1."""
    from dpo_cli.training.scale_adapter import Scaled, rank_of, scale_adapter

    policy = Path(config.model.dpo_adapter)
    if scale == 1:
        return Scaled(path=str(policy), scale=1.0, rank=rank_of(policy), error=0.0)
    reference = Path(config.model.adapter) if config.model.adapter else None
    output = Path(config.data) / FOLDER / f"x{scale:g}"
    return scale_adapter(reference, policy, output, scale, config.model.base)


def _rate(wins: list[float], config: Config) -> Interval:
    if not wins:
        return Interval(EVEN, 0.0, 1.0)
    return share_of_wins(wins, config.evaluate.bootstrap, config.evaluate.seed, config.gate.confidence)
