"""A training run: its curves as small plots, its last values, events and gates."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dpo_cli.training.gates import WORDS, open_gates
from dpo_cli.training.run_history import Run
from dpo_cli.view.braille import Frame, braille, frame
from dpo_cli.view.console import NARROW
from dpo_cli.view.facts import fact_table, gate_line, reason_lines, verdict
from dpo_cli.view.text import number, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.training.run_history import Trained

# TRL's name of a metric, and the title of its plot. Those that a run lacks are left out.
PLOTS = {
    "loss": "loss",
    "rewards/margins": "margins",
    "rewards/accuracies": "accuracies",
    "kl_nats_per_token": "KL, nats a token",
    "kl": "drift on the pairs",
    "mean_token_accuracy": "token accuracy",
}
EVALUATED = "eval_"
TRAIN_STYLE, EVAL_STYLE = "cyan", "yellow"
EVAL_MARK, ACT_MARK = "●", "▲"
ACT_STYLE = "red"
PLOT_HEIGHT = 6
PLOT_WIDTH = 60  # characters at most; wider says no more
EVENTS_SHOWN = 12
AXIS_WIDTH = 8


def run(console: Console, run: Run) -> None:
    """Everything that a run folder tells, as far as the run has come."""
    console.print(_title(run))
    plots = [name for name in PLOTS if name in run.series or EVALUATED + name in run.series]
    if plots:
        console.print()
        console.print(_plots(run, plots, console.width))
        console.print(_values(run))
    else:
        console.print(Text("no metrics yet", "dim"))
    if run.events:
        console.print()
        console.print(_events(run.events))
    if run.report:
        console.print()
        console.print(_report(run.report))


def plot(run: Run, name: str, width: int) -> RenderableType:
    """One metric: a curve for training, dots for evaluations, the last values in the title."""
    trained, evaluated = run.series.get(name, []), run.series.get(EVALUATED + name, [])
    window = frame([*trained, *evaluated], max(1, min(width - AXIS_WIDTH - 1, PLOT_WIDTH)), PLOT_HEIGHT)
    lines = [Text(line, TRAIN_STYLE) for line in braille(trained, window)]
    for x, y in evaluated:
        if y == y:
            column, row = window.dot(x, y)
            lines[row // 4] = _marked(lines[row // 4], column // 2)
    title = Text(PLOTS[name], "bold")
    for points, style in ((trained, TRAIN_STYLE), (evaluated, EVAL_STYLE)):
        if points:
            title.append(f"  {number(points[-1][1])}", f"not bold {style}")
    high, low = (number(round(edge, 4)) for edge in (window.high, window.low))  # what fits beside an axis
    labels = [high, *[""] * (PLOT_HEIGHT - 2), low]
    if window.low == window.high:
        labels = [""] * PLOT_HEIGHT
        labels[PLOT_HEIGHT // 2] = low
    rows = [
        Text.assemble((f"{label:>{AXIS_WIDTH - 1}} │", "dim"), line) for label, line in zip(labels, lines, strict=True)
    ]
    steps = f"{number(window.left)} – {number(window.right)} steps"
    axis = Text(f"{'':{AXIS_WIDTH}}└{steps:─^{window.width}}", "dim", no_wrap=True)
    return Group(title, *rows, axis, _acts(run, window))


def _acts(run: Run, window: Frame) -> Text:
    """Where guards found something, below the axis."""
    steps = [act["step"] for act in run.acts() if window.left <= act["step"] <= window.right]
    columns = {window.dot(step, window.low)[0] // 2 for step in steps}
    marks = "".join(ACT_MARK if column in columns else " " for column in range(window.width))
    return Text(f"{'':{AXIS_WIDTH + 1}}{marks}".rstrip(), ACT_STYLE)


def _marked(line: Text, column: int) -> Text:
    return line[:column] + Text(EVAL_MARK, EVAL_STYLE) + line[column + 1 :]


def _plots(run: Run, names: list[str], width: int) -> RenderableType:
    """Two plots beside each other, or one where the terminal is narrow."""
    columns = 2 if width >= NARROW else 1
    grid = Table.grid(padding=(0, 2, 0, 0))
    cells = [plot(run, name, width // columns - 2) for name in names]
    for start in range(0, len(cells), columns):
        grid.add_row(*cells[start : start + columns])
    return grid


def _title(run: Run) -> Text:
    text = Text("run ", "bold").append_text(safe_line(run.name, "not bold cyan"))
    steps = [points[-1][0] for points in run.series.values()]
    if steps:
        text.append(f" · step {number(max(steps))}", "not bold")
    if run.report is not None and run.report.verdict is not None:
        text.append(" · ", "dim").append_text(verdict(run.report.verdict))
        if names := open_gates(run.report.gates):
            text.append_text(safe_line(f": {', '.join(names)}", "not bold"))
    text.append("   ").append("── ", TRAIN_STYLE).append("train  ", "not bold dim")
    text.append(f"{EVAL_MARK} ", EVAL_STYLE).append("evaluation", "not bold dim")
    return text.append(f"  {ACT_MARK} ", ACT_STYLE).append("guards", "not bold dim") if run.acts() else text


def _values(run: Run) -> Table:
    """Last values of what is not plotted, in training and evaluation."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    table.add_column("last value")
    table.add_column("train", justify="right", style=TRAIN_STYLE)
    table.add_column("evaluation", justify="right", style=EVAL_STYLE)
    names = dict.fromkeys(name.removeprefix(EVALUATED) for name in run.last)
    for name in [*(name for name in PLOTS if name in names), *sorted(names.keys() - PLOTS.keys())]:
        trained, evaluated = run.last.get(name), run.last.get(EVALUATED + name)
        table.add_row(safe_line(name), _or_nothing(trained), _or_nothing(evaluated))
    return table


def _or_nothing(value: float | None) -> str:
    return "" if value is None else number(value)


def _events(events: list[dict[str, Any]]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for event in events[-EVENTS_SHOWN:]:
        details = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
        told = ", ".join(f"{key} {_value(value)}" for key, value in details.items())
        table.add_row(
            safe_line(f"step {event.get('step', '–')}", "dim"),
            safe_line(str(event.get("event", "")), "bold"),
            safe(told),
        )
    left_out = len(events) - EVENTS_SHOWN
    return Group(
        Text(f"events (the last {EVENTS_SHOWN} of {len(events)})" if left_out > 0 else "events", "bold"), table
    )


def _report(report: "Trained") -> RenderableType:
    """The gates, step zero among them, and what came out."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for header, justify in (("gate", "left"), ("value", "right"), ("limit", "right"), ("", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]
    if report.step_zero is not None:
        table.add_row(
            "step zero", f"loss {number(report.step_zero.loss)}", "0.6931", verdict(WORDS[report.step_zero.ok])
        )
    for name, gate in report.gates.items():
        table.add_row(safe_line(name), number(gate.value), number(gate.limit), verdict(gate.verdict))
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for key in ("verdict", "best_checkpoint", "adapter", "policy_sha256", "reference_sha256"):
        if (value := getattr(report, key)) is not None:
            made.add_row(Text(key.replace("_", " "), "dim"), safe(value))
    return Group(table, "", made)


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return number(value)


def trained(console: Console, result: "Trained") -> None:
    """What became of a training run."""
    table = fact_table()
    table.add_row("rows", f"{result.rows:,} · {result.held_out:,} held out · {result.shortened:,} prompts shortened")
    if result.refused:
        table.add_row("refused", reason_lines(result.refused, "yellow"))
    steps = f"{result.step:,} of {result.steps:,}"
    if result.finished_before:
        steps += " · finished before, nothing done (--fresh starts over)"
    elif result.resumed_from is not None:
        steps += f" · resumed from {result.resumed_from:,}"
    table.add_row("steps", steps)
    if result.step_zero:
        table.add_row("step zero", f"loss {result.step_zero.loss:.4f}, margin {result.step_zero.margin:.4f}")
    for name, gate in result.gates.items():
        table.add_row(name, gate_line(gate))
    if result.verdict:
        best = f", the best of {result.best_of} evaluations" if result.best_of > 1 else ""
        table.add_row("adapter", safe(f"{result.adapter}, from {result.best_checkpoint}{best}"))
    if result.ended:
        table.add_row(
            "ended early", safe(f"{result.ended}: nothing-dpo inspect run {Path(result.run).name} --explain", "yellow")
        )
    if result.merged:
        off = result.merged.mean_difference
        table.add_row("merged", safe(f"{result.merged.path}, {off:.1e} nats a token from base and adapter"))
    for reason in result.reasons:
        table.add_row("because", safe(reason, "yellow"))
    console.print(table)
