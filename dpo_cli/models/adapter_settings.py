"""adapter_config.json: whether PEFT can make sense of it, and what vLLM does not serve of such an adapter.

Reads the file; writes nothing. By the fields of PEFT's LoraConfig that change what an adapter computes, and by the
rules of vLLM 0.32's own loader (`vllm/lora/peft_helper.py`). Fields of later versions pass.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.errors import UserError
from dpo_cli.models.weights import check_no_pointer

CONFIG = "adapter_config.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
# Settings of PEFT that change what an adapter computes and that vLLM refuses, unless empty or false.
UNSERVED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the LoRA weights (modules_to_save)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "lora_bias": "biases on LoRA layers (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}
# Initialisations that leave the base's weights as they are; the others (PiSSA, OLoRA, ...) change them.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
INIT = re.compile(r"gaussian|eva|orthogonal|mica|lora_ga|olora|pissa(_niter_\d+)?|corda|loftq", re.IGNORECASE)
LARGEST = 1e30  # a scaling beyond it is no float32


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < LARGEST
    )


def _are(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) and not isinstance(one, bool) for one in value)


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or _are(str, value)


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _are_layers(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)) or _are(int, value)


def _are_tokens(value: Any) -> bool:
    lists = value.values() if isinstance(value, dict) else [value]
    return all(_are(int, one) for one in lists)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


# Field -> (whether a value is one of its kind, what is wrong with one that is not); unset and null pass.
FIELDS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "lora_alpha": (_is_number, "is no number"),
    "lora_dropout": (_is_share, "is no share of 1"),
    "target_modules": (_are_names, "names no modules"),
    "exclude_modules": (_are_names, "names no modules"),
    "modules_to_save": (lambda value: _are(str, value), "is no list of modules"),
    "layers_to_transform": (_are_layers, "is no number of a layer, nor a list of them"),
    "trainable_token_indices": (_are_tokens, "is no list of tokens"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "is none of none, all, lora_only"),
    "init_lora_weights": (lambda value: isinstance(value, bool) or INIT.fullmatch(str(value)), "is no initialisation"),
    "base_model_name_or_path": (lambda value: isinstance(value, str), "names no model"),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias"), (_is_flag, "is neither true nor false")),
}
NOT_NULL = ("lora_alpha", "lora_dropout", "bias", "init_lora_weights")


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of a LoRA adapter's folder.

    Raises:
        UserError: there are none, or PEFT could make no sense of them; the field is named.
    """
    file = path / CONFIG
    try:
        check_no_pointer(file)
        settings = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except (FileNotFoundError, NotADirectoryError):
        raise _no_settings(path) from None
    except OSError as error:
        raise UserError(f"can't be read: {error.strerror or error}", where=str(file)) from None
    except msgspec.MsgspecError as error:
        raise UserError(f"not a JSON object: {error}", where=str(file)) from None
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"peft_type is {kind}: LORA alone is trained and served", where=str(file))
    if (task := settings.get("task_type")) not in (None, "CAUSAL_LM"):
        raise UserError(f"task_type is {task!r}: CAUSAL_LM alone is trained and served", where=str(file))
    for name, (is_one, wrong) in FIELDS.items():
        value = settings.get(name)
        if (value is not None or (name in settings and name in NOT_NULL)) and not is_one(value):
            raise UserError(f"{name} is {value!r}, which {wrong}", where=str(file))
    _check_patterns(settings, file)
    targets = settings.get("target_modules")
    if not targets and not settings.get("target_parameters"):
        raise UserError("target_modules is empty: the adapter changes no layer", where=str(file))
    if isinstance(targets, str) and targets != "all-linear":
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(f"target_modules is {targets!r}, which is no pattern: {error}", where=str(file)) from None
    return settings


def unserved_settings(settings: dict[str, Any], rank: int) -> list[str]:
    """What vLLM does not serve of an adapter with these settings."""
    reasons = [reason for key, reason in UNSERVED.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        reasons.append(f"trained biases (bias = {settings['bias']})")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        reasons.append(f"an initialisation that changes the base (init_lora_weights = {init})")
    if rank > RANKS[-1]:
        reasons.append(f"rank {rank} (1 to {RANKS[-1]})")
    return reasons


def _no_settings(path: Path) -> UserError:
    """The error of a folder without adapter_config.json, with what may have been meant."""
    inner = sorted(path.glob(f"*/{CONFIG}")) if path.is_dir() else []
    hint = "nothing-dpo train --stage sft makes one, or --set model.adapter=FOLDER"
    if inner:
        hint = f"there is one in {inner[0].parent}"
    elif (path / "config.json").is_file():
        hint = "this is a whole model: --set model.base=FOLDER with it, and --set model.adapter=none"
    what = "a file, not a folder with" if path.is_file() else "no"
    return UserError(f"{what} {CONFIG}: not a LoRA adapter", where=str(path), hint=hint)


def _check_patterns(settings: dict[str, Any], file: Path) -> None:
    patterns = {key: settings.get(key) or {} for key in ("rank_pattern", "alpha_pattern")}
    if odd := next((key for key, value in patterns.items() if not isinstance(value, dict)), None):
        raise UserError(f"{odd} is {settings[odd]!r}, which maps no module", where=str(file))
    for rank in (settings.get("r"), *patterns["rank_pattern"].values()):
        if not _is_rank(rank):
            raise UserError(f"rank {rank!r} is none: a whole number from 1", where=str(file))
    for alpha in patterns["alpha_pattern"].values():
        if not _is_number(alpha):
            raise UserError(f"alpha_pattern has {alpha!r}, which is no number", where=str(file))
