"""Is the DPO adapter better than the SFT adapter? Both answer held-out prompts, and a judge compares them blind.

Reads the prompts of `evaluate.prompts`, or those of val.jsonl; writes in `data` evaluation.jsonl, a line a prompt with
both adapters' completions as they came (`generate.keep_lines` does not apply), their scores and the verdicts, the
policy's losses first, and evaluation.json, the result. What a stopped run goes on from, and what is paid for, stands in
`evaluation/`: nothing is asked twice there. Sampling is that of `[generate]`, engine and settings alike, with seeds of
its own. Not covered: more than two adapters.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from statistics import fmean

import msgspec

from dpo_cli.analysis.judge_audit import audit
from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_json
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Compared, Completions, Prompt
from dpo_cli.endpoint.responses import ADVICE
from dpo_cli.engines import _engine
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.stages.evaluate import forgetting
from dpo_cli.stages.evaluate.divergence import Divergence, Unmeasurable, measure
from dpo_cli.stages.evaluate.findings import find
from dpo_cli.stages.evaluate.gates import check_gates, read_gates
from dpo_cli.stages.evaluate.harness import Harnessed, harness
from dpo_cli.stages.evaluate.judging import (
    EvaluationJudge,
    Scores,
    compare,
    compare_scores,
    comparison_tasks,
    rate_all,
    rating_tasks,
    reasons,
)
from dpo_cli.stages.evaluate.quiz import Quizzed, quiz
from dpo_cli.stages.evaluate.results import EVEN, Evaluation, Planned, Position, Rated, Sides
from dpo_cli.stages.evaluate.sampling import (
    POLICY,
    REFERENCE,
    Answers,
    RunBudget,
    Side,
    forget,
    held_out_prompts,
    known,
    make_side,
    owed,
    sample,
)
from dpo_cli.stages.evaluate.win_rate import distinct, length_controlled_win_rate, repetition, share_of_wins
from dpo_cli.statistics import bootstrap
from dpo_cli.training.fold import folded

__all__ = [
    "Compared",
    "Evaluation",
    "Harnessed",
    "Planned",
    "Quizzed",
    "Rated",
    "Sides",
    "harness",
    "plan",
    "quiz",
    "rate",
    "read_result",
    "run",
]

ROWS, RESULT = "evaluation.jsonl", "evaluation.json"
CHARACTERS_A_TOKEN = 4  # of a completion that is not sampled yet


def run(config: Config, progress: Progress, limit: int | None = None, fresh: bool = False) -> Evaluation:
    """Sample both adapters on the held-out prompts, and have them compared.

    Args:
        config: every setting.
        progress: where to report; units are prompts, then comparisons, then ratings.
        limit: only the first so many prompts.
        fresh: throw away what both have answered before; what is judged of other texts stays.

    Raises:
        UserError: no prompts, a gate that is none, the budget is reached, nothing could be compared, or what the engine
            or the judge raises.
    """
    config = folded(config)
    gates = read_gates(config.evaluate.gates)
    purse = RunBudget(config.evaluate.max_usd)
    bench = EvaluationJudge(config, progress, purse)
    prompts = held_out_prompts(config, progress, limit)
    sides = [make_side(name, config, progress) for name in (REFERENCE, POLICY)]
    if fresh:
        for side in sides:
            forget(side)
    answers = [sample(side, prompts, progress, purse) for side in sides]
    reference, policy = (answer.rows for answer in answers)

    scores: list[Scores] = [{}, {}]
    if bench.absolute:
        scores = rate_all(bench, reference, policy)
        comparisons = compare_scores(reference, policy, *scores)
    else:
        comparisons = compare(bench, reference, policy)
        if config.evaluate.rate and bench.can("rate"):
            scores = rate_all(bench, reference, policy)
    kl, no_kl = _divergence(config, sides, prompts, progress, purse)
    rows = [
        Compared(
            id=key,
            prompt=prompt.messages,
            reference=reference[key].completions,
            policy=policy[key].completions,
            win=comparisons[key].win,
            orders=comparisons[key].orders,
            reference_scores=scores[0].get(key, []),
            policy_scores=scores[1].get(key, []),
        )
        for key, prompt in prompts.items()
        if key in comparisons
    ]
    path = Path(config.data) / ROWS
    if not rows:
        raise _nothing(answers, bench)
    write_rows(path, sorted(rows, key=_gain))

    level = config.gate.confidence
    forgotten = forgetting.measure(config, progress, [side.made_with for side in sides])
    rates = [
        share_of_wins([row.win for row in rows], config.evaluate.bootstrap, config.evaluate.seed, level),
        length_controlled_win_rate([comparisons[row.id].points for row in rows], level),
    ]
    result = Evaluation(
        win_rate=rates[0].value,
        interval=(rates[0].low, rates[0].high),
        length_controlled_win_rate=rates[1].value,
        length_controlled_interval=(rates[1].low, rates[1].high),
        scores=_mean_scores(rows),
        n=len(rows),
        usd=sum(answer.usd for answer in answers) + sum(judgment.usd for judgment in bench.heard.values()),
        wins=sum(row.win > EVEN for row in rows),
        ties=sum(row.win == EVEN for row in rows),
        losses=sum(row.win < EVEN for row in rows),
        lengths=Sides(*(fmean(map(len, _texts(rows, name))) for name in (REFERENCE, POLICY))),
        distinct={n: Sides(*(distinct(_texts(rows, name), n) for name in (REFERENCE, POLICY))) for n in (1, 2)},
        position=_positions(bench),
        kl=kl,
        no_kl=no_kl,
        repetition=Sides(*(repetition(_texts(rows, name)) for name in (REFERENCE, POLICY))),
        forgetting=forgotten,
        gates=check_gates(gates, rates, whole=not bench.waiting)
        | forgetting.gates_of(forgotten, config.gate.forgetting),
        failed=len(prompts) - len(rows),
        skipped=reasons(one.skipped for one in bench.heard.values()),
        errors=reasons([reason for answer in answers for reason in answer.failed])
        | reasons(one.error for one in bench.heard.values()),
        waiting=bench.waiting,
        receipt=purse.receipt,
        path=str(path),
        sides={side.name: side.made_with for side in sides},
        judge=bench.identity,
    )
    result.findings = find(result, rows)
    write_json(Path(config.data) / RESULT, result)
    return result


def rate(config: Config, progress: Progress, name: str, limit: int | None = None) -> Rated:
    """Sample one adapter on the held-out prompts, and have each completion rated by itself.

    Args:
        config: every setting.
        progress: where to report.
        name: `reference` or `policy`.
        limit: only the first so many prompts.

    Raises:
        UserError: the judge rates no single answers, the budget is reached, nothing could be rated, or what the engine
            or the judge raises.
    """
    purse = RunBudget(config.evaluate.max_usd)
    bench = EvaluationJudge(config, progress, purse)
    if not bench.can("rate"):
        raise UserError(f"--judge {config.judge.judge} rates no single answers", where="judge.judge")
    answers = sample(make_side(name, config, progress), held_out_prompts(config, progress, limit), progress, purse)
    (scores,) = rate_all(bench, answers.rows)
    if not scores:
        raise _nothing([answers], bench)
    found = bootstrap([fmean(own) for own in scores.values()], config.evaluate.bootstrap, config.evaluate.seed)
    usd = answers.usd + sum(judgment.usd for judgment in bench.heard.values())
    return Rated(score=found.value, interval=(found.low, found.high), n=len(scores), usd=usd)


def plan(config: Config, progress: Progress, limit: int | None = None) -> Planned:
    """What `run` would do and pay; samples nothing and asks nobody.

    Raises:
        UserError: no prompts, a gate that is none, or a judge that can't be used.
    """
    read_gates(config.evaluate.gates)
    bench = EvaluationJudge(config, progress, RunBudget(None))
    prompts = held_out_prompts(config, progress, limit)
    sides = [make_side(name, config, progress) for name in (REFERENCE, POLICY)]
    requests = [owed(side, prompts, known(side)) for side in sides]
    reference, policy = (_expected(side, prompts) for side in sides)
    tasks = (
        {"compare": [], "rate": []}
        if bench.absolute
        else {
            "compare": [task for key, row in reference.items() for task in comparison_tasks(bench, row, policy[key])],
            "rate": [],
        }
    )
    if bench.can("rate") and (bench.absolute or config.evaluate.rate):
        tasks["rate"] = [
            task for rows in (reference, policy) for row in rows.values() for task in rating_tasks(bench, row)
        ]
    missing = {kind: bench.owed(kind, own) for kind, own in tasks.items()}
    estimates = [bench.estimate(kind, own) for kind, own in missing.items()]
    estimates += [
        _engine.estimate(own, side.config)
        for own, side in zip(requests, sides, strict=True)
        if own and side.config.generate.engine == "endpoint"
    ]
    paid = [estimate for estimate in estimates if estimate is not None]
    return Planned(
        prompts=len(prompts),
        completions=sum(request.need for own in requests for request in own),
        comparisons=len(missing["compare"]),
        ratings=len(missing["rate"]),
        estimate=reduce(add, paid) if paid else None,
    )


def read_result(config: Config) -> Evaluation:
    """The result of the last run.

    Raises:
        UserError: there is none.
    """
    path = Path(config.data) / RESULT
    try:
        return msgspec.json.decode(path.read_bytes(), type=Evaluation)
    except FileNotFoundError:
        raise UserError("no evaluation", where=str(path), hint="nothing-dpo evaluate") from None
    except msgspec.MsgspecError as error:
        raise UserError(f"not an evaluation: {error}", where=str(path), hint="nothing-dpo evaluate") from None


def _divergence(
    config: Config, sides: Sequence[Side], prompts: dict[str, Prompt], progress: Progress, purse: RunBudget
) -> tuple[Divergence | None, str]:
    """KL, or why there is none."""
    if not config.evaluate.kl_prompts:
        return None, "evaluate.kl_prompts is 0"
    try:
        return measure(sides[0], sides[1], prompts, config, progress, purse), ""
    except Unmeasurable as error:
        return None, str(error)
    except UserError as error:
        if error.code != Exit.FAILED:
            raise
        return None, str(error)  # a server that fails at this takes nothing else along


def _gain(row: Compared) -> tuple[float, float]:
    """What evaluation.jsonl is sorted by: the policy's clearest loss comes first."""
    rated = row.reference_scores and row.policy_scores
    return row.win, fmean(row.policy_scores) - fmean(row.reference_scores) if rated else 0.0


def _expected(side: Side, prompts: dict[str, Prompt]) -> dict[str, Completions]:
    """What the side has answered, filled up with texts of the length that is to be expected."""
    settings = side.config.generate
    have = known(side).known
    rows = {}
    for key, prompt in prompts.items():
        texts = have[key].completions if key in have else []
        length = CHARACTERS_A_TOKEN * (settings.max_tokens or _engine.UNLIMITED) // 2
        texts = texts + [f"{side.name} {index}".ljust(length, ".") for index in range(len(texts), settings.n)]
        rows[key] = Completions(
            id=key, prompt=prompt.messages, completions=texts, finish_reasons=[], model="", sampling={}
        )
    return rows


def _texts(rows: Sequence[Compared], name: str) -> list[str]:
    return [text for row in rows for text in getattr(row, name)]


def _mean_scores(rows: Sequence[Compared]) -> Sides | None:
    """Mean ratings over the prompts of which both sides are rated."""
    rated = [
        (fmean(row.reference_scores), fmean(row.policy_scores))
        for row in rows
        if row.reference_scores and row.policy_scores
    ]
    return Sides(*map(fmean, zip(*rated, strict=True))) if rated else None


def _positions(bench: EvaluationJudge) -> dict[str, Position]:
    """What order did to each model of the judge, of comparisons that showed two orders."""
    compared = {key: one for key, one in bench.heard.items() if one.scores and len(one.scores) > 1}
    judges = audit(compared, {}).judges if compared else {}
    return {
        name: Position(found.first_wins, found.between_orders.flips)
        for name, found in judges.items()
        if found.first_wins is not None
    }


def _nothing(answers: Sequence[Answers], bench: EvaluationJudge) -> UserError:
    if bench.waiting:
        message = f"no prompt has a result yet: {bench.waiting:,} requests wait in batches"
        return UserError(message, hint="the same command takes the results in", code=Exit.FAILED)
    failed = [reason for answer in answers for reason in answer.failed]
    why = failed + [one.error or one.skipped or "" for one in bench.heard.values()]
    first = next(filter(None, why), "nothing was answered")
    hint = ADVICE.get(first, "the same command tries again")
    return UserError(f"no prompt has a result: {first}", hint=hint, code=Exit.FAILED)
