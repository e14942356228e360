"""What a judge is worth, in a terminal: each number beside what an unbiased judge would have."""

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from dpo_cli.analysis.judge_audit import Audit, Example, JudgeAudit, LengthEffect
from dpo_cli.analysis.reliability import TENTATIVE, Reliability, verdict
from dpo_cli.judges._ranking import label_of
from dpo_cli.statistics import Interval
from dpo_cli.view.braille import interval
from dpo_cli.view.facts import alarm, bars, counted, facts, share, share_of, spread_row, tokens
from dpo_cli.view.text import ID_SHOWN, LABEL, dollars, joined, number, percent, safe_line

SIDE_BY_SIDE = 110  # columns from which a judge's numbers stand beside its histogram
WHISKER_WIDTH = 24
GOOD, BAD = "green", "yellow"
HALF = 0.5


def audit(console: Console, found: Audit) -> None:
    """Everything that the judgments tell about their judge."""
    console.print(_whole(found))
    for name, judge in found.judges.items():
        console.print(_section(safe_line(name)))
        console.print(_judge(judge, console.width))
    if found.between_judges is not None:
        console.print(_section(Text("between the judges")))
        grid = facts()
        _reliability(grid, found.between_judges)
        console.print(grid)
    if found.length.slope is not None or found.length.longer_chosen is not None:
        console.print(_section(Text("length")))
        console.print(_lengths(found.length, found.length_controlled))
    if found.examples:
        console.print(_section(Text("worth a look")))
        console.print(_examples(found.examples))
    console.print()
    console.print(_findings(found.findings))


def _whole(found: Audit) -> RenderableType:
    grid = facts()
    grid.add_row("judged", share_of(found.judged, found.total))
    grid.add_row("skipped", _with_reasons(found.skipped, found.total))
    grid.add_row("errors", alarm(sum(found.errors.values()), _with_reasons(found.errors, found.total)))
    grid.add_row("orders agree", share(found.consistent))
    grid.add_row("score", spread_row(found.scores))
    grid.add_row("best − worst", spread_row(found.gaps))
    grid.add_row("tokens", tokens(found.usage))
    grid.add_row("cost", dollars(found.usd))
    return grid


def _with_reasons(counts: dict[str, int], total: int) -> Text:
    if not counts:
        return Text("0")
    return share_of(sum(counts.values()), total).append(": ").append_text(counted(counts))


def _judge(judge: JudgeAudit, width: int) -> RenderableType:
    grid = facts()
    grid.add_row(
        "prompts", f"{judge.judgments:,} in {judge.orders:,} orders" if judge.orders else f"{judge.judgments:,}"
    )
    if judge.first_wins is not None and judge.expected_first is not None:
        grid.add_row("first shown wins", _against(judge.first_wins, judge.expected_first))
        grid.add_row("score by place", _places(judge.places))
    if judge.orders > judge.judgments:
        _reliability(grid, judge.between_orders)
    histogram = Group(*bars("scores", judge.scores)[1:])
    if width >= SIDE_BY_SIDE:
        beside = Table.grid(padding=(0, 4, 0, 0))
        beside.add_row(grid, histogram)
        return beside
    return Group(grid, "", histogram)


def _reliability(grid: Table, found: Reliability) -> None:
    grid.add_row("pairs flipped", share(found.flips))
    if found.tau is not None:
        grid.add_row("Kendall τ-b", f"{found.tau:.2f}")
    if found.alpha is not None:
        style = BAD if found.alpha < TENTATIVE else GOOD
        grid.add_row("Krippendorff α", Text(f"{found.alpha:.2f}").append(f"  {verdict(found.alpha)}", style))


def _against(found: Interval, expected: float) -> Text:
    """A share on a scale, beside what chance would give; in colour whether the interval holds that."""
    style = GOOD if found.low <= expected <= found.high else BAD
    text = Text(f"{percent(found.value)} of {found.n:,}", style).append(f"  chance {percent(expected)}", "dim")
    whisker = interval(found.low, found.value, found.high, expected, WHISKER_WIDTH)
    return text.append("\n").append(whisker, style).append(f"  {percent(found.low)} – {percent(found.high)}", "dim")


def _places(places: list[Interval]) -> Text:
    """Mean deviation from the order's mean, by place; in colour where it is no chance."""
    parts = []
    for place, found in enumerate(places):
        style = "" if found.low <= 0 <= found.high else BAD
        parts.append(Text(f"{label_of(place)} ", "dim").append(f"{found.value:+.2f}", style))
    return joined(parts, "  ")


def _lengths(raw: LengthEffect, controlled: LengthEffect) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 3, 0, 0), pad_edge=False)
    for header in ("", "scores as given", "with --length-control"):
        table.add_column(header)
    effects = (raw, controlled)
    table.add_row(Text("per 100 characters", "dim"), *(_slope(effect.slope) for effect in effects))
    table.add_row(
        Text("longer chosen", "dim"),
        *(Text("–", "dim") if (found := effect.longer_chosen) is None else _against(found, HALF) for effect in effects),
    )
    return table


def _slope(slope: Interval | None) -> Text:
    if slope is None:
        return Text("–", "dim")
    text = Text(f"{round(slope.value, 2) + 0:+.2f} points", GOOD if slope.low <= 0 <= slope.high else BAD)
    return text.append(f"\n{slope.low:+.2f} – {slope.high:+.2f}", "dim")


def _examples(examples: list[Example]) -> Table:
    grid = facts()
    grid.add_column()
    for example in examples:
        row = example.judgment
        scores = "  ".join(map(number, row.scores)) if row.scores else row.skipped or ""
        grid.add_row(example.why, safe_line(row.id[:ID_SHOWN], LABEL), safe_line(scores))
    return grid


def _findings(findings: list[str]) -> RenderableType:
    if not findings:
        return Text("✓ nothing stands out", GOOD)
    grid = Table.grid(padding=(0, 1, 0, 0))
    for finding in findings:
        grid.add_row(Text("▲", BAD), safe_line(finding))
    return grid


def _section(title: Text) -> RenderableType:
    title.stylize("bold")
    return Padding(Rule(title, align="left", style="dim", characters="─"), (1, 0, 0, 0))
