"""Adapters -> the vLLM configuration that serves them, the server itself, and proof that it serves what was trained.

`served` chooses, `formats` and `containers` write it down, `server` starts it or loads adapters into it, and `check`
holds its log-probabilities against those of the adapters on disk.
"""

from collections.abc import Callable

from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.stages.serve_config import containers, formats
from dpo_cli.stages.serve_config.plan import ServePlan, plan

__all__ = ["FORMATS", "ServePlan", "plan", "render"]

FORMATS: dict[str, Callable[[ServePlan, Config], str]] = {
    "cli": lambda plan, config: formats.as_cli(plan),
    "json": lambda plan, config: formats.as_json(plan),
    "yaml": lambda plan, config: formats.as_yaml(plan),
    "k8s": containers.as_k8s,
    "modal": containers.as_modal,
    "compose": containers.as_compose,
}


def render(plan: ServePlan, config: Config, format: str) -> str:
    """A plan as text, without a final newline.

    Args:
        plan: what to serve.
        config: names what surrounds it: image, volume, secrets.
        format: `cli` (a command line), `json` (model, LoRA modules, arguments), `yaml` (for `vllm serve --config`),
            `k8s` (Deployment and Service), `modal` (an app) or `compose`.

    Raises:
        UserError: unknown format, or one that lacks a setting.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'", hint=f"one of: {', '.join(FORMATS)}")
    return FORMATS[format](plan, config)
