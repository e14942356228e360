"""Preference pairs: a list that opens at once, one pair side by side, what differs between two texts."""

import re
from difflib import Match, SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpo_cli.analysis.data_stats import PairStats, words
from dpo_cli.data.records import Message, Preference, Tool, said, text_of
from dpo_cli.data.row_index import Rows
from dpo_cli.view.console import NARROW
from dpo_cli.view.facts import (
    alarm,
    bars,
    counted,
    fact_table,
    facts,
    length_table,
    longer_chosen,
    reason_lines,
    share,
    spread_row,
)
from dpo_cli.view.text import ID_SHOWN, LABEL, joined, number, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.data.formats.export import Exported
    from dpo_cli.stages.pair.run import Paired

CHOSEN, REJECTED = "green", "red"
TEXTS = ("prompt ends", "chosen", "rejected", "completions", "reference", "policy")
ROOMY = 100  # columns from which a list has room for the prompt
EXCERPT = 300  # characters of a text that a list looks at
RUN_OF_WORDS = 3  # fewer equal words in a row are chance, not text in common
LONGEST_COMPARED = 4000  # words; beyond, comparing takes seconds


def pair_list(console: Console, rows: Rows, first: int, count: int) -> None:
    """A page of pairs, one a line.

    Args:
        console: where to.
        rows: train and val files.
        first: number of the first row, from 0.
        count: rows a page.
    """
    page = rows.slice(first, count)
    roomy = console.width >= ROOMY
    texts = ("prompt ends", "chosen", "rejected")[not roomy :]
    table = list_table("row", "id", "", "scores", *texts)
    for index, row in enumerate(page, first + 1):
        pair = rows.decode(row, Preference)
        cells = ending(pair.prompt), excerpt(text_of(pair.chosen)), excerpt(text_of(pair.rejected))
        table.add_row(
            Text(f"{index:,}", "dim"),
            safe_line(pair.id[:ID_SHOWN], LABEL),
            Text(Path(rows.name(row)).stem, "dim"),
            _scores(pair),
            *cells[not roomy :],
        )
    console.print(table)
    console.print(position(rows, first, len(page)))


def list_table(*headers: str) -> Table:
    """A table of one line a row; columns of texts share the room that the others leave."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), expand=True, pad_edge=False)
    for header in headers:
        table.add_column(
            header,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if header == "row" else "left",
            ratio=1 if header in TEXTS else None,
        )
    return table


def position(rows: Rows, first: int, shown: int) -> Text:
    """`rows 1–20 of about 1,022,000`, and how to see the next."""
    total, exact = rows.total()
    if not shown:
        return Text(f"no row {first + 1:,}: there are {total:,}" if exact and total else "no rows", "dim")
    text = Text(f"rows {first + 1:,}–{first + shown:,} of {'' if exact else 'about '}{total:,}", "dim")
    if first + shown < total:
        text.append(f" · next: --offset {first + shown}")
    return text


def ending(prompt: list[Message]) -> Text:
    """The last line of a prompt, where prompts differ most."""
    lines = said(prompt[-1])[-EXCERPT:].strip().split("\n")
    return safe_line(lines[-1])


def excerpt(text: str) -> Text:
    """The beginning of a text on one line."""
    return safe_line(text[:EXCERPT])


def pair(console: Console, preference: Preference, place: str = "") -> None:
    """One pair: prompt, both completions side by side with the words that differ, scores.

    Args:
        console: where to; below 80 columns the completions stand under each other.
        preference: the pair.
        place: `file:line`, shown with the id.
    """
    console.print(pair_view(preference, console.width, place))


def pair_view(preference: Preference, width: int, place: str = "", brief: bool = False) -> RenderableType:
    """A pair as a renderable, for others to draw; `brief` shows one line of each system message."""
    chosen, rejected = side_text(preference.chosen), side_text(preference.rejected)
    texts = highlighted(chosen, rejected)
    heads = (
        _head("chosen", CHOSEN, preference.chosen_score, chosen, preference.chosen_finish_reason),
        _head("rejected", REJECTED, preference.rejected_score, rejected, preference.rejected_finish_reason),
    )
    return Group(
        _title(preference, place),
        "",
        prompt_view(preference.prompt, brief, preference.tools),
        "",
        beside(heads, texts, width),
    )


def side_text(messages: list[Message]) -> str:
    """What a side says; where it has several messages, each under its role."""
    if len(messages) == 1:
        return text_of(messages)
    return "\n\n".join(f"{message['role']}:\n{said(message)}" for message in messages)


def prompt_view(prompt: list[Message], brief: bool = False, tools: list[Tool] | None = None) -> RenderableType:
    """The messages of a prompt, each beside its role, under the names of its tools."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    if tools:
        names = (str((tool.get("function") or tool).get("name", "?")) for tool in tools)
        table.add_row(safe_line("tools", LABEL), safe(", ".join(names), "dim"))
    for message in prompt:
        system = message["role"] == "system"
        content = said(message)
        if system and brief:
            lines = content.strip().split("\n")
            text = safe(lines[0], "dim")
            if len(lines) > 1:
                text.append(f" … {len(lines) - 1} more lines")
        else:
            text = safe(content, "dim" if system else "")
        table.add_row(safe_line(message["role"], LABEL), text)
    return table


def highlighted(chosen: str, rejected: str) -> tuple[Text, Text]:
    """Both texts with the words that the other lacks in colour; plain where they have nothing in common."""
    spans = difference(chosen, rejected)
    return _coloured(chosen, spans[0], CHOSEN), _coloured(rejected, spans[1], REJECTED)


def difference(left: str, right: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where two texts differ by words: (start, end) in characters, in each of them.

    Words that are equal count as common from three in a row on, or at the beginning and end, so that texts on the same
    subject don't fall into crumbs. Empty on both sides where they have nothing in common or are too long to compare.
    """
    tokens = [list(re.finditer(r"\w+(?:['’]\w+)*|[^\w\s]", text)) for text in (left, right)]
    if not all(0 < len(side) <= LONGEST_COMPARED for side in tokens):
        return [], []
    left_words, right_words = ([token.group() for token in side] for side in tokens)
    common = [
        block
        for block in SequenceMatcher(None, left_words, right_words, autojunk=False).get_matching_blocks()
        if _at_edge(block, tokens)
        or sum(word[0].isalnum() for word in left_words[block.a : block.a + block.size]) >= RUN_OF_WORDS
    ]
    if not any(block.size for block in common):
        return [], []
    return (
        _gaps(tokens[0], [(block.a, block.a + block.size) for block in common]),
        _gaps(tokens[1], [(block.b, block.b + block.size) for block in common]),
    )


def _at_edge(block: Match, tokens: list[list[re.Match[str]]]) -> bool:
    begins = block.a == 0 and block.b == 0
    return begins or (block.a + block.size == len(tokens[0]) and block.b + block.size == len(tokens[1]))


def _gaps(tokens: list[re.Match[str]], common: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of characters between runs of common tokens."""
    spans, position = [], 0
    for start, end in [*common, (len(tokens), len(tokens))]:
        if start > position:
            spans.append((tokens[position].start(), tokens[start - 1].end()))
        position = max(position, end)
    return spans


def _coloured(text: str, spans: list[tuple[int, int]], style: str) -> Text:
    """Safe text whose spans are in a style; spans count characters of the text as it came."""
    result, position = Text(), 0
    for start, end in spans:
        result.append_text(safe(text[position:start])).append_text(safe(text[start:end], style))
        position = end
    return result.append_text(safe(text[position:]))


def _title(pair: Preference, place: str) -> Text:
    text = Text("pair ", "bold").append_text(safe_line(pair.id, f"not bold {LABEL}"))
    if place:
        text.append(" · ", "dim").append_text(safe_line(place, "not bold"))
    if pair.score_gap is not None:
        text.append(" · ", "dim").append(f"gap {number(pair.score_gap)}", "not bold")
    return text


def _head(name: str, style: str, score: float | None, text: str, reason: str | None) -> Text:
    head = Text(name, f"bold {style}")
    if score is not None:
        head.append(f"  {number(score)}")
    head.append(f"  {words(text):,} words", "not bold dim")
    if reason == "length":
        head.append("  cut", "not bold yellow")
    return head


def beside(heads: tuple[Text, Text], texts: tuple[Text, Text], width: int) -> RenderableType:
    """Two texts under their heads, beside each other where there is room."""
    return _side_by_side(heads, texts) if width >= NARROW else _stacked(heads, texts)


def _side_by_side(heads: tuple[Text, Text], texts: tuple[Text, Text]) -> Table:
    table = Table(box=box.ROUNDED, expand=True, border_style="dim", header_style="")
    for head in heads:
        table.add_column(head, ratio=1, overflow="fold")
    table.add_row(*texts)
    return table


def _stacked(heads: tuple[Text, Text], texts: tuple[Text, Text]) -> RenderableType:
    table = Table(box=box.ROUNDED, expand=True, border_style="dim", show_header=False, show_lines=True)
    table.add_column(overflow="fold")
    for head, text in zip(heads, texts, strict=True):
        table.add_row(Group(head, text))
    return table


def _scores(pair: Preference) -> Text:
    if pair.chosen_score is None or pair.rejected_score is None:
        return Text("–", "dim")
    chosen, rejected = Text(number(pair.chosen_score), CHOSEN), Text(number(pair.rejected_score), REJECTED)
    return joined((chosen, rejected), " > ")


def paired(console: Console, result: "Paired") -> None:
    """What `pair` made."""
    table = fact_table()
    if result.format is not None:
        table.add_row("read as", result.format)
    table.add_row("pairs", f"{result.train:,} to train on · {result.val:,} held out")
    if result.rollouts is not None:
        scored = result.rollouts
        table.add_row("made of", f"{scored.rollouts:,} rollouts of {scored.prompts:,} prompts")
        rewards = f"chosen {scored.average_chosen_reward:.3f} · rejected {scored.average_rejected_reward:.3f}"
        table.add_row("average", f"reward {rewards} · gap {scored.average_gap:.3f}")
        if scored.skipped:
            table.add_row("no rollout", reason_lines(scored.skipped, "yellow"))
        if scored.left_out:
            table.add_row("left out", reason_lines(scored.left_out, "yellow"))
    if result.dropped:
        columns = " · ".join(f"{name} ({count:,} rows)" for name, count in result.dropped.items())
        table.add_row("columns left out", safe(columns, "yellow"))
    if result.bad_rows:
        table.add_row("bad rows left out", reason_lines(result.bad_rows, "yellow"))
        if result.rejected_path:
            table.add_row("", safe(f"with line and reason in {result.rejected_path}"))
    if result.skipped:
        table.add_row("no pair", reason_lines(result.skipped, "yellow"))
    for warning in result.warnings:
        table.add_row("warning", safe(warning, "yellow"))
    table.add_row("wrote", safe(f"{result.train_path}, {result.val_path}"))
    console.print(table)
    if result.example is not None:
        console.print(Text("\nthe first pair", "bold"))
        console.print(pair_view(result.example, console.width, brief=True))


def exported(console: Console, result: "Exported") -> None:
    """What was exported, and how to start it elsewhere."""
    table = fact_table()
    table.add_row("pairs", f"{result.train:,} to train on · {result.val:,} held out")
    table.add_row("wrote", safe("\n".join(result.files) or "nothing: a dry run"))
    console.print(table)
    if result.example:
        console.print(Text("\nthe first pair", "bold"))
        console.print(safe(result.example), soft_wrap=True)
    for title, line in result.launch.items():
        console.print(Text(f"\n{title}", "bold"))
        console.print(safe(line, "green"), soft_wrap=True)


def pair_stats(console: Console, stats: PairStats) -> None:
    """Numbers of the pairs, with what is suspicious in colour."""
    grid = facts()
    grid.add_row("pairs", counted(stats.pairs))
    grid.add_row("prompts", counted(stats.prompts))
    grid.add_row("score gap", spread_row(stats.gaps))
    grid.add_row("longer chosen", longer_chosen(stats.longer_chosen))
    grid.add_row("cut, chosen", share(stats.chosen_cut))
    grid.add_row("cut, rejected", share(stats.rejected_cut))
    grid.add_row("same pair again", alarm(stats.duplicate_pairs))
    grid.add_row("prompts repeated", f"{stats.repeated_prompts:,}")
    grid.add_row("prompts on both sides", alarm(stats.shared_prompts))
    grid.add_row("contradictory pairs", alarm(stats.contradictory_pairs))
    grid.add_row("chosen = rejected", alarm(stats.identical_sides))
    lengths = length_table({"chosen": stats.chosen, "rejected": stats.rejected})
    console.print(Group(grid, "", lengths, *bars("score gaps", stats.gap_histogram)))
