"""What a run will need, what presets cost, what mends a run, and a sweep's runs side by side."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpo_cli.remedies import GUIDE, REMEDIES
from dpo_cli.view.plot import bar
from dpo_cli.view.text import dollars, number, percent, safe

if TYPE_CHECKING:
    from dpo_cli.plan import Plan
    from dpo_cli.sweep import Point, Swept
    from dpo_cli.training.preflight import Cost

BAR_WIDTH = 20


def plan(console: Console, plan: "Plan") -> None:
    """Steps, memory part by part, time, dollars and warnings."""
    facts = _table("", "", styles=("dim", ""))
    facts.add_row("pairs", f"{plan.pairs:,} · {plan.held_out:,} held out")
    facts.add_row("steps", f"{plan.steps:,} · warmup {percent(plan.warmup_share)} · {plan.evaluations:,} evaluations")
    facts.add_row("tokens", f"{plan.tokens:,} · longest row {plan.longest:,} · counted by {plan.counted_by}")
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
    """A sweep's runs side by side: numbers, and bars of accuracy, margin and KL."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in (result.setting, "accuracy", "margin", "loss", "KL", "gates"):
        table.add_column(header, justify="right" if header != "gates" else "left")
    for point in result.points:
        best = point.value == result.best
        over = point.kl is not None and point.kl > result.kl_limit
        table.add_row(
            Text(f"{'★ ' if best else ''}{point.value:g}", "bold green" if best else ""),
            *(Text("–" if value is None else number(value)) for value in (point.accuracy, point.margin, point.loss)),
            Text("–" if point.kl is None else number(point.kl), "red" if over else ""),
            Text(point.verdict or "–", "green" if point.verdict == "pass" else "red"),
        )
    console.print(table)
    console.print()
    console.print(_bars(result))
    if result.best is None:
        said = Text(f"no run stayed within {result.kl_limit:g} nats a token and passed its gates", "bold red")
    else:
        said = Text(f"best: {result.setting} = {result.best:g}, the most accurate of those that pass", "bold green")
    console.print(Group("", said))


def _bars(result: "Swept") -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in (result.setting, "accuracy", "margin", f"KL (limit {result.kl_limit:g})"):
        table.add_column(header, no_wrap=True)
    names = ("accuracy", "margin", "kl")
    tops = [max([abs(getattr(point, name) or 0.0) for point in result.points], default=0.0) for name in names]
    for point in result.points:
        cells = [_cell(point, name, top) for name, top in zip(names, tops, strict=True)]
        table.add_row(f"{point.value:g}", *cells)
    return table


def _cell(point: "Point", name: str, top: float) -> Text:
    value = getattr(point, name)
    if value is None or not top:
        return Text("–", "dim")
    return Text(f"{bar(abs(value) / top, BAR_WIDTH):<{BAR_WIDTH}}", "cyan" if value >= 0 else "red")


def _table(*headers: str, styles: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False, show_header=any(headers))
    for header, style in zip(headers, styles, strict=True):
        table.add_column(header, style=style)
    return table
