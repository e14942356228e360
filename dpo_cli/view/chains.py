"""What whole chains did: the rounds of `run`, and the topics of `protocol`, one line each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.guards import KL
from dpo_cli.view.text import dollars, number, percent, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.endpoint import Estimate
    from dpo_cli.protocol import Followed
    from dpo_cli.rounds import Ran, Round, Step


def ran(console: Console, result: "Ran") -> None:
    """The table of rounds."""
    table = _table("round", "pairs", "accuracy", "KL", "wins", "score", "length", "spent", "gates")
    for one in result.rounds:
        table.add_row(*_cells(one))
    console.print(table)
    console.print(Text("wins, score, length: against the one before; accuracy, KL (nats a token): held out", "dim"))
    for one in result.rounds:
        if one.stopped:
            console.print(safe(f"\nround {one.number} stopped: {one.stopped}", "bold red"))
    if result.adapter:
        console.print(safe(f"\nadapter  {result.adapter}"))
    if result.serve_config:
        console.print(Text("\nServe it", "bold"))
        console.print(safe(result.serve_config), soft_wrap=True)


def steps(console: Console, planned: Sequence["Step"]) -> None:
    """What a run would do."""
    table = _table("round", "stage", "", "what", "dollars")
    for step in planned:
        table.add_row(
            str(step.round), Text(step.stage, "cyan"), Text(step.state, "green" if step.state == "done" else "yellow"),
            safe_line(step.what), _cost(step.estimate),
        )  # fmt: skip
    console.print(table)


def followed(console: Console, result: "Followed") -> None:
    """The topics of a protocol, one line each, and what came out."""
    table = _table("topic", "quiz", "voice", "kept", "because", "spent")
    for one in result.topics:
        quiz, voice = ([percent(mark) for mark in marks] for marks in (
            [mark.accuracy for mark in (one.sft, one.dpo) if mark], [mark.voice for mark in (one.sft, one.dpo) if mark])
        )  # fmt: skip
        table.add_row(
            safe_line(one.topic, "cyan"), Text(" → ".join(quiz), "green" if one.ok else "red"), " → ".join(voice),
            safe_line(one.kept), safe(one.why), dollars(one.usd),
        )  # fmt: skip
    console.print(table)
    console.print(safe(f"\nmodel    {result.model}"))
    if result.adapter:
        console.print(safe(f"adapter  {result.adapter}"))


def _cells(one: "Round") -> list[str | Text]:
    trained, held = one.trained, one.evaluation
    metrics = trained.metrics if trained else {}
    gates = Text("fail", "red") if one.stopped else Text("pass", "green")
    return [
        str(one.number), f"{one.pairs:,} + {one.held_out:,}", percent(metrics.get("eval_rewards/accuracies")),
        number(metrics.get(KL)),
        "–" if held is None else f"{percent(held.win_rate)} [{percent(held.interval[0])}, {percent(held.interval[1])}]",
        "–" if held is None or held.scores is None
        else f"{number(held.scores.reference)} → {number(held.scores.policy)}",
        "–" if held is None else f"{number(held.lengths.reference)} → {number(held.lengths.policy)}",
        dollars(one.usd), gates,
    ]  # fmt: skip


def _cost(found: "Estimate | None") -> str:
    if found is None or found.usd_low is None or found.usd_worst is None:
        return ""
    return f"{dollars(found.usd_low)} to {dollars(found.usd_worst)}"


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table
