"""What people see: progress, tables, plots and pairs side by side, drawn with rich.

Besides cli.py, the modules of this package are the only ones that import rich. They compute nothing: numbers come
from `stats`, rows from `pages`. Every function takes the console to draw on; text that others wrote passes through
`text.safe`.
"""

from dpo_cli.view.audit import audit
from dpo_cli.view.browse import browse
from dpo_cli.view.chains import followed, ran, steps
from dpo_cli.view.console import make_console, paged, stdout_console
from dpo_cli.view.evaluation import COMPARISONS, comparison, comparison_list
from dpo_cli.view.lint import lint
from dpo_cli.view.pairs import pair, pair_list
from dpo_cli.view.plan import explain, plan, presets, swept
from dpo_cli.view.progress import LineProgress, RichProgress, make_progress
from dpo_cli.view.run import run
from dpo_cli.view.summary import (
    checked,
    demonstrated,
    evaluated,
    exported,
    generated,
    harnessed,
    jobs,
    judged,
    judged_and_paired,
    launched,
    paired,
    planned,
    pushed,
    quizzed,
    trained,
)
from dpo_cli.view.tables import (
    completion_stats,
    completions,
    completions_list,
    judgment,
    judgments_list,
    pair_stats,
    settings,
)
from dpo_cli.view.text import safe, safe_line

__all__ = [
    "COMPARISONS",
    "LineProgress",
    "RichProgress",
    "audit",
    "browse",
    "checked",
    "comparison",
    "comparison_list",
    "completion_stats",
    "completions",
    "completions_list",
    "demonstrated",
    "evaluated",
    "explain",
    "exported",
    "followed",
    "generated",
    "harnessed",
    "jobs",
    "judged",
    "judged_and_paired",
    "judgment",
    "judgments_list",
    "launched",
    "lint",
    "make_console",
    "make_progress",
    "paged",
    "pair",
    "pair_list",
    "pair_stats",
    "paired",
    "plan",
    "planned",
    "presets",
    "pushed",
    "quizzed",
    "ran",
    "run",
    "safe",
    "safe_line",
    "settings",
    "stdout_console",
    "steps",
    "swept",
    "trained",
]
