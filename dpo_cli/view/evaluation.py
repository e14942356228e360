"""Comparisons of both adapters: a list, one side by side, and what the browser needs to show them."""

from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpo_cli.analysis.data_stats import words
from dpo_cli.data.records import Compared
from dpo_cli.data.row_index import Rows
from dpo_cli.view.browse import Look
from dpo_cli.view.facts import add_estimate, fact_table, gate_line, reason_lines, receipt
from dpo_cli.view.judgments import reply
from dpo_cli.view.pairs import (
    ROOMY,
    beside,
    ending,
    excerpt,
    highlighted,
    list_table,
    position,
    prompt_view,
)
from dpo_cli.view.text import ID_SHOWN, LABEL, dollars, joined, number, percent, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.stages.evaluate.harness import Harnessed
    from dpo_cli.stages.evaluate.quiz import Quizzed
    from dpo_cli.stages.evaluate.results import Evaluation, Planned

WON, EVEN, LOST = ("won", "green"), ("even", "yellow"), ("lost", "red")


def comparison_list(console: Console, rows: Rows, first: int, count: int) -> None:
    """A page of evaluation.jsonl, one prompt a line; `first` counts from 0."""
    page = rows.slice(first, count)
    roomy = console.width >= ROOMY
    texts = ("prompt ends", "reference", "policy")[not roomy :]
    table = list_table("row", "id", "policy", "scores", *texts)
    for index, line in enumerate(page, first + 1):
        row = rows.decode(line, Compared)
        cells = ending(row.prompt), excerpt(row.reference[0]), excerpt(row.policy[0])
        table.add_row(
            Text(f"{index:,}", "dim"),
            safe_line(row.id[:ID_SHOWN], LABEL),
            _outcome(row.win),
            _scores(row),
            *cells[not roomy :],
        )
    console.print(table)
    console.print(position(rows, first, len(page)))


def comparison(console: Console, row: Compared, place: str = "") -> None:
    """One prompt: both adapters' answers side by side, and what the judge said of them."""
    console.print(comparison_view(row, console.width, place))


def comparison_view(row: Compared, width: int, place: str = "", brief: bool = False) -> RenderableType:
    """A comparison as a renderable, for others to draw; `brief` shows one line of each system message."""
    title = Text("comparison ", "bold").append_text(safe_line(row.id, f"not bold {LABEL}"))
    if place:
        title.append(" · ", "dim").append_text(safe_line(place, "not bold"))
    title.append(" · ", "dim").append_text(_outcome(row.win)).append(f" {row.win:.0%}", "not bold")
    parts: list[RenderableType] = [title, "", prompt_view(row.prompt, brief)]
    for index, texts in enumerate(zip(row.reference, row.policy, strict=False)):
        heads = (
            _head("reference", LOST[1], row.reference_scores, texts[0], index),
            _head("policy", WON[1], row.policy_scores, texts[1], index),
        )
        parts += ["", beside(heads, highlighted(*texts), width)]
        orders = row.orders[index] if index < len(row.orders) else []
        parts += [reply(place_of, order, ("reference", "policy")) for place_of, order in enumerate(orders, 1)]
    return Group(*parts)


COMPARISONS = Look(
    Compared,
    comparison_view,
    lambda row: [row.id, *(message["content"] for message in row.prompt), *row.reference, *row.policy],
    "comparison",
)


def _outcome(win: float) -> Text:
    return Text(*(WON if win > 0.5 else LOST if win < 0.5 else EVEN))


def _scores(row: Compared) -> Text:
    if not row.reference_scores or not row.policy_scores:
        return Text("–", "dim")
    return joined((Text(number(fmean(row.reference_scores))), Text(number(fmean(row.policy_scores)))), " → ")


def _head(name: str, style: str, scores: list[float], text: str, index: int) -> Text:
    head = Text(name, f"bold {style}")
    if index < len(scores):
        head.append(f"  {number(scores[index])}")
    return head.append(f"  {words(text):,} words", "not bold dim")


def planned(console: Console, result: "Planned") -> None:
    """What `evaluate` would do."""
    table = fact_table()
    table.add_row("prompts", f"{result.prompts:,}")
    table.add_row(
        "owed",
        f"{result.completions:,} completions · {result.comparisons:,} comparisons, "
        f"{result.ratings:,} ratings of a single answer",
    )
    add_estimate(table, result.estimate)
    console.print(table)


def evaluated(console: Console, result: "Evaluation") -> None:
    """Policy against reference."""
    table = fact_table()
    table.add_row("win rate", _clear(result.win_rate, result.interval))
    controlled = _clear(result.length_controlled_win_rate, result.length_controlled_interval)
    table.add_row("", controlled.append("  at equal lengths", "dim"))
    table.add_row(
        "prompts",
        f"{result.wins:,} won · {result.ties:,} even · {result.losses:,} lost"
        + (f" · {result.failed:,} without a result" if result.failed else ""),
    )
    if result.scores is not None:
        table.add_row("score", f"{number(result.scores.reference)} → {number(result.scores.policy)}, each by itself")
    table.add_row("length", f"{number(result.lengths.reference)} → {number(result.lengths.policy)} characters")
    if result.kl is not None:
        kl = result.kl
        error = "" if kl.error is None else f" ± {kl.error:.2g}"
        per_token = f"{number(kl.nats_per_token)} a token"
        table.add_row("KL", f"{kl.nats_per_sequence:.3g}{error} nats a completion · {per_token} · {kl.how}")
    elif result.no_kl:
        table.add_row("KL", safe(f"not measured: {result.no_kl}", "dim"))
    for size, sides in result.distinct.items():
        table.add_row(f"distinct-{size}", f"{sides.reference:.3f} → {sides.policy:.3f}")
    for name, found in result.position.items():
        parts = [f"{found.first_wins.value:.0%} won by the first shown"] if found.first_wins else []
        parts += [f"{found.flips.value:.0%} flip with the order"] if found.flips else []
        table.add_row("judge", safe(f"{name}: {', '.join(parts)}"))
    for name, style in (("skipped", "yellow"), ("errors", "red")):
        if counts := getattr(result, name):
            table.add_row(name, reason_lines(counts, style))
    if result.receipt is not None:
        receipt(table, result.receipt)
        table.add_row("all in all", dollars(result.usd))
    if result.repetition is not None:
        table.add_row("repetition", f"{percent(result.repetition.reference)} → {percent(result.repetition.policy)}")
    for name, lost in result.forgetting.items():
        text = f"{lost.reference:.3f} → {lost.policy:.3f} nats a token · {lost.rows:,} rows of {lost.source}"
        table.add_row(name.removeprefix("forgetting_") + " texts", safe(text))
    for name, gate in result.gates.items():
        table.add_row(name, gate_line(gate))
    for finding in result.findings:
        table.add_row("note", safe(finding, "yellow"))
    table.add_row("wrote", safe(result.path))
    console.print(table)


def quizzed(console: Console, result: "Quizzed") -> None:
    """How many questions each adapter answered rightly."""
    table = fact_table()
    for name, rate in result.accuracy.items():
        table.add_row(name, f"{percent(rate.value)} right [{percent(rate.low)}, {percent(rate.high)}]")
    table.add_row("questions", f"{result.n:,}" + (f" · {result.failed:,} without a result" if result.failed else ""))
    table.add_row("right if", "exactly the answer" + ", or the judge says so" * (result.match == "judge"))
    for name, style in (("skipped", "yellow"), ("errors", "red")):
        if counts := getattr(result, name):
            table.add_row(name, reason_lines(counts, style))
    if result.receipt is not None:
        receipt(table, result.receipt)
    table.add_row("wrote", safe(result.path))
    console.print(table)


def harnessed(console: Console, result: "Harnessed") -> None:
    """What lm-evaluation-harness says of both adapters."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for header in ("task", "metric", "reference", "policy", "change"):
        table.add_column(header)
    for score in result.scores:
        sides = ((score.reference, score.reference_error), (score.policy, score.policy_error))
        cells = [number(value) + ("" if error is None else f" ± {error:.2g}") for value, error in sides]
        table.add_row(safe(score.task), safe(score.metric), *cells, f"{score.policy - score.reference:+.3g}")
    console.print(table)
    console.print(safe(f"wrote {result.path}", "dim"))


def _clear(value: float, interval: tuple[float, float]) -> Text:
    """A win rate with its interval, in the colour of what it says about one half."""
    low, high = interval
    style = "green" if low > 0.5 else "yellow" if high >= 0.5 else "red"
    return Text(f"{percent(value)} [{percent(low)}, {percent(high)}]", style)
