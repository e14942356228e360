"""What people see: progress, tables, plots and pairs side by side, drawn with rich.

Besides cli.py, the modules of this package are the only ones that import rich. They compute nothing: numbers come
from `analysis`, rows from `data.row_index`. Every function takes the console to draw on; text that others wrote passes
through `text.safe`.
"""

from dpo_cli.view.audit import audit
from dpo_cli.view.browse import browse
from dpo_cli.view.completions import completion_stats, completions, completions_list, generated
from dpo_cli.view.console import make_console, paged, stdout_console
from dpo_cli.view.evaluation import COMPARISONS, comparison, comparison_list, evaluated, harnessed, planned, quizzed
from dpo_cli.view.gold import gold
from dpo_cli.view.jobs import jobs, launched
from dpo_cli.view.judgments import judged, judged_and_paired, judgment, judgments_list
from dpo_cli.view.lint import lint
from dpo_cli.view.pairs import exported, pair, pair_list, pair_stats, paired
from dpo_cli.view.plan import explain, guide, plan, presets, settings
from dpo_cli.view.progress import LineProgress, RichProgress, make_progress
from dpo_cli.view.scales import scaled
from dpo_cli.view.serving import checked, pushed
from dpo_cli.view.text import safe, safe_line
from dpo_cli.view.training import run, trained
from dpo_cli.view.workflows import demonstrated, followed, ran, search, steps, swept, topic_steps

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
    "gold",
    "guide",
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
    "scaled",
    "search",
    "settings",
    "stdout_console",
    "steps",
    "swept",
    "topic_steps",
    "trained",
]
