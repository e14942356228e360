"""Judges side by side, measured on pairs that a person has ranked."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.statistics import Interval
from dpo_cli.view.facts import add_estimate, fact_table, reason_lines, receipt
from dpo_cli.view.text import dollars, percent, safe_line

if TYPE_CHECKING:
    from dpo_cli.stages.measure_judges import GoldReport, MeasuredJudge


def gold(console: Console, report: "GoldReport") -> None:
    """What `judge --gold` found, or would ask."""
    facts = fact_table()
    facts.add_row("gold", safe_line(f"{report.path} · {report.prompts:,} prompts · {report.pairs:,} pairs"))
    add_estimate(facts, report.estimate)
    if report.receipt is not None:
        receipt(facts, report.receipt)
    console.print(facts)
    if report.judges:
        console.print()
        console.print(_table(report))
    for one in report.judges:
        for counts, style in ((one.skipped, "yellow"), (one.errors, "red")):
            if counts:
                console.print(safe_line(f"{one.name}: ").append_text(reason_lines(counts, style)))
    if report.findings:
        console.print()
    for finding in report.findings:
        console.print(safe_line(f"• {finding}"))


def _table(report: "GoldReport") -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("judge")
    for header in ("agrees", "95%", "against the best", "$ a 1,000", "first shown wins", "orders flip"):
        table.add_column(header, justify="right")
    for one in sorted(report.judges, key=_agreement, reverse=True):
        named = safe_line(one.name, "bold green" if one.name == report.cheapest else "")
        table.add_row(
            named.append(" ←" if one.name == report.cheapest else ""),
            "–" if one.agreement is None else percent(one.agreement.value),
            _ends(one.agreement),
            "best" if one.name == report.best else _ends(one.difference, sign=True),
            "–" if one.usd_per_1000 is None else dollars(one.usd_per_1000),
            _first(one),
            "–" if one.flips is None else percent(one.flips.value),
        )
    return table


def _agreement(one: "MeasuredJudge") -> float:
    return one.agreement.value if one.agreement else -1.0


def _ends(interval: Interval | None, sign: bool = False) -> str:
    if interval is None:
        return "–"
    low, high = (f"{end:+.1%}" if sign else percent(end) for end in (interval.low, interval.high))
    return f"{low} – {high}"


def _first(one: "MeasuredJudge") -> Text:
    """How often what is shown first wins; in colour where that is no chance."""
    wins, chance = one.first_wins, one.expected_first
    if wins is None or chance is None:
        return Text("–", "dim")
    text = Text(percent(wins.value), "" if wins.holds(chance) else "yellow")
    return text.append(f" of {percent(chance)}", "dim")
