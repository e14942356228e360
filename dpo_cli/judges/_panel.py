"""Several models as one judge: each weighs as much as it agrees with the others; pure functions.

    weight of m  ∝  max(0, mean over the other models k of τ-b(m, k))

with Kendall's τ-b over all pairs of candidates of all prompts (doi:10.1093/biomet/33.3.239), each model's score of a
candidate being the mean of its orders. Weights sum to 1; if nobody agrees with anybody, and of two models always, they
are equal. They follow from what stands in judgments.jsonl alone, so that neither the order in which prompts finished
nor a kill changes them. A panel of models: arXiv:2404.18796 (its plain average is what a judgment has until the run
ends); that judges who agree with their peers are the better ones: Dawid and Skene 1979, doi:10.2307/2346806; the
formula is ours. Models that share a bias agree in it: agreement is not truth, and `inspect judgments --stats` shows
both. What is not covered: models at different endpoints.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean

import msgspec

from dpo_cli.data.records import Judgment, Order
from dpo_cli.judges._agreement import PairCounter
from dpo_cli.judges._forms import Verdict
from dpo_cli.judges._orders import OrderVerdict, aggregate, order_verdict
from dpo_cli.judges._ranking import conclude, label_of
from dpo_cli.judges._task import Task
from dpo_cli.judges._verdict import read_all

DIGITS = 9  # a sum of weighted means has noise below that, which must break no tie


def decide(task: Task, verdicts: Sequence[OrderVerdict], weights: Mapping[str, float] | None = None) -> Judgment:
    """The judgment of one model or a panel: the weighted mean of its models' mean scores, then of their Borda points.

    Args:
        task: what was judged.
        verdicts: every verdict.
        weights: model -> weight; unset: equal.
    """
    by_model: dict[str | None, list[OrderVerdict]] = defaultdict(list)
    for one in verdicts:
        by_model[one.order.model].append(one)
    share = {model: weights.get(model or "", 0.0) if weights else 1.0 for model in by_model}
    rated = {model: aggregate(theirs) for model, theirs in by_model.items()}

    def mean(part: int) -> dict[int, float]:
        whole = sum(share.values())
        indices = rated[verdicts[0].order.model][part]
        sums = {index: sum(share[model] * found[part][index] for model, found in rated.items()) for index in indices}
        return {index: round(total / whole, DIGITS) for index, total in sums.items()}

    return conclude(task, mean(0), mean(1), [one.order for one in verdicts], weights)


def agreement_weights(judgments: Iterable[Judgment]) -> dict[str, float]:
    """Model -> weight, by the formula above; empty if none of the judgments is a panel's.

    Args:
        judgments: of one panel, each prompt once; those without scores do not count. They are gone through once.
    """
    named: set[str] = set()
    counters: defaultdict[tuple[str, str], PairCounter] = defaultdict(PairCounter)
    for judgment in judgments:
        scored = _scores_by_model(judgment)
        named.update(scored)
        if judgment.scores and judgment.orders:
            for one, two in combinations(sorted(scored), 2):
                counters[one, two].add(scored[one], scored[two], judgment.orders[0].order)
    models = sorted(named - {""})
    if not models:
        return {}
    taus = {pair: counter.tau or 0.0 for pair, counter in counters.items()}
    raw = {
        one: fmean([taus.get((min(one, two), max(one, two)), 0.0) for two in models if two != one]) for one in models
    }
    kept = {model: max(0.0, mean) for model, mean in raw.items()}
    whole = sum(kept.values())
    return {model: round(mean / whole if whole else 1 / len(kept), 4) for model, mean in kept.items()}


def _scores_by_model(judgment: Judgment) -> dict[str, list[float]]:
    """What each model of a panel gave each completion, as the mean of its orders; 0 to what was not shown."""
    given: defaultdict[str, defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for order in judgment.orders or []:
        for place, index in enumerate(order.order):
            given[order.model or ""][index].append(order.scores[label_of(place)])
    count = len(judgment.scores or [])
    return {model: [fmean(scores.get(index, [0.0])) for index in range(count)] for model, scores in given.items()}


def settle(tasks: Iterable[Task], judgments: Mapping[str, Judgment]) -> Iterator[Judgment]:
    """A panel's judgments under the weights that all of them give; only those that change.

    Args:
        tasks: the prompts, each once; gone through twice. A judgment of other completions neither counts nor changes.
        judgments: by id.
    """

    def current() -> Iterator[tuple[Task, Judgment]]:
        for task in tasks:
            row = judgments.get(task.id)
            if row and row.scores and row.completions_id == task.completions_id:
                yield task, row

    weights = agreement_weights(row for _, row in current())
    yield from (_again(task, row, weights) for task, row in current() if row.weights != weights)


def _again(task: Task, row: Judgment, weights: Mapping[str, float]) -> Judgment:
    found = decide(task, [_recall(order) for order in row.orders or []], weights)
    return msgspec.structs.replace(
        row, scores=found.scores, ranking=found.ranking, consistent=found.consistent, weights=found.weights
    )


def _recall(order: Order) -> OrderVerdict:
    """A verdict from its record: the scores as they stand there, the ranking from the reply that gave them."""
    if order.criteria:
        return order_verdict(order, Verdict(order.scores, []))
    labels = [label_of(place) for place in range(len(order.order))]
    said = (verdict for verdict, *_ in read_all(order.raw, labels) if verdict and verdict.scores == order.scores)
    return order_verdict(order, next(said, Verdict(order.scores, [])))
