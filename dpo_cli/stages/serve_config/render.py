"""A serve plan as text, in each format, and the commands that try what it serves."""

import shlex
from collections.abc import Callable

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.stages.serve_config import containers, formats
from dpo_cli.stages.serve_config.plan import ServePlan

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


def how_to_try(plan: ServePlan, config: Config, format: str) -> list[str]:
    """Command lines, for a person: what brings local folders to the server, and what asks the newest adapter.

    Args:
        plan: what to serve.
        config: every setting.
        format: as `render` takes it.
    """
    url = f"http://{config.serve.host}:{config.serve.port}"
    first: list[str] = []
    if format == "k8s":
        forward = f"kubectl port-forward -n {config.gke.namespace} service/{containers.NAME} 8000:{containers.PORT}"
        first, url = [f"{forward} &"], "http://127.0.0.1:8000"
    elif format == "modal":
        first, url = ["modal deploy THIS_FILE   # prints the URL"], "URL"
    name = next(reversed(plan.adapters))
    body = msgspec.json.encode({"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64})
    ask = f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body.decode())}"
    return [*containers.bring(plan, config, format), *first, ask]
