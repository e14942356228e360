"""What a stage did, in a few lines: the last thing that a command prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.schema import Usage
from dpo_cli.view.text import dollars, number, percent, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.demo import Demonstrated
    from dpo_cli.endpoint import Estimate, Receipt
    from dpo_cli.evaluate import Evaluation, Harnessed, Planned, Quizzed
    from dpo_cli.formats.export import Exported
    from dpo_cli.generate import Generated
    from dpo_cli.judge import Judged
    from dpo_cli.launch import Launched
    from dpo_cli.pair import Paired
    from dpo_cli.push import Pushed
    from dpo_cli.serve_config.check import Checked
    from dpo_cli.train import Trained

BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B"))


def generated(console: Console, result: "Generated") -> None:
    """What `generate` did, or would do."""
    table = _facts()
    merged = f" · {result.merged:,} duplicates merged" if result.merged else ""
    table.add_row("prompts", f"{result.prompts:,}{merged}")
    table.add_row(
        "owed",
        f"{result.owed_completions:,} completions of {result.owed_prompts:,} prompts"
        + (f" · {result.done_before:,} prompts were done" if result.done_before else ""),
    )
    _expect(table, result.estimate)
    if not result.dry_run:
        made = [f"{result.completions:,}"]
        made += [f"{result.cut:,} cut by the token limit"] * bool(result.cut)
        made += [f"{result.identical:,} identical to another of their prompt"] * bool(result.identical)
        table.add_row("sampled", " · ".join(made))
        if result.receipt is None:
            table.add_row("tokens", _tokens(result.usage))
        else:
            receipt(table, result.receipt)
        if result.failed:
            table.add_row("failed", safe(f"{result.failed:,} prompts; the first: {result.error}", "red"))
        table.add_row("wrote", safe(result.path))
    console.print(table)


def judged(console: Console, result: "Judged") -> None:
    """What `judge` did, or would do."""
    table = _facts()
    table.add_row("prompts", f"{result.total:,} · {result.done_before:,} judged before · {result.owed:,} owed")
    _expect(table, result.estimate)
    if result.judged:
        share = percent(result.consistent / result.judged)
        table.add_row("judged", f"{result.judged:,} · in {share} no order inverts best and worst")
    if result.weights:
        shares = ", ".join(f"{model} {weight:.2f}" for model, weight in result.weights.items())
        table.add_row("weights", safe(f"{shares}, by agreement"))
    for name, style in (("skipped", "yellow"), ("errors", "red")):
        counts = getattr(result, name)
        if counts:
            table.add_row(name, _reasons(counts, style))
    if result.receipt is not None:
        receipt(table, result.receipt)
    if result.usage != Usage():
        table.add_row("all judgments", f"{_tokens(result.usage)} · {dollars(result.usd)}")
    console.print(table)


def paired(console: Console, result: "Paired") -> None:
    """What `pair` made."""
    table = _facts()
    if result.format is not None:
        table.add_row("read as", result.format)
    table.add_row("pairs", f"{result.train:,} to train on · {result.val:,} held out")
    if result.rollouts is not None:
        scored = result.rollouts
        table.add_row("made of", f"{scored.rollouts:,} rollouts of {scored.prompts:,} prompts")
        rewards = f"chosen {scored.average_chosen_reward:.3f} · rejected {scored.average_rejected_reward:.3f}"
        table.add_row("average", f"reward {rewards} · gap {scored.average_gap:.3f}")
        if scored.skipped:
            table.add_row("no rollout", _reasons(scored.skipped, "yellow"))
    if result.skipped:
        table.add_row("no pair", _reasons(result.skipped, "yellow"))
    for warning in result.warnings:
        table.add_row("warning", safe(warning, "yellow"))
    table.add_row("wrote", safe(f"{result.train_path}, {result.val_path}"))
    console.print(table)


def exported(console: Console, result: "Exported") -> None:
    """What was exported, and how to start it elsewhere."""
    table = _facts()
    table.add_row("pairs", f"{result.train:,} to train on · {result.val:,} held out")
    table.add_row("wrote", safe("\n".join(result.files) or "nothing: a dry run"))
    console.print(table)
    for title, line in result.launch.items():
        console.print(Text(f"\n{title}", "bold"))
        console.print(safe(line, "green"), soft_wrap=True)


def judged_and_paired(console: Console, results: Mapping[str, object]) -> None:
    """What `judge` did, and the pairs that came of it."""
    judged(console, results["judged"])  # type: ignore[arg-type]
    paired(console, results["paired"])  # type: ignore[arg-type]


def pushed(console: Console, result: "Pushed") -> None:
    """What `push` sent, or would send."""
    sent = result.result
    for name, size in sent.sent.items():
        console.print(safe(f"{'would send' if sent.dry_run else 'sent':>10}  {_bytes(size):>9}  {name}"))
    for name, size in sent.skipped.items():
        console.print(safe(f"{'is there':>10}  {_bytes(size):>9}  {name}", "dim"))
    table = _facts()
    table.add_row("to", safe(sent.dest))
    table.add_row("in all", f"{len(sent.sent):,} files, {_bytes(sent.bytes)}; {len(sent.skipped):,} were there")
    if result.verdict is not None:
        table.add_row("gates", safe(result.verdict, "green" if result.verdict == "pass" else "red"))
    if result.merged is not None:
        difference = f"{result.merged['mean_difference']:.2g} nats a token from the adapter's"
        table.add_row("merged", f"log-probabilities {difference} ({result.merged['dtype']})")
    for note in result.notes:
        table.add_row("note", safe(note, "yellow"))
    console.print(table)


def _bytes(size: int) -> str:
    value, unit = next((size / (scale or 1), unit) for scale, unit in BYTES if size >= scale)
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def checked(console: Console, result: "Checked") -> None:
    """Whether a server serves what is on disk."""
    for one in result.served:
        mark = Text("✓ ", "green") if one.ok else Text("✗ ", "red")
        own = one.differences.get(one.name)
        fits = "" if own is None else f"is its adapter: {own:.2g} nats a token from it over {one.tokens:,} tokens"
        console.print(mark + safe(f"{one.name} {one.reason or fits}"), soft_wrap=True)
        for other, difference in one.differences.items():
            if other != one.name:
                console.print(safe(f"    {difference:.2g} from {other}", "dim"))
    table = _facts()
    table.add_row("server", safe(result.url))
    table.add_row("compared", f"{result.prompts} rows, tolerance {result.tolerance:g} nats a token")
    for note in result.notes:
        table.add_row("note", safe(note, "yellow"))
    console.print(table)


def trained(console: Console, result: "Trained") -> None:
    """What became of a training run."""
    table = _facts()
    table.add_row("rows", f"{result.rows:,} · {result.held_out:,} held out · {result.shortened:,} prompts shortened")
    if result.refused:
        table.add_row("refused", _reasons(result.refused, "yellow"))
    steps = f"{result.step:,} of {result.steps:,}"
    if result.finished_before:
        steps += " · finished before, nothing done (--fresh starts over)"
    elif result.resumed_from is not None:
        steps += f" · resumed from {result.resumed_from:,}"
    table.add_row("steps", steps)
    if result.step_zero:
        table.add_row("step zero", f"loss {result.step_zero['loss']:.4f}, margin {result.step_zero['margin']:.4f}")
    for name, gate in result.gates.items():
        words = {True: ("ok  ", "green"), False: ("no  ", "bold red"), None: ("?   ", "yellow")}
        verdict = Text(*words[gate.ok])
        interval = f" [{number(gate.interval[0])}, {number(gate.interval[1])}]" if gate.interval else ""
        table.add_row(name, verdict.append(f"{number(gate.value)}{interval} (limit {number(gate.limit)})", "default"))
    if result.verdict:
        table.add_row("adapter", safe(f"{result.adapter}, from {result.best_checkpoint}"))
    if result.ended:
        table.add_row(
            "ended early", safe(f"{result.ended}: nothing-dpo inspect run {Path(result.run).name} --explain", "yellow")
        )
    if result.merged:
        off = result.merged["mean_difference"]
        table.add_row("merged", safe(f"{result.merged['path']}, {off:.1e} nats a token from base and adapter"))
    for reason in result.reasons:
        table.add_row("because", safe(reason, "yellow"))
    console.print(table)


def planned(console: Console, result: "Planned") -> None:
    """What `evaluate` would do."""
    table = _facts()
    table.add_row("prompts", f"{result.prompts:,}")
    table.add_row("owed", f"{result.completions:,} completions · {result.comparisons:,} comparisons, "
                  f"{result.ratings:,} ratings of a single answer")  # fmt: skip
    _expect(table, result.estimate)
    console.print(table)


def evaluated(console: Console, result: "Evaluation") -> None:
    """Policy against reference."""
    table = _facts()
    table.add_row("win rate", _clear(result.win_rate, result.interval))
    controlled = _clear(result.length_controlled_win_rate, result.length_controlled_interval)
    table.add_row("", controlled.append("  at equal lengths", "dim"))
    table.add_row("prompts", f"{result.wins:,} won · {result.ties:,} even · {result.losses:,} lost"
                  + (f" · {result.failed:,} without a result" if result.failed else ""))  # fmt: skip
    if result.scores is not None:
        table.add_row("score", f"{number(result.scores.reference)} → {number(result.scores.policy)}, each by itself")
    table.add_row("length", f"{number(result.lengths.reference)} → {number(result.lengths.policy)} characters")
    if result.kl is not None:
        kl = result.kl
        error = "" if kl.error is None else f" ± {kl.error:.2g}"
        per_token = f"{number(kl.nats_per_token)} a token"
        table.add_row("KL", f"{kl.nats_per_sequence:.3g}{error} nats a completion · {per_token} · {kl.how}")
    elif result.no_kl:
        table.add_row("KL", safe(f"not measured: {result.no_kl}", "dim"))
    for size, sides in result.distinct.items():
        table.add_row(f"distinct-{size}", f"{sides.reference:.3f} → {sides.policy:.3f}")
    for name, found in result.position.items():
        parts = [f"{found.first_wins.share:.0%} won by the first shown"] if found.first_wins else []
        parts += [f"{found.flips.share:.0%} flip with the order"] if found.flips else []
        table.add_row("judge", safe(f"{name}: {', '.join(parts)}"))
    for name, style in (("skipped", "yellow"), ("errors", "red")):
        if counts := getattr(result, name):
            table.add_row(name, _reasons(counts, style))
    if result.receipt is not None:
        receipt(table, result.receipt)
        table.add_row("all in all", dollars(result.usd))
    for name, gate in result.gates.items():
        verdict = Text("ok  ", "green") if gate.ok else Text("no  ", "bold red")
        table.add_row(name, verdict.append(f"at least {percent(gate.value)} (limit {percent(gate.limit)})", "default"))
    for finding in result.findings:
        table.add_row("note", safe(finding, "yellow"))
    table.add_row("wrote", safe(result.path))
    console.print(table)


def quizzed(console: Console, result: "Quizzed") -> None:
    """How many questions each adapter answered rightly."""
    table = _facts()
    for name, rate in result.accuracy.items():
        table.add_row(name, f"{percent(rate.value)} right [{percent(rate.low)}, {percent(rate.high)}]")
    table.add_row("questions", f"{result.n:,}" + (f" · {result.failed:,} without a result" if result.failed else ""))
    table.add_row("right if", "exactly the answer" + ", or the judge says so" * (result.match == "judge"))
    for name, style in (("skipped", "yellow"), ("errors", "red")):
        if counts := getattr(result, name):
            table.add_row(name, _reasons(counts, style))
    if result.receipt is not None:
        receipt(table, result.receipt)
    table.add_row("wrote", safe(result.path))
    console.print(table)


def harnessed(console: Console, result: "Harnessed") -> None:
    """What lm-evaluation-harness says of both adapters."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), pad_edge=False)
    for header in ("task", "metric", "reference", "policy", "change"):
        table.add_column(header)
    for score in result.scores:
        sides = ((score.reference, score.reference_error), (score.policy, score.policy_error))
        cells = [number(value) + ("" if error is None else f" ± {error:.2g}") for value, error in sides]
        table.add_row(safe(score.task), safe(score.metric), *cells, f"{score.policy - score.reference:+.3g}")
    console.print(table)
    console.print(safe(f"wrote {result.path}", "dim"))


def _clear(value: float, interval: tuple[float, float]) -> Text:
    """A win rate with its interval, in the colour of what it says about one half."""
    low, high = interval
    style = "green" if low > 0.5 else "yellow" if high >= 0.5 else "red"
    return Text(f"{percent(value)} [{percent(low)}, {percent(high)}]", style)


def demonstrated(console: Console, result: "Demonstrated") -> None:
    """What the demo made, stage by stage, and whether it is better."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in ("stage", "made", "seconds"):
        table.add_column(header, justify="right" if header == "seconds" else "left")
    dpo, pairs = result.dpo, result.paired
    margin = dpo.metrics.get("eval_rewards/margins")
    made = {
        "base": "tiny Llama and tokenizer, from the scenes that ship with it",
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
        console.print(Text(f"\nstep zero: loss {zero['loss']:.4f} (ln 2), margin {zero['margin']:.4f}"))
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


def launched(console: Console, result: "Launched") -> None:
    """What became of a job: what its command says for itself, and what is known of the job."""
    from dpo_cli.train import Trained

    if result.result is not None and result.job.spec.command == "train":
        trained(console, msgspec.convert(result.result, Trained))
    table = _facts()
    table.add_row("job", safe(result.job.id))
    colour = {"succeeded": "green", "failed": "red", "cancelled": "yellow"}.get(result.status.state, "cyan")
    table.add_row("state", Text(result.status.state, colour))
    if result.status.reason:
        table.add_row("because", safe(result.status.reason, "yellow"))
    if result.fetched:
        table.add_row("fetched", safe(", ".join(result.fetched)))
    console.print(table)


def jobs(console: Console, result: "list[Launched]") -> None:
    """All jobs, one a line."""
    if not result:
        console.print("no jobs: nothing-dpo train --backend modal starts one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    for header in ("job", "state", "submitted", ""):
        table.add_column(header, overflow="fold")
    for one in result:
        code = "" if one.status.exit_code is None else f" ({one.status.exit_code})"
        reason = safe_line(one.status.reason or "", "dim")
        table.add_row(safe_line(one.job.id), f"{one.status.state}{code}", one.job.submitted, reason)
    console.print(table)


def _facts() -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def receipt(table: Table, paid: "Receipt") -> None:
    """Add what this run asked of an endpoint, and what that cost."""
    calls = [f"{paid.calls:,} paid"]
    calls += [f"{paid.reused:,} reused from the ledger"] * bool(paid.reused)
    calls += [f"{paid.retries:,} retries"] * bool(paid.retries)
    calls += [f"{paid.failed:,} failed"] * bool(paid.failed)
    calls += [f"{paid.waiting:,} waiting in batches"] * bool(paid.waiting)
    table.add_row("calls", " · ".join(calls))
    table.add_row("tokens", _tokens(paid.usage))
    table.add_row("spent", dollars(paid.usd))
    if paid.resent or paid.interrupted:
        twice = f"{paid.resent:,} sent again without an answer, {paid.interrupted:,} left unanswered by a former run"
        twice += f" · at most {dollars(paid.unseen_usd)}" if paid.unseen_usd else ""
        table.add_row("perhaps twice", Text(twice, "yellow"))


def _expect(table: Table, expected: "Estimate | None") -> None:
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
    for assumption in expected.assumptions:
        table.add_row("", Text(assumption, "dim"))


def _tokens(usage: Usage) -> str:
    parts = [f"{usage.input:,} in", f"{usage.output:,} out"]
    parts += [f"{usage.cached:,} cached"] * bool(usage.cached)
    parts += [f"{usage.reasoning:,} reasoning"] * bool(usage.reasoning)
    return " · ".join(parts)


def _reasons(counts: Mapping[str, int], style: str) -> Text:
    return Text("\n").join(safe(f"{count:,} × {reason}", style) for reason, count in counts.items())
