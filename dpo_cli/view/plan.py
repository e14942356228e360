"""What a run will need, what presets cost, what mends a run, and a sweep's runs side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dpo_cli.remedies import GUIDE, REMEDIES
from dpo_cli.sweep import best_said
from dpo_cli.view.plot import bar, interval
from dpo_cli.view.text import dollars, number, percent, safe

if TYPE_CHECKING:
    from dpo_cli.plan import Plan
    from dpo_cli.sweep import Point, Swept
    from dpo_cli.training.preflight import Cost

BAR_WIDTH = 20
NUMBERS_WIDTH = 58  # what a sweep's table has besides its three plots


def plan(console: Console, plan: "Plan") -> None:
    """Steps, memory part by part, time, dollars and warnings."""
    facts = _table("", "", styles=("dim", ""))
    facts.add_row("pairs", f"{plan.pairs:,} · {plan.held_out:,} held out")
    facts.add_row("steps", f"{plan.steps:,} · warmup {percent(plan.warmup_share)} · {plan.evaluations:,} evaluations")
    facts.add_row("tokens", f"{plan.tokens:,} · longest row {plan.longest:,} · counted by {plan.counted_by}")
    facts.add_row("forward", safe(f"{plan.forward} · the largest has {plan.largest:,} tokens"))
    facts.add_row("hours", f"{plan.hours:.2f}, at an assumed utilization")
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
    for header, side in (("preset", "left"), ("GB", "right"), ("steps", "right"), ("hours", "right"), ("$", "right")):
        table.add_column(header, justify=side, no_wrap=True)  # type: ignore[arg-type]
    table.add_column("sets")
    for cost in costs:
        sets = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in cost.settings.items())
        table.add_row(
            Text(cost.name, "cyan"), Text(f"{cost.memory_gb:.1f}", "" if cost.fits else "bold red"), f"{cost.steps:,}",
            f"{cost.hours:.2f}", f"{cost.usd:.2f}", safe(sets or "the defaults", "dim"),
        )  # fmt: skip
    console.print(table)
    console.print(
        Text(
            "for 1,000 pairs of 600 + 150 tokens, on an L4 unless [plan] says otherwise; reckoned, not measured", "dim"
        )
    )


def explain(console: Console, names: Sequence[str]) -> None:
    """The faults that a run has shown and what mends them; all of them, and the guide, if there are none."""
    for name in names or REMEDIES:
        remedy = REMEDIES[name]
        console.print(Text.assemble((name, "bold cyan"), (f"  {remedy.symptom}", "")))
        console.print(Text(f"  because  {'; '.join(remedy.causes)}", "dim"))
        for step, action in enumerate(remedy.remedies, 1):
            console.print(Text(f"  {step}. {action}"))
    if names:
        return
    table = _table("setting", "values", "effect", "use", styles=("cyan", "", "", "dim"))
    for rule in GUIDE:
        table.add_row(rule.setting, rule.values, rule.effect, rule.use)
    console.print()
    console.print(table)


def swept(console: Console, result: "Swept") -> None:
    """A sweep's runs side by side, by number and as plots: accuracy with its interval, margin, KL; the best named."""
    points, width = result.points, max(6, min(BAR_WIDTH, (console.width - NUMBERS_WIDTH) // 3))
    margins, kls = (max((abs(value or 0.0) for value in values), default=0.0) for values in (
        [point.margin for point in points], [*(point.kl for point in points), result.kl_limit])
    )  # fmt: skip
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(result.setting, justify="right", no_wrap=True)
    for header in ("accuracy", "margin", "KL"):
        table.add_column(header, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("gates", no_wrap=True)
    for point in points:
        best = point.value == result.best
        table.add_row(
            Text(f"{'★ ' if best else ''}{point.value:g}", "bold green" if best else ""),
            percent(point.accuracy), _accuracy(point, width),
            number(point.margin), _signed(point.margin, margins, width),
            number(point.kl), _within(point.kl, kls, result.kl_limit, width), number(point.loss),
            Text(point.verdict or "–", "green" if point.verdict == "pass" else "red"),
        )  # fmt: skip
    console.print(table)
    console.print(Text(f"accuracy: ├─┤ 95%, ┊ chance · KL in nats a token: ┊ {result.kl_limit:g}, the limit", "dim"))
    console.print(Text(best_said(result), "bold red" if result.best is None else "bold green"))


def _accuracy(point: "Point", width: int) -> Text:
    if point.accuracy is None or point.accuracy_interval is None:
        return Text("")
    low, high = point.accuracy_interval
    return Text(interval(low, point.accuracy, high, 0.5, width), "cyan" if low <= 0.5 else "green")


def _signed(value: float | None, top: float, width: int) -> Text:
    return Text(bar(abs(value or 0.0) / (top or 1.0), width), "cyan" if (value or 0.0) >= 0 else "red")


def _within(value: float | None, top: float, limit: float, width: int) -> Text:
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
