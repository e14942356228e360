"""Pages for a browser: what the judge did, how a training run went, a sweep's runs side by side, rounds,
whether the policy is better.

Each function returns one self-contained page and writes nothing. They compute nothing: numbers come from `audit`,
`evaluate`, `stats` and `sweep`.
"""

from dpo_cli.html.audit import audit
from dpo_cli.html.evaluation import evaluation
from dpo_cli.html.rounds import rounds
from dpo_cli.html.run import run
from dpo_cli.html.sweep import sweep

__all__ = ["audit", "evaluation", "rounds", "run", "sweep"]
