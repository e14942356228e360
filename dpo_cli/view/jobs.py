"""Jobs that run elsewhere: one that was launched, and the list."""

from typing import TYPE_CHECKING

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.view.facts import fact_table
from dpo_cli.view.text import dollars, safe, safe_line
from dpo_cli.view.training import trained

if TYPE_CHECKING:
    from dpo_cli.jobs.launch import Launched


def launched(console: Console, result: "Launched") -> None:
    """What became of a job: what its command says for itself, and what is known of the job."""
    from dpo_cli.training.run_history import Trained

    if result.result is not None and result.job.spec.command == "train":
        trained(console, msgspec.convert(result.result, Trained))
    table = fact_table()
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
    for header in ("job", "state", "step", "cost", "to the cap", "submitted", ""):
        table.add_column(header, overflow="fold")
    for one in result:
        code = "" if one.status.exit_code is None else f" ({one.status.exit_code})"
        reason = safe_line(one.status.reason or "", "dim")
        table.add_row(
            safe_line(one.job.id),
            f"{one.status.state}{code}",
            "" if one.step is None else f"{one.step:,}",
            "" if one.usd is None else dollars(one.usd),
            "" if one.hours_left is None else f"{one.hours_left:.1f} h",
            one.job.submitted,
            reason,
        )
    console.print(table)
