"""What a judge is worth: does its taste depend on order, on length, on the day? Pure numbers, as `--json` prints them.

Takes judgments and the completions that they are about; reads and writes nothing. Intervals are 95% and take prompts,
orders and pairs as independent, which those of one prompt are not quite. Whether the judge's taste is that of its
owner is not covered: `--judge human` compares the two.
"""

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean

from msgspec import Struct, field

from dpo_cli.analysis.length_bias import Deviations, Points, controlled, deviations, rescored
from dpo_cli.analysis.reliability import TENTATIVE, Ratings, Reliability, ScoreByIndex, scatter
from dpo_cli.data.records import Completions, Judgment, Order, Usage, judge_name
from dpo_cli.judges._ranking import label_of
from dpo_cli.statistics import Histogram, Interval, Spread, histogram, normal, proportion, spread

POINTS = 300  # of a scatter plot; more say no more
SKIPPED_MUCH = 0.1


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

    Each judgment is looked at in its turn, twice in all, and of none but the examples more than numbers is kept: the
    mappings may read their rows from a file.

    Args:
        judgments: by id; a row without scores is a skip or an error.
        completions: by id; where one is missing or has changed since, its judgment counts in no length.
    """
    scores, gaps, usd = array("d"), array("d"), array("d")
    skipped, errors, flagged = Counter[str](), Counter[str](), Counter[str]()
    consistent = Counter[bool]()
    usage, judges, lengths, examples = Usage(), _Judges(), _Lengths(), _Examples()
    for key, row in judgments.items():
        usage += row.usage
        usd.append(row.usd)
        flagged.update(reason for flags in row.flags.values() for reason in flags)
        if row.skipped is not None:
            skipped[row.skipped.partition(":")[0]] += 1
        if row.error is not None:
            errors[row.error.partition(":")[0]] += 1
        examples.add(row)
        if not row.scores:
            continue
        scores.extend(row.scores)
        gaps.append(max(row.scores) - min(row.scores))
        if row.consistent is not None:
            consistent[row.consistent] += 1
        judges.add(row)
        lengths.add(deviations(row, completions.get(key)), row.ranking or [])
    result = Audit(
        total=len(judgments),
        judged=len(gaps),
        skipped_share=proportion(skipped.total(), len(judgments)),
        skipped=dict(skipped.most_common()),
        errors=dict(errors.most_common()),
        consistent=proportion(consistent[True], consistent.total()),
        scores=spread(scores),
        gaps=spread(gaps),
        judges=judges.result(),
        between_judges=judges.between(),
        length=lengths.result(),
        length_controlled=_controlled(judgments, completions, lengths).result(),
        usage=usage,
        usd=sum(usd),
        examples=examples.result(completions),
    )
    result.flagged = dict(flagged.most_common())
    result.findings = _findings(result)
    return result


class _Judges:
    """Each judge by itself, and all of them beside each other where there are several."""

    def __init__(self) -> None:
        self._judges: dict[str, _Judge] = defaultdict(_Judge)
        self._panels = Ratings()

    def add(self, row: Judgment) -> None:
        by_judge: dict[str, list[Order]] = defaultdict(list)
        for order in row.orders or []:
            by_judge[order.model or judge_name(row)].append(order)
        ratings = {name: [_given(order) for order in seen] for name, seen in by_judge.items()}
        for name, seen in by_judge.items():
            self._judges[name].add(seen, ratings[name])
        if not by_judge:
            judge = self._judges[judge_name(row)]
            judge.direct.extend(row.scores or [])
            judge.add([], [])
        if len(by_judge) > 1:
            self._panels.add([_mean(theirs) for theirs in ratings.values()])

    def result(self) -> dict[str, JudgeAudit]:
        return {name: judge.result() for name, judge in self._judges.items()}

    def between(self) -> Reliability | None:
        return self._panels.result() if self._panels.prompts else None


class _Judge:
    """What one judge said; `direct` are the scores of one that sees one completion at a time."""

    def __init__(self) -> None:
        self.direct = array("d")
        self._scores = array("d")
        self._orders = self._first = self._decided = self._undecided = 0
        self._expected = 0.0
        self._by_place: dict[int, array[float]] = defaultdict(lambda: array("d"))
        self._ratings = Ratings()

    def add(self, orders: Sequence[Order], ratings: Sequence[ScoreByIndex]) -> None:
        """Take in its orders of a prompt, and the scores in each."""
        self._orders += len(orders)
        self._ratings.add(ratings)
        for order, rating in zip(orders, ratings, strict=True):
            self._scores.extend(rating.values())
            if len(rating) < max(2, len(order.order)):
                continue
            mean, best = fmean(rating.values()), max(rating.values())
            for place, index in enumerate(order.order):
                self._by_place[place].append(rating[index] - mean)
            if sum(score == best for score in rating.values()) > 1:
                self._undecided += 1
                continue
            self._decided += 1
            self._first += rating[order.order[0]] == best
            self._expected += 1 / len(rating)

    def result(self) -> JudgeAudit:
        return JudgeAudit(
            judgments=self._ratings.prompts,
            orders=self._orders,
            first_wins=proportion(self._first, self._decided),
            expected_first=self._expected / self._decided if self._decided else None,
            undecided=self._undecided,
            places=[_mean_interval(self._by_place[place]) for place in sorted(self._by_place)],
            between_orders=self._ratings.result(),
            scores=histogram(self._scores or self.direct),
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
    return normal(fmean(values), math.sqrt(scatter(values) / (n - 1) / n) if n > 1 else math.inf, n)


class _Lengths:
    """What length does to the scores of many prompts."""

    def __init__(self) -> None:
        self.points = Points()
        self._longer = self._unequal = 0

    def add(self, found: Deviations, ranking: Sequence[int]) -> None:
        """Take in the deviations of a prompt, if it has any, and its ranking."""
        self.points.add(found)
        ranked = [found[index] for index in ranking if index in found]
        if ranked:
            (best, best_score), (worst, worst_score) = ranked[0], ranked[-1]
            if best_score != worst_score and best != worst:
                self._longer += best > worst
                self._unequal += 1

    def result(self) -> LengthEffect:
        slope = self.points.slope()
        return LengthEffect(
            normal(slope.value, slope.error, slope.n) if slope else None,
            proportion(self._longer, self._unequal),
            self.points.some(max(1, math.ceil(len(self.points) / POINTS))),
        )


def _controlled(
    judgments: Mapping[str, Judgment], completions: Mapping[str, Completions], lengths: _Lengths
) -> _Lengths:
    """The lengths, once the slope is removed from the scores."""
    slope = lengths.points.slope()
    if slope is None:
        return lengths
    without = _Lengths()
    for key, judgment in judgments.items():
        row = completions.get(key)
        found = deviations(judgment, row)
        if found and row is not None:
            changed = controlled(judgment, row.completions, found, slope.value)
            without.add(rescored(found, changed.scores or []), changed.ranking or [])
    return without


class _Examples:
    """The largest gap, the largest that an order inverts, and a skipped one; of equals the one with the lowest id."""

    def __init__(self) -> None:
        self._found: dict[str, Judgment] = {}

    def add(self, row: Judgment) -> None:
        if row.scores:
            why = "an order inverts it" if row.consistent is False else "largest gap"
        elif row.skipped is not None:
            why = "skipped"
        else:
            return
        best = self._found.get(why)
        if best is None or (-_gap(row), row.id) < (-_gap(best), best.id):
            self._found[why] = row

    def result(self, completions: Mapping[str, Completions]) -> list[Example]:
        kinds = ("largest gap", "an order inverts it", "skipped")
        rows = ((why, self._found[why]) for why in kinds if why in self._found)
        return [Example(why, row, completions.get(row.id)) for why, row in rows]


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
