"""Adapters -> the vLLM configuration that serves them.

Reads the SFT adapter and, where there is one, the DPO adapter (`adapter.py` refuses what vLLM could not load), and the
base's own config where it is on this machine. Writes nothing. The flags are those of vLLM 0.32.
"""

import math
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.adapter import RANKS, Adapter, absolute, base_folder, chat_template, check_adapter, read_json
from dpo_cli.errors import UserError
from dpo_cli.settings import Config

Argument = str | int | float | bool | dict[str, Any] | list[dict[str, str]]


class ServePlan(Struct, kw_only=True):
    """What to serve: the adapters by name, and vLLM's flags (without dashes) for them and the base."""

    model: str
    adapters: dict[str, Adapter]
    arguments: dict[str, Argument]
    notes: list[str]


def render(config: Config, format: str) -> str:
    """The vLLM configuration as text, without a final newline.

    Args:
        config: names the base, both adapters and the server's settings.
        format: `cli` (a command line), `json` (model, LoRA modules, arguments) or `yaml` (for `vllm serve --config`).

    Raises:
        UserError: unknown format, or an adapter that vLLM could not load.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format '{format}'", hint=f"one of: {', '.join(FORMATS)}")
    return FORMATS[format](plan(config))


def plan(config: Config) -> ServePlan:
    """Check the adapters that exist and choose vLLM's arguments for them.

    Raises:
        UserError: no adapter at all, one that vLLM could not load, or names that collide.
    """
    model = config.model
    _check_names(config)
    base = str(absolute(model.base)) if absolute(model.base).is_dir() else model.base
    notes: list[str] = []
    adapters: dict[str, Adapter] = {}
    for stage, name, folder in (("SFT", model.name, model.adapter), ("DPO", model.dpo_name, model.dpo_adapter)):
        if folder is not None and absolute(folder).exists():
            adapters[name] = check_adapter(absolute(folder), model.base)
            notes += [f"{name}: {note}" for note in adapters[name].notes]
        else:
            notes.append(f"no {stage} adapter{f' at {folder}' if folder else ''}: '{name}' is not served")
    if not adapters:
        raise UserError(
            f"no adapter at {model.adapter} or {model.dpo_adapter}", hint="nothing-dpo train, or ADAPTER_PATH=FOLDER"
        )
    if len(adapters) == 2 and len({adapter.sha256 for adapter in adapters.values()}) == 1:
        notes.append("both adapters have the same weights")
    arguments = _arguments(config, adapters, base)
    if (length := arguments["max-model-len"]) != config.serve.max_model_len:
        notes.append(f"max-model-len is {length}, the base's own limit, not {config.serve.max_model_len}")
    if config.serve.chat_template is None:
        notes += [f"{name}: {note}" for name, adapter in adapters.items() for note in _template_notes(adapter, base)]
    return ServePlan(model=base, adapters=adapters, arguments=arguments, notes=notes)


def _arguments(config: Config, adapters: dict[str, Adapter], base: str) -> dict[str, Argument]:
    serve, template_settings = config.serve, config.model.chat_template_kwargs
    rank = max(adapter.rank for adapter in adapters.values())
    return {
        "host": serve.host,
        "port": serve.port,
        "dtype": serve.dtype,
        "max-model-len": min(serve.max_model_len, _context_limit(base)),
        "gpu-memory-utilization": serve.gpu_memory_utilization,
        "generation-config": "vllm",  # otherwise the base's own top_p, top_k and penalties fill what a request omits
        **({"chat-template": str(absolute(serve.chat_template))} if serve.chat_template else {}),
        **({"default-chat-template-kwargs": template_settings} if template_settings else {}),
        "enable-lora": True,
        "max-loras": len(adapters),
        "max-lora-rank": next(allowed for allowed in RANKS if allowed >= rank),
        "lora-modules": [
            {"name": name, "path": str(adapter.path), "base_model_name": base} for name, adapter in adapters.items()
        ],
    }


def _cli(plan: ServePlan) -> str:
    lines = [shlex.join(["vllm", "serve", plan.model]), *map(shlex.join, _flags(plan))]
    return " \\\n  ".join(lines)


def _json(plan: ServePlan) -> str:
    arguments = dict(plan.arguments)
    content = {"model": plan.model, "lora_modules": arguments.pop("lora-modules"), "arguments": arguments}
    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode()


def _yaml(plan: ServePlan) -> str:
    """For `vllm serve --config`.

    Keys have hyphens and modules are strings, since vLLM drops keys like `enable_lora: false` silently and fails on
    modules that are mappings.
    """
    import yaml

    arguments = {key: _strings(value) if isinstance(value, list) else value for key, value in plan.arguments.items()}
    content = {"model": plan.model, **arguments}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=math.inf).rstrip("\n")


FORMATS: dict[str, Callable[[ServePlan], str]] = {"cli": _cli, "json": _json, "yaml": _yaml}


def _flags(plan: ServePlan) -> Iterator[list[str]]:
    for key, value in plan.arguments.items():
        if isinstance(value, bool):
            yield [f"--{key}" if value else f"--no-{key}"]
        elif isinstance(value, dict | list):
            yield [f"--{key}", *_strings(value if isinstance(value, list) else [value])]
        else:
            yield [f"--{key}", str(value)]


def _strings(items: list[dict[str, Any]]) -> list[str]:
    return [msgspec.json.encode(item).decode() for item in items]


def _check_names(config: Config) -> None:
    names = (config.model.name, config.model.dpo_name)
    if names[0] == names[1]:
        raise UserError(f"both adapters are named '{names[0]}'", hint="SERVE_DPO_MODEL=OTHER-NAME")
    for name in names:
        if not name or name in (config.model.base, str(absolute(config.model.base))):
            raise UserError(f"an adapter can't be named '{name}', the base's name", hint="SERVE_MODEL=OTHER-NAME")


def _context_limit(base: str) -> float:
    """The longest context of the base, in tokens; infinite where it is not known here."""
    folder = base_folder(base)
    settings = read_json(folder / "config.json") if folder else {}
    limit: float = settings.get("text_config", settings).get("max_position_embeddings", math.inf)
    return limit


def _template_notes(adapter: Adapter, base: str) -> list[str]:
    folder = base_folder(base)
    template = chat_template(adapter.path)
    if template is None or (folder and template == chat_template(folder)):
        return []
    differs = "differs" if folder else "may differ"
    return [f"vLLM uses the base's chat template, and the adapter's own {differs} (--set serve.chat_template=FILE)"]
