"""What whole chains did: the rounds of `run`, and the topics of `protocol`, one line each."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.training.guards import KL
from dpo_cli.view.evaluation import evaluated
from dpo_cli.view.facts import verdict
from dpo_cli.view.plan import BAR_WIDTH, NUMBERS_WIDTH, accuracy_of, signed, within_limit
from dpo_cli.view.text import dollars, number, percent, safe, safe_line
from dpo_cli.workflows.auto import said
from dpo_cli.workflows.sweep import best_said

if TYPE_CHECKING:
    from dpo_cli.demo.run import Demonstrated
    from dpo_cli.endpoint.costs import Estimate
    from dpo_cli.workflows.auto import Search
    from dpo_cli.workflows.sweep import SweepPoint, SweepResult

if TYPE_CHECKING:
    from dpo_cli.endpoint.costs import Estimate
    from dpo_cli.workflows.protocol import Followed, TopicStep
    from dpo_cli.workflows.rounds import Round, RoundsResult, Step


def ran(console: Console, result: "RoundsResult") -> None:
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
            str(step.round),
            Text(step.stage, "cyan"),
            Text(step.state, "green" if step.state == "done" else "yellow"),
            safe_line(step.what),
            _cost(step.estimate),
        )
    console.print(table)


def topic_steps(console: Console, planned: Sequence["TopicStep"]) -> None:
    """What a protocol would do."""
    table = _table("topic", "stage", "", "what")
    styles = {"done": "green", "to do": "yellow", "perhaps": "dim"}
    for step in planned:
        state = Text(step.state, styles[step.state])
        table.add_row(safe_line(step.topic), Text(step.stage, "cyan"), state, safe_line(step.what))
    console.print(table)


def followed(console: Console, result: "Followed") -> None:
    """The topics of a protocol, one line each, and what came out."""
    table = _table("topic", "quiz", "voice", "kept", "because", "spent")
    for one in result.topics:
        quiz, voice = (
            [percent(mark) for mark in marks]
            for marks in (
                [mark.accuracy for mark in (one.sft, one.dpo) if mark],
                [mark.voice for mark in (one.sft, one.dpo) if mark],
            )
        )
        table.add_row(
            safe_line(one.topic, "cyan"),
            Text(" → ".join(quiz), "green" if one.ok else "red"),
            " → ".join(voice),
            safe_line(one.kept),
            safe(one.why),
            dollars(one.usd),
        )
    console.print(table)
    console.print(safe(f"\nmodel    {result.model}"))
    if result.adapter:
        console.print(safe(f"adapter  {result.adapter}"))


def _cells(one: "Round") -> list[str | Text]:
    trained, held = one.trained, one.evaluation
    metrics = trained.metrics if trained else {}
    gates = Text("fail", "red") if one.stopped else Text("pass", "green")
    return [
        str(one.number),
        f"{one.pairs:,} + {one.held_out:,}",
        percent(metrics.get("eval_rewards/accuracies")),
        number(metrics.get(KL)),
        "–" if held is None else f"{percent(held.win_rate)} [{percent(held.interval[0])}, {percent(held.interval[1])}]",
        "–"
        if held is None or held.scores is None
        else f"{number(held.scores.reference)} → {number(held.scores.policy)}",
        "–" if held is None else f"{number(held.lengths.reference)} → {number(held.lengths.policy)}",
        dollars(one.usd),
        gates,
    ]


def _cost(found: "Estimate | None") -> str:
    if found is None or found.usd_low is None or found.usd_worst is None:
        return ""
    return f"{dollars(found.usd_low)} to {dollars(found.usd_worst)}"


def _table(*headers: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def swept(console: Console, result: "SweepResult") -> None:
    """A sweep's runs side by side, by number and as plots: accuracy with its interval, margin, KL; the best named."""
    points, width = result.points, max(6, min(BAR_WIDTH, (console.width - NUMBERS_WIDTH) // 3))
    margins, kls = (
        max((abs(value or 0.0) for value in values), default=0.0)
        for values in ([point.margin for point in points], [*(point.kl for point in points), result.kl_limit])
    )
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
            percent(point.accuracy),
            accuracy_of(point, width),
            number(point.margin),
            signed(point.margin, margins, width),
            number(point.kl),
            within_limit(point.kl, kls, result.kl_limit, width),
            number(point.loss),
            _gates(point),
        )
    console.print(table)
    console.print(Text(f"accuracy: ├─┤ 95%, ┊ chance · KL: nats a token, ┊ {result.kl_limit:g}, the limit", "dim"))
    console.print(Text("margin: divided by beta, in nats", "dim"))
    console.print(Text(best_said(result), "bold red" if result.best is None else "bold green"))


def search(console: Console, found: "Search") -> None:
    """What a search will cost."""
    console.print(safe(said(found)))


def _gates(point: "SweepPoint") -> Text:
    """The verdict and the gates that did not pass; of a run that a search gave up, where it rests."""
    if point.verdict is None:
        return Text("–" if point.step is None else f"stopped at step {point.step:,}", "dim")
    failed = f": {', '.join(point.failed)}" if point.failed else ""
    return verdict(point.verdict).append(failed, "not bold")


def demonstrated(console: Console, result: "Demonstrated") -> None:
    """What the demo made, stage by stage, and whether it is better."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in ("stage", "made", "seconds"):
        table.add_column(header, justify="right" if header == "seconds" else "left")
    dpo, pairs = result.dpo, result.paired
    margin = dpo.metrics.get("eval_rewards/margins")
    made = {
        "base": result.base or "tiny Llama and tokenizer, from the scenes that ship with it",
        "sft": f"LoRA adapter, {result.sft.steps:,} steps on {result.sft.rows:,} scenes",
        "generate": f"{result.generated.prompts:,} prompts, several completions each",
        "judge": f"{result.judged.total:,} judgments, {pairs.train:,} + {pairs.val:,} pairs",
        "dpo": f"DPO adapter, {dpo.steps:,} steps, held-out margin {number(margin)}",
        "evaluate": f"both adapters on {result.evaluation.n:,} held-out prompts",
    }
    for stage, what in made.items():
        table.add_row(Text(stage, "cyan"), what, number(result.seconds.get(stage)))
    console.print(table)
    if dpo.step_zero:
        zero = dpo.step_zero
        console.print(Text(f"\nstep zero: loss {zero.loss:.4f} (ln 2), margin {zero.margin:.4f}"))
    console.print(Text("\nIs the DPO adapter better than the SFT adapter?", "bold"))
    evaluated(console, result.evaluation)
    if result.example:
        console.print(Text("\nThe same opening, by both", "bold"))
        texts = Table.grid(padding=(0, 3, 0, 0), expand=True)
        texts.add_column(ratio=1)
        texts.add_column(ratio=1)
        example = result.example
        texts.add_row(
            Text(f"SFT, score {number(example.reference_score)}", "yellow"),
            Text(f"DPO, score {number(example.policy_score)}", "green"),
        )
        texts.add_row(safe(example.reference), safe(example.policy))
        console.print(safe(example.prompt[-1]["content"], "dim"))
        console.print(texts)
    console.print(Text("\nServe both", "bold"))
    console.print(safe(result.serve_config), soft_wrap=True)
    console.print(Text("\nNext", "bold"))
    for line in result.next:
        console.print(safe(f"  {line}", "green"))
