"""What preference lint found: a line a finding with the rows it names, and what became of the cleaned copy."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo_cli.view.facts import alarm, facts, share
from dpo_cli.view.text import ID_SHOWN, LABEL, joined, safe, safe_line

if TYPE_CHECKING:
    from dpo_cli.analysis.lint.findings import Finding
    from dpo_cli.analysis.lint.run import Linted

ROWS_SHOWN = 4  # of one finding
STYLES = {"error": "red", "warning": "yellow"}


def lint(console: Console, result: "Linted") -> None:
    """The findings, errors first, then the numbers and the copy."""
    found = result.lint
    if found.findings:
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
        for header in ("", "rule", "what", "rows"):
            table.add_column(header, overflow="fold", no_wrap=header in ("", "rule"))
        for finding in found.findings:
            severity = Text(finding.severity, STYLES[finding.severity])
            table.add_row(severity, finding.rule, safe_line(finding.message), _rows(finding))
        console.print(table)
        console.print()
    grid = facts()
    grid.add_row("pairs", f"{found.train:,} in train · {found.val:,} in val")
    grid.add_row("errors", alarm(found.errors, Text(f"{found.errors:,}")))
    grid.add_row("warnings", alarm(found.warnings, Text(f"{found.warnings:,}")))
    grid.add_row("longer chosen", share(found.longer_chosen))
    grid.add_row("tokens by", found.tokens)
    if result.fixed is not None:
        fixed = result.fixed
        grid.add_row("cleaned copy", f"{fixed.train:,} in train · {fixed.val:,} in val")
        grid.add_row("", f"{fixed.dropped:,} rows dropped · {fixed.moved:,} moved to the other side")
        grid.add_row("errors left", alarm(result.errors_left))
        grid.add_row("wrote", safe(f"{fixed.train_path}, {fixed.val_path}"))
    console.print(grid)


def _rows(finding: "Finding") -> Text:
    """The first rows by id and place, one a line; the rest as a number."""
    shown = [
        safe_line(row.id[:ID_SHOWN], LABEL).append(" ").append_text(safe_line(row.where))
        for row in finding.rows[:ROWS_SHOWN]
    ]
    more = len(finding.rows) - len(shown)
    return joined([*shown, *([Text(f"and {more:,} more (--json names them)", "dim")] if more else [])], "\n")
