"""Completions: what `generate` made, a list, one prompt, numbers over all."""

from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.text import Text

from dpo_cli.analysis.data_stats import CompletionStats, words
from dpo_cli.data.records import Completions, said
from dpo_cli.data.row_index import Rows
from dpo_cli.endpoint.responses import ADVICE
from dpo_cli.view.facts import (
    add_estimate,
    alarm,
    counted,
    counts_of,
    fact_table,
    facts,
    finish_style,
    length_table,
    receipt,
    share_of,
    shares,
    token_counts,
    tokens,
)
from dpo_cli.view.judgments import candidate
from dpo_cli.view.pairs import ending, excerpt, list_table, position, prompt_view
from dpo_cli.view.text import ID_SHOWN, LABEL, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.stages.generate import Generated


def generated(console: Console, result: "Generated") -> None:
    """What `generate` did, or would do."""
    table = fact_table()
    merged = f" · {result.merged:,} duplicate{'s' * (result.merged != 1)} merged" if result.merged else ""
    table.add_row("prompts", f"{result.prompts:,}{merged}")
    table.add_row(
        "owed",
        f"{result.owed_completions:,} completions of {result.owed_prompts:,} prompts"
        + (f" · {result.done_before:,} prompts were done" if result.done_before else ""),
    )
    for note in result.left_out:
        table.add_row("left out", safe(note, "yellow"))
    add_estimate(table, result.estimate)
    if not result.dry_run:
        made = [f"{result.completions:,}"]
        made += [f"{result.cut:,} cut by the token limit"] if result.cut else []
        made += [f"{result.identical:,} identical to another of their prompt"] if result.identical else []
        table.add_row("sampled", " · ".join(made))
        if result.receipt is None:
            table.add_row("tokens", token_counts(result.usage))
        else:
            receipt(table, result.receipt)
        for kind, count in result.missing.items():
            what = f"{count:,} of {result.owed_completions:,}: {kind}; {ADVICE.get(kind, '')}".rstrip("; ")
            table.add_row("no answer", safe(what, "red"))
        if result.failed:
            table.add_row("failed", safe(f"{result.failed:,} prompts; the first: {result.error}", "red"))
        table.add_row("wrote", safe(result.path))
    console.print(table)


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
            counts_of(record.finish_reasons),
            ending(record.prompt),
            excerpt(said(record.answer(0)) if record.completions else ""),
        )
    console.print(table)
    console.print(position(rows, first, len(page)))


def completions(console: Console, record: Completions, place: str = "") -> None:
    """One prompt and all of its completions."""
    title = Text("completions ", "bold").append_text(safe_line(record.id, f"not bold {LABEL}"))
    for part in (place, record.model, *(f"{key} {value}" for key, value in record.sampling.items())):
        if part:
            title.append(" · ", "dim").append_text(safe_line(part, "not bold"))
    console.print(Group(title, "", prompt_view(record.prompt, tools=record.tools)))
    seen: dict[str, int] = {}
    for index, (text, reason) in enumerate(zip(map(said, record.answers), record.finish_reasons, strict=False)):
        twin = seen.setdefault(" ".join(text.split()), index)
        head = Text(f"{index}", "bold").append(f"  {words(text):,} words  ", "not bold dim")
        head.append_text(safe_line("cut" if reason == "length" else reason, finish_style(reason)))
        if twin != index:
            head.append(f"  same as {twin}", "not bold yellow")
        console.print(candidate(head, text))


def completion_stats(console: Console, stats: CompletionStats) -> None:
    """Numbers of the completions."""
    grid = facts()
    grid.add_row("prompts", f"{stats.prompts:,}")
    grid.add_row("completions", f"{stats.completions:,}")
    grid.add_row("a prompt", counted({f"{n} for": count for n, count in stats.per_prompt.items()}, "prompts"))
    grid.add_row("ended by", shares(stats.finish_reasons))
    grid.add_row("identical", alarm(stats.identical, share_of(stats.identical, stats.completions)))
    grid.add_row("empty", alarm(stats.empty, share_of(stats.empty, stats.completions)))
    grid.add_row("model", counted(stats.models, "prompts"))
    grid.add_row("tokens", tokens(stats.usage))
    console.print(Group(grid, "", length_table({"completions": stats.lengths})))
