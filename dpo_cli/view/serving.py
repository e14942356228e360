"""What was pushed, and whether a server serves what is on disk."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from dpo_cli.view.facts import fact_table
from dpo_cli.view.text import safe

if TYPE_CHECKING:
    from dpo_cli.stages.push.run import Pushed
    from dpo_cli.stages.serve_config.check import Checked


BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B"))


def pushed(console: Console, result: "Pushed") -> None:
    """What `push` sent, or would send."""
    sent = result.result
    for name, size in sent.sent.items():
        console.print(safe(f"{'would send' if sent.dry_run else 'sent':>10}  {_bytes(size):>9}  {name}"))
    for name, size in sent.skipped.items():
        console.print(safe(f"{'is there':>10}  {_bytes(size):>9}  {name}", "dim"))
    table = fact_table()
    table.add_row("to", safe(sent.dest))
    table.add_row("in all", f"{len(sent.sent):,} files, {_bytes(sent.bytes)}; {len(sent.skipped):,} were there")
    if result.verdict is not None:
        table.add_row("gates", safe(result.verdict, "green" if result.verdict == "pass" else "red"))
    if result.merged is not None:
        difference = f"{result.merged.mean_difference:.2g} nats a token from the adapter's"
        table.add_row("merged", f"log-probabilities {difference} ({result.merged.dtype})")
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
    table = fact_table()
    table.add_row("server", safe(result.url))
    table.add_row("compared", f"{result.prompts} rows, tolerance {result.tolerance:g} nats a token")
    for note in result.notes:
        table.add_row("note", safe(note, "yellow"))
    console.print(table)
