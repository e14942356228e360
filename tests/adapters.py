"""Real LoRA adapters on a tiny base, and the ways in which they break on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_cli.demo.tiny import make_base

TEXTS = [
    "[MABEL] You returned the umbrella? It was raining.",
    "[OTIS] It was his umbrella. I only stood under it for a year.",
    "[MABEL] A year! Nobody stands under anything for a year.",
    "You write the next lines of a scene. Each line is [NAME] text.",
]
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(folder: Path) -> Path:
    return make_base(folder, TEXTS * 4, vocabulary=400)


def save_adapter(folder: Path, base: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save a LoRA adapter with random weights, none of them zero, by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": MODULES, "init_lora_weights": False} | settings
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(folder)
    return folder


def edit_settings(**changes: Any) -> Callable[[Path], None]:
    """A breakage of adapter_config.json."""

    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A breakage of adapter_model.safetensors: `change` alters the dict of tensors in place."""

    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = str(folder / "adapter_model.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return edit


FIRST = "base_model.model.model.layers.0.mlp.down_proj"


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _scale(by: float) -> Callable[[dict[str, Any]], None]:
    def scale(tensors: dict[str, Any]) -> None:
        tensors[f"{FIRST}.lora_B.weight"] = (tensors[f"{FIRST}.lora_B.weight"] * by).half()

    return scale


def _rename(new: str, infix: str = "") -> Callable[[dict[str, Any]], None]:
    def rename(tensors: dict[str, Any]) -> None:
        for side in "AB":
            tensors[f"{new}.lora_{side}{infix}.weight"] = tensors.pop(f"{FIRST}.lora_{side}.weight")

    return rename


def _widen(tensors: dict[str, Any]) -> None:
    key = f"{FIRST}.lora_A.weight"
    tensors[key] = tensors[key].repeat(1, 2)


# What is broken -> (how, words of the refusal).
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "cut short": (_truncate, "cut short"),
    "not safetensors": (lambda folder: (folder / "adapter_model.safetensors").write_text("version 1"), "safetensors"),
    "rank": (edit_settings(r=1024), "rank 1024"),
    "rank of one module": (edit_settings(rank_pattern={"q_proj": 513}), "rank 513"),
    "DoRA": (edit_settings(use_dora=True), "DoRA"),
    "whole modules": (edit_settings(modules_to_save=["lm_head"]), "modules_to_save"),
    "bias": (edit_settings(bias="all"), "bias = all"),
    "LoRA bias": (edit_settings(lora_bias=True), "lora_bias"),
    "PiSSA": (edit_settings(init_lora_weights="pissa"), "init_lora_weights = pissa"),
    "activated LoRA": (edit_settings(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    "replicated layers": (edit_settings(layer_replication=[[0, 2]]), "layer_replication"),
    "QALoRA": (edit_settings(use_qalora=True), "use_qalora"),
    "foreign tensor": (
        edit_weights(lambda tensors: tensors.update({"model.norm.weight": tensors[f"{FIRST}.lora_A.weight"].clone()})),
        "model.norm.weight is no lora_A",
    ),
    "adapter name in keys": (edit_weights(_rename(FIRST, ".default")), "lora_A.default.weight is no lora_A"),
    "unknown layer": (edit_weights(_rename("base_model.model.model.layers.0.mlp.c_attn")), "no layer"),
    "half a pair": (edit_weights(lambda tensors: tensors.pop(f"{FIRST}.lora_B.weight")), "has no lora_B"),
    "other shape": (edit_weights(_widen), "the adapter is for [64, 384]"),
}  # fmt: skip

# vLLM loads these and answers nonsense, or as another model than was trained.
WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "other method": (edit_settings(peft_type="LOHA"), "peft_type is LOHA"),
    "other rank": (edit_settings(r=8), "has rank 4; adapter_config.json says 8"),
    "layer beyond the base": (edit_weights(_rename("base_model.model.model.layers.7.mlp.down_proj")), "no layer"),
    "NaN": (edit_weights(_scale(float("nan"))), "NaN or infinity"),
    "infinity": (edit_weights(_scale(float("inf"))), "NaN or infinity"),
    "other base": (edit_settings(base_model_name_or_path="other/llama-7b"), "trained on other/llama-7b"),
}  # fmt: skip
