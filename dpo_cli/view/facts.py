"""Numbers as people read them: rows of facts, counts, shares with their intervals, spreads, histograms."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from dpo_cli.analysis.data_stats import Lengths
from dpo_cli.data.records import Usage
from dpo_cli.statistics import Histogram, Interval, Spread
from dpo_cli.training.gates import MARKS, Gate, GateVerdict, numbers
from dpo_cli.view.braille import bar
from dpo_cli.view.text import dollars, joined, percent, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.endpoint.costs import Estimate, Receipt

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


def share(proportion: Interval | None) -> Text:
    """A share with its interval."""
    if proportion is None:
        return Text("not known", "dim")
    text = Text(f"{percent(proportion.value)} of {proportion.n:,}")
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


def fact_table() -> Table:
    """Names to the right, values to the left of one gap; long values fold."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def receipt(table: Table, paid: "Receipt") -> None:
    """Add what this run asked of an endpoint, and what that cost."""
    calls = [f"{paid.calls:,} paid"]
    calls += [f"{paid.reused:,} reused from the ledger"] if paid.reused else []
    calls += [f"{paid.retries:,} retries"] if paid.retries else []
    calls += [f"{paid.failed:,} failed"] if paid.failed else []
    calls += [f"{paid.waiting:,} waiting in batches"] if paid.waiting else []
    table.add_row("calls", " · ".join(calls))
    table.add_row("tokens", token_counts(paid.usage))
    table.add_row("spent", dollars(paid.usd))
    if paid.resent or paid.interrupted:
        twice = f"{paid.resent:,} sent again without an answer, {paid.interrupted:,} left unanswered by a former run"
        twice += f" · at most {dollars(paid.unseen_usd)}" if paid.unseen_usd else ""
        table.add_row("perhaps twice", Text(twice, "yellow"))


def add_estimate(table: Table, expected: "Estimate | None") -> None:
    """Add what a run would cost, and what that rests on."""
    if expected is None:
        return
    table.add_row("calls", f"{expected.calls:,}, as far as their replies are usable")
    low, worst = expected.output_low, expected.output_worst
    table.add_row("tokens", f"about {expected.input:,} in · {low:,} to {worst:,} out")
    if expected.usd_low is None or expected.usd_worst is None:
        table.add_row("dollars", Text("nobody knows this model's price: --price IN,CACHED,OUT", "yellow"))
    else:
        table.add_row("dollars", f"{dollars(expected.usd_low)} to {dollars(expected.usd_worst)}")
    for name, (usd_low, usd_worst) in expected.cheaper.items():
        table.add_row("cheaper", safe(f"{name}: {dollars(usd_low)} to {dollars(usd_worst)}"))
    for assumption in expected.assumptions:
        table.add_row("", Text(assumption, "dim"))


def token_counts(usage: Usage) -> str:
    """`1,200 in · 300 out · 800 cached`, on one line of a table."""
    parts = [f"{usage.input:,} in", f"{usage.output:,} out"]
    parts += [f"{usage.cached:,} cached"] if usage.cached else []
    parts += [f"{usage.reasoning:,} reasoning"] if usage.reasoning else []
    return " · ".join(parts)


def reason_lines(counts: Mapping[str, int], style: str) -> Text:
    """A line a reason: `3 × timed out`."""
    return Text("\n").join(safe(f"{count:,} × {reason}", style) for reason, count in counts.items())


UNBIASED_Z = 1.96  # below, chosen being longer may be chance


VERDICT_STYLES: dict[GateVerdict, str] = {"pass": "bold green", "fail": "bold red", "not shown": "bold yellow"}


def verdict(word: GateVerdict | None) -> Text:
    """A verdict with its mark, in its colour; a dash for none."""
    return Text("–", "dim") if word is None else Text(f"{MARKS[word]} {word}", VERDICT_STYLES[word])


def gate_line(gate: Gate) -> Text:
    """A gate's verdict and its numbers."""
    return verdict(gate.verdict).append(f"  {numbers(gate)}", "not bold default")


def counts_of(values: Sequence[str]) -> Text:
    """Finish reasons with their counts, in the order in which they first occur."""
    parts = []
    for value in dict.fromkeys(values):
        count = values.count(value)
        parts.append(safe_line(value + (f" {count}" if count < len(values) else ""), finish_style(value)))
    return joined(parts, ", ")


def shares(counts: Mapping[str, int]) -> Text:
    """Finish reasons with their counts and shares."""
    total = sum(counts.values())
    parts = [
        safe_line(f"{name} ", finish_style(name)).append(f"{count:,}", "bold").append(f" ({percent(count / total)})")
        for name, count in counts.items()
    ]
    return joined(parts) if parts else Text("–", "dim")


def finish_style(reason: str) -> str:
    """The colour of a finish reason."""
    return {"stop": "green", "length": "yellow"}.get(reason, "red")


def longer_chosen(proportion: Interval | None) -> Text:
    """P(longer chosen); a length bias that is no chance stands out."""
    text = share(proportion)
    if proportion is not None:
        text.append(f"  z {proportion.z:+.1f}", "yellow" if abs(proportion.z) > UNBIASED_Z else "green")
    return text


def length_table(sides: Mapping[str, Lengths]) -> Table:
    """Words and characters of each side: minimum, median, mean, maximum."""
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
