"""A plan as text: vLLM's command line, JSON, or YAML for `vllm serve --config`."""

import math
import shlex
from collections.abc import Iterator
from typing import Any

import msgspec

from dpo_cli.stages.serve_config.plan import ServePlan


def as_cli(plan: ServePlan) -> str:
    """One command for a shell."""
    first = [*(f"{name}={value}" for name, value in plan.environment.items()), "vllm", "serve", plan.model]
    return " \\\n  ".join(map(shlex.join, [first, *flags(plan)]))


def as_json(plan: ServePlan) -> str:
    """Model, LoRA modules, the other arguments, and the server's environment."""
    arguments = dict(plan.arguments)
    content = {
        "model": plan.model,
        "lora_modules": arguments.pop("lora-modules", []),
        "arguments": arguments,
        "environment": plan.environment,
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def as_yaml(plan: ServePlan) -> str:
    """For `vllm serve --config`.

    Keys have hyphens and modules are strings, since vLLM drops keys like `enable_lora: false` silently and fails on
    modules that are mappings.
    """
    import yaml

    arguments = {key: _strings(value) if isinstance(value, list) else value for key, value in plan.arguments.items()}
    content = {"model": plan.model, **arguments}
    needed = "".join(f"# needs {name}={value} in the environment\n" for name, value in plan.environment.items())
    return needed + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=math.inf).rstrip("\n")


def flags(plan: ServePlan) -> Iterator[list[str]]:
    """Each argument as words of a command line."""
    for key, value in plan.arguments.items():
        if isinstance(value, bool):
            yield [f"--{key}" if value else f"--no-{key}"]
        elif isinstance(value, dict | list):
            yield [f"--{key}", *_strings(value if isinstance(value, list) else [value])]
        else:
            yield [f"--{key}", str(value)]


def _strings(items: list[Any]) -> list[str]:
    return [item if isinstance(item, str) else msgspec.json.encode(item).decode() for item in items]
