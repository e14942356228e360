"""Lists, single rows and numbers of completions and judgments; numbers of pairs; settings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo_cli.data.records import Completions, Judgment, Order, Usage, judge_name, rationale, said
from dpo_cli.data.row_index import Rows
from dpo_cli.judges._ranking import label_of
from dpo_cli.view.facts import add_estimate, fact_table, reason_lines, receipt, token_counts
from dpo_cli.view.pairs import list_table, paired, position, prompt_view
from dpo_cli.view.text import ID_SHOWN, LABEL, dollars, joined, number, percent, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.stages.judge import Judged


def judgments_list(console: Console, rows: Rows, first: int, count: int) -> None:
    """A page of judgments.jsonl, one prompt a line; `first` counts from 0."""
    page = rows.slice(first, count)
    table = list_table("row", "id", "scores", "agrees", "judge", "note")
    table.columns[-1].ratio = 1
    for index, row in enumerate(page, first + 1):
        record = rows.decode(row, Judgment)
        table.add_row(
            Text(f"{index:,}", "dim"),
            safe_line(record.id[:ID_SHOWN], LABEL),
            _score_row(record),
            _agrees(record.consistent),
            safe_line(judge_name(record) if record.judge else "–"),
            _note(record),
        )
    console.print(table)
    console.print(position(rows, first, len(page)))


def judgment(console: Console, record: Judgment, judged: Completions | None = None, place: str = "") -> None:
    """One judgment: the scores of each order, the judge's own words, and the texts where they are at hand.

    Args:
        console: where to.
        record: the judgment.
        judged: the completions that it is about.
        place: `file:line`.
    """
    title = Text("judgment ", "bold").append_text(safe_line(record.id, f"not bold {LABEL}"))
    for part in (place, judge_name(record) if record.judge else "", dollars(record.usd) if record.usd else ""):
        if part:
            title.append(" · ", "dim").append_text(safe_line(part, "not bold"))
    console.print(title)
    note = _note(record)
    if note:
        console.print(note)
    if record.scores:
        console.print()
        console.print(_score_table(record))
    if judged is not None:
        console.print(Group("", prompt_view(judged.prompt, brief=True)))
        for place_of, index in enumerate(record.ranking or range(len(judged.completions)), 1):
            if index < len(judged.completions):
                head = Text(f"{place_of}. completion {index}", "bold")
                if record.scores:
                    head.append(f"  {number(record.scores[index])}")
                for reason in record.flags.get(index, []):
                    head.append_text(safe_line(f"  {reason}", "not bold yellow"))
                console.print(candidate(head, said(judged.answer(index))))
    for number_of, order in enumerate(record.orders or [], 1):
        console.print(reply(number_of, order))


def candidate(head: Text, text: str) -> RenderableType:
    """One completion in a box, under its heading."""
    shown = safe(text) if text.strip() else Text("(no text)", "dim")
    table = Table(box=box.ROUNDED, expand=True, border_style="dim", header_style="")
    table.add_column(head, overflow="fold")
    table.add_row(shown)
    return table


def _score_row(record: Judgment) -> Text:
    if not record.scores:
        return Text("–", "dim")
    best = (record.ranking or [record.scores.index(max(record.scores))])[0]
    parts = [Text(number(score), "green bold" if index == best else "") for index, score in enumerate(record.scores)]
    return joined(parts, "  ")


def _agrees(consistent: bool | None) -> Text:
    if consistent is None:
        return Text("–", "dim")
    return Text("✓", "green") if consistent else Text("✗", "yellow")


def _note(record: Judgment) -> Text:
    if record.skipped is not None:
        return safe_line(f"skipped: {record.skipped}", "yellow")
    return Text() if record.error is None else safe_line(f"error: {record.error}", "red")


def _score_table(record: Judgment) -> Table:
    """Completions down, orders across; the mean and the rank last."""
    orders = record.orders or []
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("completion")
    for index in range(1, len(orders) + 1):
        table.add_column(f"order {index}", justify="right")
    table.add_column("score", justify="right")
    table.add_column("rank", justify="right")
    ranking = record.ranking or []
    for index, score in enumerate(record.scores or []):
        seen = [
            _or_dash(order.scores.get(label_of(order.order.index(index))) if index in order.order else None)
            for order in orders
        ]
        rank = ranking.index(index) + 1 if index in ranking else None
        table.add_row(
            str(index), *seen, Text(number(score), "bold"), _or_dash(rank), style="green" if rank == 1 else ""
        )
    return table


def _or_dash(value: float | None) -> str:
    return "–" if value is None else number(value)


def reply(number_of: int, order: Order, names: Sequence[str] = ()) -> RenderableType:
    """The judge's reply to one order: its rationale where it is readable, else as it came.

    Args:
        number_of: which order it is.
        order: the order and the reply.
        names: of the completions; unset: their numbers.
    """
    named = [names[index] if index < len(names) else str(index) for index in order.order]
    shown = ", ".join(f"{label_of(place)} = {name}" for place, name in enumerate(named))
    title = Text(f"order {number_of}").append(f"  {shown}", "dim")
    if order.model:
        title.append("  ").append_text(safe_line(order.model))
    parts: list[RenderableType] = ["", Rule(title, align="left", style="dim")]
    for name, scores in order.criteria.items():
        given = "  ".join(f"{label} {number(score)}" for label, score in scores.items())
        parts.append(Padding(safe_line(f"{name}: ", "bold").append(given, "not bold"), (0, 0, 0, 2)))
    return Group(*parts, Padding(safe(rationale(order)), (0, 0, 0, 2)))


def judged(console: Console, result: "Judged") -> None:
    """What `judge` did, or would do."""
    table = fact_table()
    table.add_row("prompts", f"{result.total:,} · {result.done_before:,} judged before · {result.owed:,} owed")
    add_estimate(table, result.estimate)
    if result.judged:
        share = percent(result.consistent / result.judged)
        table.add_row("judged", f"{result.judged:,} · in {share} no order inverts best and worst")
    if result.weights:
        shares = ", ".join(f"{model} {weight:.2f}" for model, weight in result.weights.items())
        table.add_row("weights", safe(f"{shares}, by agreement"))
    for name, style in (("skipped", "yellow"), ("errors", "red")):
        counts = getattr(result, name)
        if counts:
            table.add_row(name, reason_lines(counts, style))
    if result.receipt is not None:
        receipt(table, result.receipt)
    if result.usage != Usage():
        table.add_row("all judgments", f"{token_counts(result.usage)} · {dollars(result.usd)}")
    console.print(table)


def judged_and_paired(console: Console, results: Mapping[str, object]) -> None:
    """What `judge` did, and the pairs that came of it."""
    judged(console, results["judged"])  # type: ignore[arg-type]
    paired(console, results["paired"])  # type: ignore[arg-type]
