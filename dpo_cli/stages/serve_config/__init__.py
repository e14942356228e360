"""Adapters -> the vLLM configuration that serves them, the server itself, and proof that it serves what was trained.

`plan` chooses, `render` writes it down by `formats` and `containers`, `server` starts it or loads adapters into it, and
`check` holds its log-probabilities against those of the adapters on disk.
"""

from dpo_cli.stages.serve_config.plan import ServePlan, plan
from dpo_cli.stages.serve_config.render import FORMATS, how_to_try, render

__all__ = ["FORMATS", "ServePlan", "how_to_try", "plan", "render"]
