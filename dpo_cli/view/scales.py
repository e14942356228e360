"""Points on the line through the SFT adapter and the DPO adapter: what `evaluate --scales` measured."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.training.gates import compared
from dpo_cli.view.braille import interval
from dpo_cli.view.facts import gate_line, verdict
from dpo_cli.view.text import number, percent, safe

if TYPE_CHECKING:
    from dpo_cli.stages.evaluate.scales import ScalePoint, Scales
    from dpo_cli.statistics import Interval

WIDTH = 24


def scaled(console: Console, result: "Scales") -> None:
    """One line a scale, the picked one marked, and what it wins on the prompts that did not choose it."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in ("scale", "wins", "", "KL a token", "KL a completion", "rank", ""):
        table.add_column(header, no_wrap=True)
    for point in result.points:
        table.add_row(*_cells(point, result))
    console.print(table)
    level = result.points[0].win_rate.confidence
    limit = f"KL limit {result.kl_limit:g} nats a token" if result.kl_limit < 100 else "no KL limit"
    console.print(
        Text(f"scale 1: the DPO adapter · wins: ├─┤ {level:.0%}, ┊ the gate, {result.gate:g} · {limit}", "dim")
    )
    if result.verdict is not None and result.picked is None:
        console.print(verdict(result.verdict) + Text(": no scale clears the gate within the KL limit"))
    picked = next((point for point in result.points if point.scale == result.picked), None)
    if picked is not None:
        console.print(Text(f"picked: scale {picked.scale:g}", "bold green"))
        chosen, reported = _rate(picked.chosen_on), _rate(picked.reported_on)
        console.print(Text(f"wins {reported} on the half that did not choose it ({chosen} on the half that did)"))
        console.print(Text.assemble("gate  ", gate_line(compared(picked.reported_on, result.gate))))
        console.print(safe(f"adapter  {result.adapter}"))


def _cells(point: "ScalePoint", result: "Scales") -> list[str | Text]:
    kl = point.kl
    mark = {True: Text("✓", "green"), False: Text("✗", "red"), None: Text("?", "yellow")}[point.ok]
    rate = point.win_rate
    picked = point.scale == result.picked
    return [
        Text(f"{'★ ' if picked else ''}{point.scale:g}", "bold green" if picked else ""),
        _rate(rate),
        interval(rate.low, rate.value, rate.high, result.gate, WIDTH),
        "–" if kl is None else number(kl.nats_per_token),
        "–" if kl is None else number(kl.nats_per_sequence),
        str(point.rank),
        mark,
    ]


def _rate(rate: "Interval") -> str:
    return f"{percent(rate.value)} [{percent(rate.low)}, {percent(rate.high)}]"
