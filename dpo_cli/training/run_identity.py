"""What a run depends on: settings, hashes of the base, the adapter and the data, and the versions that trained it."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli import __version__
from dpo_cli.adapter import Adapter
from dpo_cli.config.settings import Config
from dpo_cli.models.base_model import file_sha256, fingerprint
from dpo_cli.training import distributed
from dpo_cli.training.inputs import Inputs, Stage

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
WITHOUT_EFFECT = ("report_to", "merge", "allow_cpu")  # on what is trained: a run may go on with others


def identity_of(
    config: Config, stage: Stage, base: Path, adapter: Adapter | None, inputs: Inputs, limit: int | None
) -> dict[str, Any]:
    """Everything on which the result depends: a run goes on only if all of it is unchanged."""
    section = "train" if stage == "dpo" else "sft"
    settings = msgspec.to_builtins(getattr(config, section))
    for key in WITHOUT_EFFECT:
        settings.pop(key, None)
    # Else a step's rows are shared among the processes, and any number of them goes on with the same steps.
    processes: dict[str, Any] = {}
    if getattr(config, section).batch_per_gpu:
        processes["processes"] = distributed.count()
    if distributed.shards(getattr(config, section)):
        processes["sharded"] = True  # accelerate's checkpoints of sharded weights and of whole ones are not the same
    return {
        "stage": stage,
        **processes,
        section: settings,
        "gate": msgspec.to_builtins(config.gate) if stage == "dpo" else None,
        "model": {
            "base_sha256": fingerprint(base),
            "adapter_sha256": adapter.sha256 if adapter else None,
            "adapter_alpha": adapter.alpha if adapter else None,
            "chat_template_kwargs": config.model.chat_template_kwargs,
            "chat_template": file_sha256(Path(config.model.chat_template)) if config.model.chat_template else None,
            "thinking": config.model.thinking,
        },
        "data": {"sha256": inputs.files, "limit": limit},
        "pair": inputs.split,
    }


def model_hashes(identity: dict[str, Any]) -> dict[str, str | None]:
    """Hashes of what is trained at the start, and of what it is held against."""
    model = identity["model"]
    return {
        "policy_sha256": model["adapter_sha256"],
        "reference_sha256": (model["adapter_sha256"] or model["base_sha256"]) if identity["stage"] == "dpo" else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what trains."""
    # This package may be here without being installed: a container gets its files alone.
    found = {"python": platform.python_version(), "nothing-dpo": __version__}
    return found | {name: version(name) for name in PACKAGES}
