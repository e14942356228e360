"""Which judge agrees with a person, and at what price: `judge --gold FILE` with one `--model` or several.

Reads pairs that a person has ranked, in any format that `pair --import` reads, or the judgments.jsonl of
`--judge human` with the completions.jsonl beside it. Each judge ranks them as it would rank completions; what it said
is kept in `gold/` of the data folder, so that nothing is paid twice, and completions and judgments are not touched. Not
covered: several persons who disagree, and whether these prompts are like those of the job.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from dpo_cli import judges
from dpo_cli.analysis.judge_audit import JudgeAudit, audit
from dpo_cli.config.settings import Config
from dpo_cli.data.formats.preferences import read_row
from dpo_cli.data.formats.ratings import ScoredAnswers
from dpo_cli.data.jsonl import read_latest
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Completions, Judgment, canonical, completions_id, content_id, text_of
from dpo_cli.data.resumable import Resumable
from dpo_cli.endpoint.costs import Estimate, Receipt
from dpo_cli.endpoint.prices import price_of
from dpo_cli.errors import UserError
from dpo_cli.judges._task import Task, make_task
from dpo_cli.progress import Progress
from dpo_cli.statistics import Interval, count_alike, normal, wilson

FOLDER = "gold"
FEW = 100  # prompts, below which judges must differ much to be told apart
HINT = "pairs that a person ranked: the judgments.jsonl of --judge human, or rows of prompt, chosen, rejected"


class GoldRow(Struct):
    """One prompt's answers, and what a person thinks of each: more is better."""

    completions: Completions
    worth: list[float]


class _Answers(Struct):
    """One judge, its settings, and each gold row with its judgment."""

    name: str
    config: Config
    rows: list[tuple[GoldRow, Judgment | None]]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the person's pairs that it orders alike, of each prompt that it judged."""
        return {row.completions.id: _agreement(row, one.scores) for row, one in self.rows if one and one.scores}


class MeasuredJudge(Struct, kw_only=True):
    """One judge on the gold pairs.

    `agreement` is the share of the person's pairs that it orders alike, a tie counted half: the mean over prompts, with
    the Wilson interval of so many prompts. `difference` is that to the judge that agrees best, prompt by prompt.
    Dollars are None where nobody knows the price. `first_wins` is how often it prefers what it is shown first, where
    `expected_first` would be chance; `flips` the share of pairs that two orders invert.
    """

    name: str
    prompts: int
    agreement: Interval | None
    ties: float
    difference: Interval | None = None
    usd_per_1000: float | None = None
    first_wins: Interval | None = None
    expected_first: float | None = None
    flips: Interval | None = None
    skipped: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


class GoldReport(Struct, kw_only=True):
    """What `judge --gold` found, or with `dry_run` would ask.

    `best` agrees best; `cheapest` is the cheapest judge that is not worse than it: zero lies in the interval of their
    difference. `usd` is of everything kept for these judges, `receipt` of this run's paid calls.
    """

    path: str
    prompts: int
    pairs: int
    judges: list[MeasuredJudge]
    calls: int = 0
    best: str | None = None
    cheapest: str | None = None
    findings: list[str] = field(default_factory=list)
    usd: float = 0.0
    receipt: Receipt | None = None
    estimate: Estimate | None = None


def run(config: Config, progress: Progress, gold: Path, limit: int | None = None, dry_run: bool = False) -> GoldReport:
    """Measure each judge on pairs that a person has ranked.

    Args:
        config: every setting; each model of `judge.model` is a judge of its own.
        progress: where to report; units are prompts.
        gold: the file.
        limit: only the first so many prompts of it.
        dry_run: only say what is owed.

    Raises:
        UserError: no such pairs, `judge.max_usd` is reached, or what the judge raises.
    """
    rows = read_gold(gold, Path(config.data))[:limit]
    folder = Path(config.data) / FOLDER
    report = GoldReport(path=str(gold), prompts=len(rows), pairs=sum(len(_pairs(row)) for row in rows), judges=[])
    measured: list[_Answers] = []
    with Resumable(folder / "judgments.jsonl", Judgment, dry_run=dry_run) as judgments:
        for name, own in _each(config, folder):
            judge: Any = judges.load(own.judge.judge)
            identity = judge.identity(own)
            tasks = [_task(row, identity) for row in rows]
            owed = _owed(tasks, judgments)
            report.calls += judge.calls((len(task.shown) for task in owed), own)
            if dry_run:
                _add_estimate(report, judge, owed, own)
                continue
            if owed:
                with judgments.reporting(progress, name, len(tasks), len(owed)) as delivery:
                    _ask(judge, owed, own, identity, judgments, delivery, report)
            answers = _Answers(
                name, own, [(row, judgments.known.get(task.id)) for row, task in zip(rows, tasks, strict=True)]
            )
            measured.append(answers)
            report.judges.append(_measure(answers))
            report.usd += sum(one.usd for _, one in answers.rows if one)
    _compare(report, {answers.name: answers.shares for answers in measured})
    return report


def _each(config: Config, folder: Path) -> list[tuple[str, Config]]:
    """Each judge by its name, with settings that know of no other."""
    own = replace(config, data=str(folder))
    if config.judge.judge != "llm":
        return [(config.judge.judge, own)]
    if not config.judge.models:
        raise UserError("no judge model", where="judge.model", hint="--model NAME, several times")
    return [(model, replace(own, judge=replace(config.judge, model=model))) for model in config.judge.models]


def _owed(tasks: Sequence[Task], judgments: Resumable[Judgment]) -> list[Task]:
    """What has no verdict yet, with the number of runs that failed on it."""
    owed = list(judgments.missing({task.id: task for task in tasks}, lambda old, _: old.error is None).values())
    for task in owed:
        task.failures = judgments.known[task.id].failures if task.id in judgments.known else 0
    return owed


def _ask(
    judge: Any,
    owed: list[Task],
    config: Config,
    identity: dict[str, Any],
    judgments: Resumable[Judgment],
    progress: Progress,
    report: GoldReport,
) -> None:
    """Have one judge judge what it owes, from what is left of the budget."""
    cap, spent = config.judge.max_usd, report.receipt.usd if report.receipt else 0.0
    config = replace(config, judge=replace(config.judge, max_usd=None if cap is None else max(0.0, cap - spent)))

    def deliver(judgment: Judgment) -> None:
        judgment.judge = identity
        judgments.deliver(judgment)

    receipt = judge.judge(owed, config, deliver, progress)
    if receipt is not None:
        report.receipt = report.receipt + receipt if report.receipt else receipt


def _add_estimate(report: GoldReport, judge: Any, owed: Sequence[Task], config: Config) -> None:
    if (estimate := getattr(judge, "estimate", None)) is not None:
        one = estimate(owed, config)
        report.estimate = report.estimate + one if report.estimate else one


def read_gold(path: Path, data: Path) -> list[GoldRow]:
    """The pairs or rankings of a person.

    Args:
        path: the file.
        data: where the completions of judgments are, if they are not beside them.

    Raises:
        UserError: there are none, or their completions are not there.
    """
    if not path.is_file():
        raise UserError("no such file", where=str(path), hint=HINT)
    with path.open("rb") as file:
        is_judgments = b'"completions_id"' in file.readline()
    rows = _from_judgments(path, data) if is_judgments else _from_pairs(path)
    rows = [row for row in rows if _pairs(row)]
    if not rows:
        raise UserError("no answer in it is ranked above another", where=str(path), hint=HINT)
    return rows


def _from_pairs(path: Path) -> list[GoldRow]:
    """Rows of any format that `pair --import` reads: pairs, or answers that a person has scored."""
    found: dict[str, GoldRow] = {}
    for _, (_, one) in parse_rows(path, read_row, headerless=("prompt", "good", "bad")):
        if isinstance(one, ScoredAnswers):
            answers, worth = one.answers, one.scores
        else:
            answers, worth = [one.chosen, one.rejected], [1.0, 0.0]
        texts = list(map(text_of, answers))
        key = content_id(one.prompt, one.tools, texts)
        row = Completions(
            id=key, prompt=one.prompt, completions=texts, finish_reasons=[], model="", sampling={}, tools=one.tools
        )
        found[key] = GoldRow(row, worth)
    return list(found.values())


def _from_judgments(path: Path, data: Path) -> list[GoldRow]:
    beside = path.with_name("completions.jsonl")
    texts = beside if beside.is_file() else data / "completions.jsonl"
    completions = read_latest(texts, Completions)
    found = []
    for key, judgment in read_latest(path, Judgment).items():
        row = completions.get(key)
        if row is None or not judgment.scores:
            continue
        if judgment.completions_id == completions_id(row.completions, row.messages):
            found.append(GoldRow(row, judgment.scores))
    if not found:
        raise UserError(f"none of its judgments is of the completions in {texts}", where=str(path), hint=HINT)
    return found


def _task(row: GoldRow, identity: Mapping[str, Any]) -> Task:
    """What a judge is asked; its id depends on all that its answer does."""
    task = make_task(row.completions, lambda text: bool(canonical(text)))
    task.id = content_id("gold", identity, task.prompt, task.tools, task.completions)
    return task


def _pairs(row: GoldRow) -> list[tuple[int, int]]:
    """(better, worse) of different texts that a judge can see."""
    shown = make_task(row.completions, lambda text: bool(canonical(text))).shown
    ordered = [(one, two) if row.worth[one] > row.worth[two] else (two, one) for one, two in combinations(shown, 2)]
    return [(better, worse) for better, worse in ordered if row.worth[better] != row.worth[worse]]


def _agreement(row: GoldRow, scores: Sequence[float]) -> float:
    """The share of a prompt's pairs that the scores order as the person does, a tie counted half."""
    won = [
        0.5 if scores[better] == scores[worse] else float(scores[better] > scores[worse])
        for better, worse in _pairs(row)
    ]
    return fmean(won)


def _measure(answers: _Answers) -> MeasuredJudge:
    """What one judge's verdicts say of it."""
    found = [one for _, one in answers.rows if one]
    judged = {one.id: one for one in found if one.scores}
    tied = [
        float(one.scores[better] == one.scores[worse])
        for row, one in answers.rows
        if one and one.scores
        for better, worse in _pairs(row)
    ]
    paid = sum(one.usd for one in found)
    settings = answers.config.judge
    known = settings.judge != "llm" or price_of(settings.url, answers.name, settings.price) is not None
    return MeasuredJudge(
        name=answers.name,
        prompts=len(judged),
        agreement=_share(list(answers.shares.values())),
        ties=fmean(tied) if tied else 0.0,
        usd_per_1000=1000 * paid / len(judged) if judged and known else None,
        skipped=count_alike(one.skipped for one in found),
        errors=count_alike(one.error for one in found),
        **_position(next(iter(audit(judged, {}).judges.values()), None)),
    )


def _position(own: JudgeAudit | None) -> dict[str, Any]:
    if own is None:
        return {}
    return {"first_wins": own.first_wins, "expected_first": own.expected_first, "flips": own.between_orders.flips}


def _share(values: Sequence[float]) -> Interval | None:
    if not values:
        return None
    low, high = wilson(sum(values), len(values))
    return Interval(fmean(values), low, high, n=len(values))


def _mean(values: Sequence[float]) -> Interval:
    mean = fmean(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return normal(mean, math.sqrt(spread / len(values)), len(values))


def _compare(report: GoldReport, shares: Mapping[str, Mapping[str, float]]) -> None:
    """Name the best judge and the cheapest that is not worse, and say what the numbers can't."""
    rated = [one for one in report.judges if one.agreement is not None]
    if not rated:
        return  # a dry run, or nobody judged anything
    best = max(rated, key=_value)
    report.best = best.name
    for one in rated:
        both = [key for key in shares[one.name] if key in shares[best.name]]
        if one is not best and both:
            one.difference = _mean([shares[one.name][key] - shares[best.name][key] for key in both])
    fine = [one for one in rated if one is best or (one.difference is not None and one.difference.high >= 0)]
    priced = [one for one in sorted(fine, key=_value, reverse=True) if one.usd_per_1000 is not None]
    if priced:
        report.cheapest = min(priced, key=lambda one: one.usd_per_1000 or 0.0).name
    report.findings = _findings(report, rated, best)


def _value(one: MeasuredJudge) -> float:
    return one.agreement.value if one.agreement else 0.0


def _findings(report: GoldReport, rated: Sequence[MeasuredJudge], best: MeasuredJudge) -> list[str]:
    said = []
    if len(rated) > 1 and report.cheapest:
        is_best = report.cheapest == best.name
        rest = "which agrees best" if is_best else f"not worse than {best.name}, which agrees best"
        said.append(f"The cheapest judge to take is {report.cheapest}, {rest}.")
    if unpriced := [one.name for one in rated if one.usd_per_1000 is None]:
        said.append(f"Nobody knows what {', '.join(unpriced)} costs there: `--price IN,CACHED,OUT`.")
    widest = max((one.difference.high - one.difference.low for one in rated if one.difference), default=0.0)
    if len(rated) > 1 and (report.prompts < FEW or widest > 0.2):
        half = widest / 2 or (best.agreement.high - best.agreement.low) / 2 if best.agreement else 0.5
        said.append(f"{report.prompts} prompts do not tell judges apart that differ by less than {half:.0%}.")
    if best.agreement and best.agreement.low <= 0.5:
        said.append(f"{best.name} may agree no more than chance: its interval holds 50%.")
    for one in rated:
        wins, chance = one.first_wins, one.expected_first
        if wins and chance and not wins.holds(chance):
            verb = "prefers" if wins.value > chance else "avoids"
            said.append(f"{one.name} {verb} what it is shown first: {wins.value:.0%}, where {chance:.0%} is chance.")
        if one.prompts < 0.9 * report.prompts:
            said.append(f"{one.name} has no verdict on {report.prompts - one.prompts:,} of {report.prompts:,} prompts.")
    return said
