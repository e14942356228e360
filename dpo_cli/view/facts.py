"""Numbers as people read them: rows of facts, counts, shares with their intervals, spreads, histograms."""

from collections.abc import Mapping

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dpo_cli.schema import Usage
from dpo_cli.stats import Histogram, Proportion, Spread
from dpo_cli.view.plot import bar
from dpo_cli.view.text import joined, percent, safe_line

BAR_WIDTH = 30


def facts() -> Table:
    """A grid of names and values."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    return grid


def alarm(count: int, text: Text | None = None) -> Text:
    """A number that should be 0."""
    text = text or Text(f"{count:,}")
    text.style = "yellow" if count else "green"
    return text


def share_of(count: int, total: int) -> Text:
    """`3 of 4 (75.0%)`."""
    return Text(f"{count:,} of {total:,}").append(f" ({percent(count / total)})" if total else "")


def counted(counts: Mapping[str, int], unit: str = "") -> Text:
    """Names with their counts."""
    parts = [safe_line(f"{name} ").append(f"{count:,}", "bold") for name, count in counts.items()]
    text = joined(parts) if parts else Text("–", "dim")
    return text.append(f" {unit}", "dim") if unit and parts else text


def share(proportion: Proportion | None) -> Text:
    """A share with its interval."""
    if proportion is None:
        return Text("not known", "dim")
    text = Text(f"{percent(proportion.share)} of {proportion.n:,}")
    return text.append(f"  95%: {percent(proportion.low)} – {percent(proportion.high)}", "dim")


def spread_row(spread: Spread | None) -> Text:
    """Where numbers lie, on one line."""
    if spread is None:
        return Text("not known", "dim")
    named = {"min": spread.min, "median": spread.median, "mean": spread.mean, "max": spread.max}
    return joined((Text.assemble((f"{name} ", "dim"), short(value)) for name, value in named.items()), "  ")


def short(value: float) -> str:
    """A number with the digits that a table has room for."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2f}"


def tokens(usage: Usage) -> Text:
    """Tokens in and out."""
    if not usage.input and not usage.output:
        return Text("not known", "dim")
    text = Text(f"{usage.input:,} in").append(f" ({usage.cached:,} cached)" if usage.cached else "")
    text.append(f" · {usage.output:,} out")
    return text.append(f" ({usage.reasoning:,} reasoning)" if usage.reasoning else "")


def bars(title: str, histogram: Histogram | None) -> list[RenderableType]:
    """A histogram under its title, one bar a line."""
    if histogram is None:
        return []
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(justify="right", style="dim")
    grid.add_column(style="cyan", width=BAR_WIDTH)
    grid.add_column(justify="right")
    most = max(histogram.counts)
    for label, count in zip(histogram.labels, histogram.counts, strict=True):
        grid.add_row(label, bar(count / most, BAR_WIDTH), f"{count:,}")
    return ["", Text(title, "bold"), grid]
