"""Comparisons of both adapters: a list, one side by side, and what the browser needs to show them."""

from statistics import fmean

from rich.console import Console, Group, RenderableType
from rich.text import Text

from dpo_cli.pages import Rows
from dpo_cli.schema import Compared
from dpo_cli.stats import words
from dpo_cli.view.browse import Look
from dpo_cli.view.pairs import (
    ID_SHOWN,
    LABEL,
    ROOMY,
    beside,
    ending,
    excerpt,
    highlighted,
    list_table,
    position,
    prompt_view,
)
from dpo_cli.view.tables import reply
from dpo_cli.view.text import joined, number, safe_line

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
            Text(f"{index:,}", "dim"), safe_line(row.id[:ID_SHOWN], LABEL), _outcome(row.win), _scores(row),
            *cells[not roomy :],
        )  # fmt: skip
    console.print(table)
    console.print(position(rows, first, len(page)))


def comparison(console: Console, row: Compared, place: str = "") -> None:
    """One prompt: both adapters' answers side by side, and what the judge said of them."""
    console.print(comparison_view(row, console.width, place))


def comparison_view(row: Compared, width: int, place: str = "", brief: bool = False) -> RenderableType:
    """The same, to be drawn by others; `brief` shows one line of each system message."""
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
