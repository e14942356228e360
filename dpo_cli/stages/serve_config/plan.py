"""What is to be served: the adapters that there are, and vLLM's arguments for them and the base.

Reads the SFT adapter and, where there is one, the DPO adapter (`adapter.py` refuses what vLLM could not load), and the
base's own config where it is on this machine. Writes nothing. The flags are those of vLLM 0.32.
"""

import math
from typing import Any

from msgspec import Struct

from dpo_cli.adapter import Adapter, check_adapter, is_model
from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.models.adapter_settings import RANKS
from dpo_cli.models.base_model import absolute, check_base, find_base
from dpo_cli.models.tokenizer_files import chat_template
from dpo_cli.training.fold import folded

RUNTIME_LOADING = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"
Argument = str | int | float | bool | dict[str, Any] | list[dict[str, str]]


class ServePlan(Struct, kw_only=True):
    """What to serve: the adapters by name, and vLLM's flags (without dashes) for them and the base.

    `whole` is the name under which the model itself is served, where it is more than a base. `environment` is the
    server's; `notes` are for the user.
    """

    model: str
    adapters: dict[str, Adapter]
    whole: str | None = None
    arguments: dict[str, Argument]
    environment: dict[str, str]
    notes: list[str]


def plan(config: Config) -> ServePlan:
    """Check the adapters that exist and choose vLLM's arguments for them.

    Raises:
        UserError: no adapter at all, one that vLLM could not load, or names that collide.
    """
    _check_names(config)
    asked, config = config, folded(config)
    model = config.model
    if is_model(absolute(model.dpo_adapter)):
        return _whole_plan(config)
    base = str(absolute(model.base)) if absolute(model.base).is_dir() else model.base
    notes: list[str] = []
    adapters: dict[str, Adapter] = {}
    whole = model.name if asked.model.adapter_into_base and asked.model.adapter else None
    for stage, name, folder in (("SFT", model.name, model.adapter), ("DPO", model.dpo_name, model.dpo_adapter)):
        if folder is not None and absolute(folder).exists():
            adapters[name] = check_adapter(absolute(folder), model.base, model.same_base)
            notes += [f"{name}: {note}" for note in adapters[name].notes]
        elif name != whole:
            notes.append(f"no {stage} adapter{f' at {folder}' if folder else ''}: '{name}' is not served")
    if not adapters:
        raise UserError(
            f"no adapter at {model.adapter} or {model.dpo_adapter}", hint="nothing-dpo train, or ADAPTER_PATH=FOLDER"
        )
    if len(adapters) == 2 and len({adapter.sha256 for adapter in adapters.values()}) == 1:
        notes.append("both adapters have the same weights")
    arguments = _arguments(config, adapters, base, whole)
    notes += _length_notes(config, arguments)
    if _template(config) is None:
        notes += [f"{name}: {note}" for name, adapter in adapters.items() for note in _template_notes(adapter, base)]
    environment = {RUNTIME_LOADING: "1"} if config.serve.runtime_loading else {}
    return ServePlan(
        model=base, adapters=adapters, whole=whole, arguments=arguments, environment=environment, notes=notes
    )


def _whole_plan(config: Config) -> ServePlan:
    """All weights were trained: the model is served by itself, under the policy's name."""
    model = config.model
    folder = str(absolute(model.dpo_adapter))
    check_base(folder)
    arguments = _arguments(config, {}, folder, model.dpo_name)
    notes = [f"{model.dpo_adapter} is a whole model, served by itself: '{model.name}' needs a server of its own"]
    notes += _length_notes(config, arguments)
    return ServePlan(model=folder, adapters={}, whole=model.dpo_name, arguments=arguments, environment={}, notes=notes)


def _length_notes(config: Config, arguments: dict[str, Argument]) -> list[str]:
    length = arguments["max-model-len"]
    if length == config.serve.max_model_len:
        return []
    return [f"max-model-len is {length}, the base's own limit, not {config.serve.max_model_len}"]


def _template(config: Config) -> str | None:
    """The chat template file, of the server's own settings or of all stages."""
    return config.serve.chat_template or config.model.chat_template


def _arguments(config: Config, adapters: dict[str, Adapter], base: str, whole: str | None) -> dict[str, Argument]:
    serve, template_settings = config.serve, config.model.chat_template_kwargs
    own = {key.replace("_", "-"): value for key, value in serve.arguments.items()}  # vLLM drops `some_key: false`
    rank = max((adapter.rank for adapter in adapters.values()), default=1)
    template = _template(config)
    arguments: dict[str, Argument] = {
        "host": serve.host,
        "port": serve.port,
        "dtype": serve.dtype,
        "max-model-len": min(serve.max_model_len, _context_limit(base)),
        "gpu-memory-utilization": serve.gpu_memory_utilization,
        "generation-config": "vllm",  # otherwise the base's own top_p, top_k and penalties fill what a request omits
        **({"served-model-name": whole} if whole else {}),
        **({"chat-template": str(absolute(template))} if template else {}),
        **({"default-chat-template-kwargs": template_settings} if template_settings else {}),
    }
    if adapters:
        arguments |= {
            "enable-lora": True,
            "max-loras": len(adapters),
            "max-lora-rank": next(allowed for allowed in RANKS if allowed >= rank),
            "lora-modules": [
                {"name": name, "path": str(adapter.path), "base_model_name": whole or base}
                for name, adapter in adapters.items()
            ],
        }
    _check_own(own, rank)
    return arguments | own


def _check_own(own: dict[str, Any], rank: int) -> None:
    """Refuse arguments of the user's with which the server would not start, or would serve something else."""
    where = "serve.arguments"
    if taken := own.keys() & {"lora-modules", "enable-lora", "model"}:
        hint = "model.adapter, model.dpo_adapter and model.base say what is served"
        raise UserError(f"'{taken.pop()}' is not yours to set", where=where, hint=hint)
    allowed = [value for value in RANKS if value >= rank]
    if own.get("max-lora-rank", allowed[0]) not in allowed:
        raise UserError(f"max-lora-rank is one of {', '.join(map(str, allowed))} for rank {rank}", where=where)


def _check_names(config: Config) -> None:
    names = (config.model.name, config.model.dpo_name)
    if names[0] == names[1]:
        raise UserError(f"both adapters are named '{names[0]}'", hint="SERVE_DPO_MODEL=OTHER-NAME")
    for name in names:
        if not name or name in (config.model.base, str(absolute(config.model.base))):
            raise UserError(f"an adapter can't be named '{name}', the base's name", hint="SERVE_MODEL=OTHER-NAME")


def _context_limit(base: str) -> float:
    """The longest context of the base, in tokens; infinite where it is not known here."""
    found = check_base(base)
    return math.inf if found is None or found.positions is None else found.positions


def _template_notes(adapter: Adapter, base: str) -> list[str]:
    folder = find_base(base)
    template = chat_template(adapter.path)
    if template is None or (folder and template == chat_template(folder)):
        return []
    differs = "differs" if folder else "may differ"
    return [f"vLLM uses the base's chat template, and the adapter's own {differs} (--set serve.chat_template=FILE)"]
