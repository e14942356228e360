"""What a run will need, what presets cost, what mends a run, and a sweep's runs side by side."""

import json
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import msgspec
from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dpo_cli.config.resolve import Setting
from dpo_cli.training.plan import duration
from dpo_cli.training.remedies import GUIDE, REMEDIES
from dpo_cli.view.braille import bar, interval
from dpo_cli.view.text import LABEL, dollars, percent, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.training.plan import Plan
    from dpo_cli.training.preflight import Cost
    from dpo_cli.workflows.sweep import SweepPoint

BAR_WIDTH = 20
NUMBERS_WIDTH = 58  # what a sweep's table has besides its three plots


def plan(console: Console, plan: "Plan") -> None:
    """Steps, memory part by part, time, dollars and warnings."""
    facts = _table("", "", styles=("dim", ""))
    facts.add_row("pairs", f"{plan.pairs:,} · {plan.held_out:,} held out")
    facts.add_row("steps", f"{plan.steps:,} · warmup {percent(plan.warmup_share)} · {plan.evaluations:,} evaluations")
    facts.add_row("trains", f"{plan.trained:,} weights")
    facts.add_row("tokens", f"{plan.tokens:,} · longest row {plan.longest:,} · counted by {plan.counted_by}")
    if plan.sizes:
        facts.add_row("base", safe(f"sizes from {plan.sizes}"))
    facts.add_row("forward", safe(f"{plan.forward} · the largest has {plan.largest:,} tokens"))
    facts.add_row("time", f"{duration(plan.hours)}, at an assumed utilization")
    facts.add_row("dollars", " · ".join(f"{name} {dollars(usd)}" for name, usd in plan.usd.items()))
    memory = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header, side in (("memory", "left"), ("GB", "right"), ("", "left")):
        memory.add_column(header, justify=side)  # type: ignore[arg-type]
    for name, size in plan.memory_gb.items():
        memory.add_row(name, f"{size:.2f}", Text(bar(size / max(plan.card_gb, plan.total_gb), BAR_WIDTH), "cyan"))
    style = "green" if plan.fits else "bold red"
    memory.add_row("all", Text(f"{plan.total_gb:.2f}", style), Text(f"of {plan.card_gb:g} GB", style))
    console.print(Group(facts, "", memory))
    for warning in plan.warnings:
        console.print(safe(f"! {warning}", "yellow"))


def presets(console: Console, costs: "Sequence[Cost]") -> None:
    """Every preset: what it sets and what it costs."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header, side in (("preset", "left"), ("GB", "right"), ("steps", "right"), ("time", "right"), ("$", "right")):
        table.add_column(header, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("sets, and where it is from")
    for cost in costs:
        sets = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in cost.settings.items())
        table.add_row(
            Text(cost.name, "cyan"),
            Text(f"{cost.memory_gb:.1f}", "" if cost.fits else "bold red"),
            f"{cost.steps:,}",
            duration(cost.hours),
            f"{cost.usd:.2f}",
            safe(sets or "the defaults", "cyan").append_text(safe(f"\n{cost.note}\n", "dim")),
        )
    console.print(table)
    console.print(
        Text(
            "for 1,000 pairs of 600 + 150 tokens, on an L4 unless [plan] says otherwise; reckoned, not measured", "dim"
        )
    )


def explain(console: Console, names: Sequence[str]) -> None:
    """The faults that a run has shown and what mends them; all of them, and the guide, if there are none."""
    remedies(console, names or list(REMEDIES))
    if not names:
        console.print()
        console.print(_guide())


def guide(console: Console, _: Any) -> None:
    """Learning rates, betas and batch sizes, and what mends a run by its symptoms."""
    console.print(_guide())
    console.print()
    remedies(console, list(REMEDIES))


def remedies(console: Console, names: Sequence[str]) -> None:
    """Faults, and what mends them."""
    for name in names:
        remedy = REMEDIES[name]
        console.print(Text.assemble((name, "bold cyan"), (f"  {remedy.symptom}", "")))
        console.print(Text(f"  because  {'; '.join(remedy.causes)}", "dim"))
        for step, action in enumerate(remedy.remedies, 1):
            console.print(Text(f"  {step}. {action}"))


def _guide() -> Table:
    table = _table("setting", "values", "effect", "use", styles=("cyan", "", "", "dim"))
    for rule in GUIDE:
        table.add_row(rule.setting, rule.values, rule.effect, rule.use)
    return table


def accuracy_of(point: "SweepPoint", width: int) -> Text:
    """The held-out accuracy of a sweep's point, drawn with its interval."""
    if point.accuracy is None or point.accuracy_interval is None:
        return Text("")
    low, high = point.accuracy_interval
    return Text(interval(low, point.accuracy, high, 0.5, width), "cyan" if low <= 0.5 else "green")


def signed(value: float | None, top: float, width: int) -> Text:
    """A bar of a value's size, its sign as colour."""
    return Text(bar(abs(value or 0.0) / (top or 1.0), width), "cyan" if (value or 0.0) >= 0 else "red")


def within_limit(value: float | None, top: float, limit: float, width: int) -> Text:
    """A bar, and where the limit is."""
    drawn = f"{bar((value or 0.0) / top, width):<{width}}"
    at = min(width - 1, int(limit / top * width))
    marked = drawn[:at] + "┊" + drawn[at + 1 :] if drawn[at] == " " else drawn
    return Text(marked, "cyan" if (value or 0.0) <= limit else "red")


def _table(*headers: str, styles: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False, show_header=any(headers))
    for header, style in zip(headers, styles, strict=True):
        table.add_column(header, style=style)
    return table


def settings(console: Console, rows: Sequence[Setting]) -> None:
    """Every setting, its value and where it came from; what is no default stands out."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for header in ("setting", "value", "from"):
        table.add_column(header, overflow="fold")
    values = [_setting(row.value) for row in rows]
    columns = [row.key for row in rows], values, [row.source for row in rows]
    # A cell of many lines is laid out in one go, which takes a fifth of the time; none of them may fold, though.
    together = not console.is_terminal or sum(max(map(cell_len, cells)) for cells in columns) + 9 <= console.width
    for _, section in groupby(zip(rows, values, strict=True), lambda pair: pair[0].key.rpartition(".")[0]):
        if table.rows:
            table.add_row()
        lines = [_setting_line(*pair) for pair in section]
        for part in [lines] if together else [[line] for line in lines]:
            table.add_row(*(Text("\n").join(cells) for cells in zip(*part, strict=True)))
    console.print(table)


def _setting_line(row: Setting, value: str) -> tuple[Text, Text, Text]:
    style = "dim" if row.source == "default" else "bold"
    value_style = style if style == "dim" else f"{style} {LABEL}"
    return safe_line(row.key, style), safe_line(value, value_style), safe_line(row.source, style)


def _setting(value: Any) -> str:
    if value is None:
        return "none"  # as --set takes it
    return value if isinstance(value, str) else json.dumps(msgspec.to_builtins(value), ensure_ascii=False)
