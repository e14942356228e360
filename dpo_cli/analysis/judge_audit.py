"""What a judge is worth: does its taste depend on order, on length, on the day? Pure numbers, as `--json` prints them.

Takes judgments and the completions that they are about; reads and writes nothing. Intervals are 95% and take prompts,
orders and pairs as independent, which those of one prompt are not quite. Whether the judge's taste is that of its
owner is not covered: `--judge human` compares the two.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, combinations
from statistics import fmean

from msgspec import Struct, field

from dpo_cli.analysis.length_bias import length_slope, within, without_length_effect
from dpo_cli.data.records import Completions, Judgment, Order, Usage, judge_name
from dpo_cli.judges._agreement import agree
from dpo_cli.judges._ranking import label_of
from dpo_cli.statistics import Histogram, Interval, Spread, histogram, normal, proportion, spread

POINTS = 300  # of a scatter plot; more say no more
SKIPPED_MUCH = 0.1
RELIABLE, TENTATIVE = 0.8, 0.667  # thresholds of α: Krippendorff, "Content Analysis" (2004), p. 241

# Completion -> score, of one reply of a judge.
ScoreByIndex = dict[int, float]


class Reliability(Struct):
    """How alike several ratings of the same completions are.

    `flips` is the share of the candidate pairs whose order two ratings of a prompt invert; `tau` is Kendall's τ-b over
    all those pairs; `alpha` is Krippendorff's α, interval metric, with the completions as units.
    """

    flips: Interval | None
    tau: float | None
    alpha: float | None


class JudgeAudit(Struct, kw_only=True):
    """One judge: a model of a panel, or whoever the file names.

    `first_wins` counts the orders in which the completion shown first has the single highest score, of those that
    have one; a judge without position bias would reach `expected_first`, the mean of 1/N. `undecided` counts the
    others. `places` is, for each place of display, the mean of the score less the mean of its order.
    """

    judgments: int
    orders: int
    first_wins: Interval | None
    expected_first: float | None
    undecided: int
    places: list[Interval]
    between_orders: Reliability
    scores: Histogram | None


class LengthEffect(Struct):
    """What length does to the scores.

    `slope` is in points per 100 characters, within prompts; `longer_chosen` is the share of the prompts in which the
    best completion is longer than the worst, of those where they differ in score and length. `points` are some
    completions as (100 characters, points), less the means of their prompt.
    """

    slope: Interval | None
    longer_chosen: Interval | None
    points: list[tuple[float, float]]


class Example(Struct):
    """One judgment to look at, and why."""

    why: str
    judgment: Judgment
    completions: Completions | None


class Audit(Struct, kw_only=True):
    """`inspect judgments --stats`.

    `between_judges` compares the mean scores of the judges that rated the same prompts. `consistent` counts prompts
    whose best and worst no order inverts. `length_controlled` is `length` after the slope was removed. `flagged`
    counts completions by what is suspicious about them. `findings` says what stands out, in words, with commands in
    backticks.
    """

    total: int
    judged: int
    skipped_share: Interval | None
    skipped: dict[str, int]
    errors: dict[str, int]
    consistent: Interval | None
    scores: Spread | None
    gaps: Spread | None
    judges: dict[str, JudgeAudit]
    between_judges: Reliability | None
    length: LengthEffect
    length_controlled: LengthEffect
    usage: Usage
    usd: float
    examples: list[Example]
    flagged: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


def audit(judgments: Mapping[str, Judgment], completions: Mapping[str, Completions]) -> Audit:
    """Everything that the judgments tell about their judge.

    Args:
        judgments: by id; a row without scores is a skip or an error.
        completions: by id; where one is missing or has changed since, its judgment counts in no length.
    """
    rows = judgments.values()
    judged = [row for row in rows if row.scores]
    gaps = [max(row.scores) - min(row.scores) for row in judged if row.scores]
    skipped = Counter(row.skipped.partition(":")[0] for row in rows if row.skipped is not None)
    known = [row.consistent for row in judged if row.consistent is not None]
    judges, between = _judges(judged)
    result = Audit(
        total=len(judgments),
        judged=len(judged),
        skipped_share=proportion(skipped.total(), len(judgments)),
        skipped=dict(skipped.most_common()),
        errors=dict(Counter(row.error.partition(":")[0] for row in rows if row.error is not None).most_common()),
        consistent=proportion(sum(known), len(known)),
        scores=spread([score for row in judged for score in row.scores or []]),
        gaps=spread(gaps),
        judges=judges,
        between_judges=between,
        length=_length(judgments, completions),
        length_controlled=_length(without_length_effect(judgments, completions), completions),
        usage=sum((row.usage for row in rows), Usage()),
        usd=sum(row.usd for row in rows),
        examples=_examples(rows, completions),
    )
    reasons = Counter(reason for row in rows for flags in row.flags.values() for reason in flags)
    result.flagged = dict(reasons.most_common())
    result.findings = _findings(result)
    return result


def krippendorff_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's α with the interval metric (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability").

    α = 1 − observed / expected disagreement. With the squared difference as metric, the sum over ordered pairs of m
    values is 2m times their scatter around the mean, so no matrix of coincidences is needed.

    Args:
        units: the values that each unit was given, by whatever raters; a unit with one value pairs with nothing.

    Returns:
        1 where all agree, 0 for chance; None if no two values differ.
    """
    pairable = [unit for unit in units if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    expected = _scatter(values) * len(values) / (len(values) - 1) if values else 0.0
    if expected == 0:
        return None
    return 1 - sum(_scatter(unit) * len(unit) / (len(unit) - 1) for unit in pairable) / expected


def verdict(alpha: float) -> str:
    """What Krippendorff would conclude from an α."""
    return "reliable" if alpha >= RELIABLE else "tentative" if alpha >= TENTATIVE else "unreliable"


def _scatter(values: Sequence[float]) -> float:
    mean = fmean(values)
    return sum((value - mean) ** 2 for value in values)


def reliability(ratings: Sequence[Sequence[ScoreByIndex]]) -> Reliability:
    """Compare the ratings of each prompt with each other.

    Args:
        ratings: for each prompt its ratings, each completion -> score; a completion may be missing.
    """
    ours: dict[str, Judgment] = {}
    theirs: dict[str, Judgment] = {}
    units: list[list[float]] = []
    for of_prompt in ratings:
        for one, two in combinations(of_prompt, 2):
            common = sorted(one.keys() & two.keys())
            key = str(len(ours))
            seen = [Order(list(range(len(common))), {}, "")]
            ours[key] = Judgment(id=key, completions_id="", scores=[one[index] for index in common], orders=seen)
            theirs[key] = Judgment(id=key, completions_id="", scores=[two[index] for index in common])
        rated = sorted({index for rating in of_prompt for index in rating})
        units += [[rating[index] for rating in of_prompt if index in rating] for index in rated]
    found = agree(ours, theirs)
    return Reliability(proportion(found.contrary, found.pairs), found.tau, krippendorff_alpha(units))


def _judges(judged: Sequence[Judgment]) -> tuple[dict[str, JudgeAudit], Reliability | None]:
    """Each judge by itself, and all of them beside each other where there are several."""
    orders: dict[str, list[list[Order]]] = defaultdict(list)  # by judge, then by prompt
    direct: dict[str, list[float]] = defaultdict(list)  # scores of judges that see one completion at a time
    panels: list[list[ScoreByIndex]] = []
    for row in judged:
        by_judge: dict[str, list[Order]] = defaultdict(list)
        for order in row.orders or []:
            by_judge[order.model or judge_name(row)].append(order)
        for name, seen in by_judge.items():
            orders[name].append(seen)
        if not by_judge:
            direct[judge_name(row)] += row.scores or []
            orders[judge_name(row)].append([])
        if len(by_judge) > 1:
            panels.append([_mean([_given(order) for order in seen]) for seen in by_judge.values()])
    judges = {name: _judge(prompts, direct[name]) for name, prompts in orders.items()}
    return judges, reliability(panels) if panels else None


def _judge(prompts: Sequence[Sequence[Order]], direct: Sequence[float]) -> JudgeAudit:
    ratings = [[_given(order) for order in orders] for orders in prompts]
    scores = [score for of_prompt in ratings for rating in of_prompt for score in rating.values()]
    first = decided = undecided = 0
    expected = 0.0
    by_place: dict[int, list[float]] = defaultdict(list)
    for order, rating in zip(chain.from_iterable(prompts), chain.from_iterable(ratings), strict=True):
        if len(rating) < max(2, len(order.order)):
            continue
        mean, best = fmean(rating.values()), max(rating.values())
        for place, index in enumerate(order.order):
            by_place[place].append(rating[index] - mean)
        if sum(score == best for score in rating.values()) > 1:
            undecided += 1
            continue
        decided += 1
        first += rating[order.order[0]] == best
        expected += 1 / len(rating)
    return JudgeAudit(
        judgments=len(prompts),
        orders=sum(map(len, prompts)),
        first_wins=proportion(first, decided),
        expected_first=expected / decided if decided else None,
        undecided=undecided,
        places=[_mean_interval(by_place[place]) for place in sorted(by_place)],
        between_orders=reliability(ratings),
        scores=histogram(scores or direct),
    )


def _given(order: Order) -> ScoreByIndex:
    """Completion -> score of one reply; what it left out is missing."""
    labelled = ((index, order.scores.get(label_of(place))) for place, index in enumerate(order.order))
    return {index: score for index, score in labelled if score is not None}


def _mean(ratings: Sequence[ScoreByIndex]) -> ScoreByIndex:
    rated = {index for rating in ratings for index in rating}
    return {index: fmean(rating[index] for rating in ratings if index in rating) for index in rated}


def _mean_interval(values: Sequence[float]) -> Interval:
    n = len(values)
    return normal(fmean(values), math.sqrt(_scatter(values) / (n - 1) / n) if n > 1 else math.inf, n)


def _length(judgments: Mapping[str, Judgment], completions: Mapping[str, Completions]) -> LengthEffect:
    prompts = within(judgments, completions)
    longer = unequal = 0
    for key, deviations in prompts.items():
        ranked = [deviations[index] for index in judgments[key].ranking or [] if index in deviations]
        (best, best_score), (worst, worst_score) = ranked[0], ranked[-1]
        if best_score != worst_score and best != worst:
            longer += best > worst
            unequal += 1
    slope = length_slope(prompts.values())
    points = [point for deviations in prompts.values() for point in deviations.values()]
    return LengthEffect(
        normal(slope.value, slope.error, slope.n) if slope else None,
        proportion(longer, unequal),
        points[:: max(1, math.ceil(len(points) / POINTS))],
    )


def _examples(rows: Iterable[Judgment], completions: Mapping[str, Completions]) -> list[Example]:
    """The largest gap, the largest that an order inverts, and a skipped one; of equals the one with the lowest id."""
    kinds: dict[str, list[Judgment]] = {"largest gap": [], "an order inverts it": [], "skipped": []}
    for row in rows:
        if row.scores:
            kinds["an order inverts it" if row.consistent is False else "largest gap"].append(row)
        elif row.skipped is not None:
            kinds["skipped"].append(row)
    found = []
    for why, candidates in kinds.items():
        if candidates:
            row = min(candidates, key=lambda row: (-_gap(row), row.id))
            found.append(Example(why, row, completions.get(row.id)))
    return found


def _gap(row: Judgment) -> float:
    return max(row.scores) - min(row.scores) if row.scores else 0.0


def _findings(found: Audit) -> list[str]:
    """What a careful person would want to know before training on this."""
    said = []
    for name, judge in found.judges.items():
        wins, expected = judge.first_wins, judge.expected_first
        if wins is not None and expected is not None and not wins.holds(expected):
            verb = "prefers" if wins.value > expected else "avoids"
            said.append(
                f"{name} {verb} what it is shown first: best in {wins.value:.0%} of the orders, "
                f"where {expected:.0%} would be chance. More orders average it out: `judge --votes 6`."
            )
        alpha = judge.between_orders.alpha
        if alpha is not None and alpha < TENTATIVE:
            said.append(f"{name} depends on the order: α {alpha:.2f}; below {TENTATIVE}, trust no single score.")
    slope, longer = found.length.slope, found.length.longer_chosen
    if slope is not None and not slope.holds(0):
        share = f", and the longer one is chosen in {longer.value:.0%}" if longer else ""
        said.append(
            f"{'Longer' if slope.value > 0 else 'Shorter'} completions score higher: {slope.value:+.2f} points per "
            f"100 characters{share}. `pair --length-control` removes it."
        )
    if found.skipped_share is not None and found.skipped_share.value > SKIPPED_MUCH:
        most = next(iter(found.skipped))
        said.append(f"{found.skipped_share.value:.0%} of the prompts are skipped, most for: {most}.")
    if found.flagged:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in found.flagged.items())
        said.append(f"Some completions look as if they were written for the judge: {reasons}.")
    if failed := sum(found.errors.values()):
        said.append(f"{failed:,} prompt{'s' * (failed > 1)} failed: `nothing-dpo judge` asks again.")
    return said
