"""Lists, single rows and numbers of completions and judgments; numbers of pairs; settings."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo_cli.pages import Rows
from dpo_cli.schema import Completions, Judgment, Order
from dpo_cli.stats import (
    CompletionStats,
    Lengths,
    PairStats,
    Proportion,
    Setting,
    Spread,
    judge_name,
    rationale,
    words,
)
from dpo_cli.view.facts import alarm, bars, counted, facts, share, share_of, spread_row, tokens
from dpo_cli.view.pairs import ID_SHOWN, LABEL, ending, excerpt, list_table, position, prompt_view
from dpo_cli.view.text import dollars, joined, number, percent, safe, safe_line

UNBIASED_Z = 1.96  # below, chosen being longer may be chance


def completions_list(console: Console, rows: Rows, first: int, count: int) -> None:
    """A page of completions.jsonl, one prompt a line; `first` counts from 0."""
    page = rows.slice(first, count)
    table = list_table("row", "id", "n", "ended by", "prompt ends", "completions")
    for index, row in enumerate(page, first + 1):
        record = rows.decode(row, Completions)
        table.add_row(
            Text(f"{index:,}", "dim"),
            safe_line(record.id[:ID_SHOWN], LABEL),
            str(len(record.completions)),
            _counts_of(record.finish_reasons),
            ending(record.prompt),
            excerpt(record.completions[0] if record.completions else ""),
        )
    console.print(table)
    console.print(position(rows, first, len(page)))


def completions(console: Console, record: Completions, place: str = "") -> None:
    """One prompt and all of its completions."""
    title = Text("completions ", "bold").append_text(safe_line(record.id, f"not bold {LABEL}"))
    for part in (place, record.model, *(f"{key} {value}" for key, value in record.sampling.items())):
        if part:
            title.append(" · ", "dim").append_text(safe_line(part, "not bold"))
    console.print(Group(title, "", prompt_view(record.prompt)))
    seen: dict[str, int] = {}
    for index, (text, reason) in enumerate(zip(record.completions, record.finish_reasons, strict=False)):
        twin = seen.setdefault(" ".join(text.split()), index)
        head = Text(f"{index}", "bold").append(f"  {words(text):,} words  ", "not bold dim")
        head.append_text(safe_line("cut" if reason == "length" else reason, _reason_style(reason)))
        if twin != index:
            head.append(f"  same as {twin}", "not bold yellow")
        console.print(_candidate(head, text))


def completion_stats(console: Console, stats: CompletionStats) -> None:
    """Numbers of the completions."""
    grid = facts()
    grid.add_row("prompts", f"{stats.prompts:,}")
    grid.add_row("completions", f"{stats.completions:,}")
    grid.add_row("a prompt", counted({f"{n} for": count for n, count in stats.per_prompt.items()}, "prompts"))
    grid.add_row("ended by", _shares(stats.finish_reasons))
    grid.add_row("identical", alarm(stats.identical, share_of(stats.identical, stats.completions)))
    grid.add_row("empty", alarm(stats.empty, share_of(stats.empty, stats.completions)))
    grid.add_row("model", counted(stats.models, "prompts"))
    grid.add_row("tokens", tokens(stats.usage))
    console.print(Group(grid, "", _lengths({"completions": stats.lengths})))


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
                console.print(_candidate(head, judged.completions[index]))
    for number_of, order in enumerate(record.orders or [], 1):
        console.print(reply(number_of, order))


def pair_stats(console: Console, stats: PairStats) -> None:
    """Numbers of the pairs, with what is suspicious in colour."""
    grid = facts()
    grid.add_row("pairs", counted(stats.pairs))
    grid.add_row("prompts", counted(stats.prompts))
    grid.add_row("score gap", spread_row(stats.gaps))
    grid.add_row("longer chosen", _longer(stats.longer_chosen))
    grid.add_row("cut, chosen", share(stats.chosen_cut))
    grid.add_row("cut, rejected", share(stats.rejected_cut))
    grid.add_row("same pair again", alarm(stats.duplicate_pairs))
    grid.add_row("prompts repeated", f"{stats.repeated_prompts:,}")
    grid.add_row("prompts on both sides", alarm(stats.shared_prompts))
    grid.add_row("contradictory pairs", alarm(stats.contradictory_pairs))
    grid.add_row("chosen = rejected", alarm(stats.identical_sides))
    lengths = _lengths({"chosen": stats.chosen, "rejected": stats.rejected})
    console.print(Group(grid, "", lengths, *bars("score gaps", stats.gap_histogram)))


def settings(console: Console, rows: Sequence[Setting]) -> None:
    """Every setting, its value and where it came from; what is no default stands out."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for header in ("setting", "value", "from"):
        table.add_column(header, overflow="fold")
    section = None
    for row in rows:
        here = row.key.rpartition(".")[0]
        if section is not None and here != section:
            table.add_row()
        section = here
        style = "dim" if row.source == "default" else "bold"
        table.add_row(
            safe_line(row.key, style),
            safe_line(_setting(row.value), style if style == "dim" else f"{style} {LABEL}"),
            safe_line(row.source, style),
        )
    console.print(table)


def _setting(value: Any) -> str:
    if value is None:
        return "none"  # as --set takes it
    return value if isinstance(value, str) else json.dumps(msgspec.to_builtins(value), ensure_ascii=False)


def _counts_of(values: Sequence[str]) -> Text:
    parts = []
    for value in dict.fromkeys(values):
        count = values.count(value)
        parts.append(safe_line(value + (f" {count}" if count < len(values) else ""), _reason_style(value)))
    return joined(parts, ", ")


def _shares(counts: Mapping[str, int]) -> Text:
    total = sum(counts.values())
    parts = [
        safe_line(f"{name} ", _reason_style(name)).append(f"{count:,}", "bold").append(f" ({percent(count / total)})")
        for name, count in counts.items()
    ]
    return joined(parts) if parts else Text("–", "dim")


def _reason_style(reason: str) -> str:
    return {"stop": "green", "length": "yellow"}.get(reason, "red")


def _longer(proportion: Proportion | None) -> Text:
    """P(longer chosen); a length bias that is no chance stands out."""
    text = share(proportion)
    if proportion is not None:
        text.append(f"  z {proportion.z:+.1f}", "yellow" if abs(proportion.z) > UNBIASED_Z else "green")
    return text


def _lengths(sides: Mapping[str, Lengths]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("length")
    for header in ("", "min", "median", "mean", "max"):
        table.add_column(header, justify="left" if not header else "right")
    for unit in ("words", "characters"):
        for name, lengths in sides.items():
            spread: Spread | None = getattr(lengths, unit)
            if spread is not None:
                values = (spread.min, spread.median, spread.mean, spread.max)
                table.add_row(Text(unit, "dim"), name, *(f"{value:,.0f}" for value in values))
    return table


def _candidate(head: Text, text: str) -> RenderableType:
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
            _or_dash(order.scores.get(chr(ord("A") + order.order.index(index))) if index in order.order else None)
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
    shown = ", ".join(f"{chr(ord('A') + place)} = {name}" for place, name in enumerate(named))
    title = Text(f"order {number_of}").append(f"  {shown}", "dim")
    if order.model:
        title.append("  ").append_text(safe_line(order.model))
    return Group("", Rule(title, align="left", style="dim"), Padding(safe(rationale(order)), (0, 0, 0, 2)))
