"""An evaluation as a page: is the policy better, by how much, at equal lengths, and the comparisons that say so most.

Takes what `evaluate.run` returned and its rows, and returns the page; writes nothing.
"""

from collections.abc import Iterable, Sequence
from statistics import fmean

from dpo_cli.data.records import Compared, Order, rationale
from dpo_cli.html.markup import Markup, joined, markup
from dpo_cli.html.page import document, facts, figure, footer, grid, tile, verdict
from dpo_cli.html.svg import bars, interval, scatter
from dpo_cli.judges._ranking import label_of
from dpo_cli.stages.evaluate.results import Evaluation
from dpo_cli.statistics import histogram
from dpo_cli.training.gates import numbers

EVEN = 0.5
SIDES = ("reference", "policy")
SHOWN = 3  # comparisons at each end
TEXT_SHOWN = 1_200  # characters of a text


def evaluation(result: Evaluation, rows: Sequence[Compared]) -> str:
    """The page.

    Args:
        result: the evaluation.
        rows: of its evaluation.jsonl, the policy's losses first.
    """
    judge = result.judge.get("model") or result.judge.get("function") or result.judge.get("judge", "")
    judge = judge if isinstance(judge, str) else " and ".join(map(str, judge))
    low, high = result.interval
    answer = "Yes" if low > EVEN else "No" if high < EVEN else "Not shown"
    spent = f"${result.usd:,.4f}" if result.usd else "nothing spent"
    return document(
        f"Evaluation: {result.win_rate:.1%}",
        [
            markup(
                '<h1>Is the policy better? {}.</h1><p class="dim">{:,} prompts · judged by {} · {}</p>',
                answer,
                result.n,
                judge,
                spent,
            ),
            _findings(result.findings),
            grid("tiles", _tiles(result)),
            Markup("<h2>How sure is that</h2>") + grid("plots", _plots(result, rows)),
            _gates(result),
            *(markup("<h2>{}</h2>{}", name, joined(map(_example, some))) for name, some in _ends(rows) if some),
            Markup("<h2>What was compared</h2>") + _sides(result),
            footer(
                "Intervals are 95%: of the win rate by bootstrap over prompts, at equal lengths from a logistic "
                "regression on the difference in length (arXiv:2404.04475). Ties count half."
            ),
        ],
    )


def _findings(findings: Iterable[str]) -> Markup:
    items = joined(markup("<li>{}</li>", finding) for finding in findings)
    return markup('<ul class="findings">{}</ul>', items or Markup("<li class=calm>Nothing stands out.</li>"))


def _tiles(result: Evaluation) -> Iterable[str]:
    colour = {"good": "yes", "bad": "no", "calm": ""}[_style(*result.interval)]
    yield tile(f"{result.win_rate:.1%}", "win rate of the policy", colour)
    yield tile(f"{result.length_controlled_win_rate:.1%}", "at equal lengths")
    if result.scores is not None:
        yield tile(f"{result.scores.reference:.2f} → {result.scores.policy:.2f}", "mean score, each answer by itself")
    if result.kl is not None:
        yield tile(f"{result.kl.nats_per_sequence:.3g}", f"KL, nats a completion, by {result.kl.how}")
    if result.lengths.reference:
        yield tile(f"{result.lengths.policy / result.lengths.reference - 1:+.0%}".replace("-", "−"), "length")
    for size, sides in result.distinct.items():
        yield tile(f"{sides.reference:.3f} → {sides.policy:.3f}", f"distinct-{size}")


def _plots(result: Evaluation, rows: Sequence[Compared]) -> Iterable[str]:
    drawn = joined(
        interval(name, low, value, high, EVEN, style=_style(low, high))
        for name, value, (low, high) in (
            ("win rate", result.win_rate, result.interval),
            ("at equal lengths", result.length_controlled_win_rate, result.length_controlled_interval),
        )
    )
    names = ["lost", "even", "won"]
    counted = bars("Outcomes", names, [result.losses, result.ties, result.wins], "by the policy")
    yield figure("Win rate", "Dashed: what two equal adapters would have.", drawn + counted)
    changes = [
        fmean(row.policy_scores) - fmean(row.reference_scores)
        for row in rows
        if row.policy_scores and row.reference_scores
    ]
    longer = [(fmean(map(len, row.policy)) - fmean(map(len, row.reference))) / 100 for row in rows]
    wins = [(x, row.win) for x, row in zip(longer, rows, strict=True)]
    parts = scatter("Win against length", wins, None, "100 characters longer than the reference", "won by the policy")
    if (spread := histogram(changes)) is not None:
        parts += bars("Change of the score", spread.labels, spread.counts, "policy less reference, by prompt")
    yield figure("Length and score", "Does the policy win where it is longer? Is each answer better by itself?", parts)


def _style(low: float, high: float) -> str:
    return "good" if low > EVEN else "bad" if high < EVEN else "calm"


def _gates(result: Evaluation) -> Markup:
    rows = joined(
        markup("<tr><td>{}</td><td>{} {}</td></tr>", name, numbers(gate), verdict(gate.verdict))
        for name, gate in result.gates.items()
    )
    return markup('<h2>Gates</h2><div class="card"><table class="facts">{}</table></div>', rows) if rows else Markup()


def _ends(rows: Sequence[Compared]) -> list[tuple[str, list[Compared]]]:
    """The clearest losses and wins."""
    lost = [row for row in rows if row.win < EVEN]
    won = [row for row in rows if row.win > EVEN]
    return [("Won most clearly", won[: -SHOWN - 1 : -1]), ("Lost most clearly", lost[:SHOWN])]


def _example(row: Compared) -> Markup:
    sides = [
        _answer("reference", row.reference[0], row.reference_scores, "worst" if row.win > EVEN else "best"),
        _answer("policy", row.policy[0], row.policy_scores, "best" if row.win > EVEN else "worst"),
    ]
    head = markup('<h3>{}</h3><p class="dim">the policy won {:.0%} of its comparisons</p>', row.id, row.win)
    prompt = markup('<div class="prompt">{}</div>', _text(row.prompt[-1]["content"]))
    said = joined(_said(order) for order in (row.orders[0] if row.orders else []))
    return markup('<div class="card example">{}{}{}{}</div>', head, prompt, grid("plots", sides), said)


def _said(order: Order) -> Markup:
    """The judge's words, and which side stood where."""
    shown = ", ".join(f"{label_of(place)} the {SIDES[index]}" for place, index in enumerate(order.order))
    who = f"{order.model}, " if order.model else Markup()
    return markup('<p class="text"><span class="dim">{}{}:</span> {}</p>', who, shown, _cut(rationale(order)))


def _answer(name: str, text: str, scores: Sequence[float], kind: str) -> Markup:
    said = f"score {scores[0]:.3g} · " if scores else Markup()
    head = markup('<b>{}</b> <span class="dim">{}{:,} characters</span>', name, said, len(text))
    return markup('<div class="answer {}">{}{}</div>', kind, head, _text(text))


def _text(text: str) -> Markup:
    return markup('<p class="text">{}</p>', _cut(text))


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + " …"


def _sides(result: Evaluation) -> Markup:
    named = [*result.sides.items(), ("judge", result.judge)]
    tables = [(name, facts((key, str(value)) for key, value in made.items())) for name, made in named]
    return grid("thirds", [markup('<div class="card"><h3>{}</h3>{}</div>', name, table) for name, table in tables])
