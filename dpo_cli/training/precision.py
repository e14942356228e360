"""Whether a run computes in bfloat16, and what stays in float32 where it does so on a CPU.

On a CPU with AVX512-BF16 or AMX a product in bfloat16 takes half the time. Weights of the base are bfloat16 there,
LoRA's and the optimizer's float32; between the layers the states stay float32, which brings losses and gradients
nearer to float32's than autocast alone does. Reads the header of the base's weights. Importing this needs no torch.
"""

from math import prod
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from dpo_cli.config.settings import Config, TrainingSection
from dpo_cli.models.adapter_settings import CONFIG
from dpo_cli.models.base_model import Base
from dpo_cli.models.tokenizer_files import read_object
from dpo_cli.progress import Progress
from dpo_cli.training.inputs import Stage

LEAST = 50e6  # weights: smaller bases gain little, and their runs stay the same to the last bit on every machine


def with_precision(config: Config, stage: Stage, base: Base | None, adapter: Path | None, progress: Progress) -> Config:
    """The settings with `bf16` set where it is unset and pays on this machine's CPU; said in the log.

    So what a run records, and on what it goes on, is the arithmetic that it computes with. Left as it is: on a GPU,
    in 4 bits, with all weights trained (they stay float32 and would be converted at each step), for an adapter with
    biases (its reference is folded) and for a base that is small or no safetensors.

    Args:
        config: every setting.
        stage: whose section counts.
        base: what is known of it; None: nothing.
        adapter: folder of the SFT adapter; None: a fresh one, or none.
        progress: hears what was chosen.
    """
    name = "train" if stage == "dpo" else "sft"
    section: TrainingSection = getattr(config, name)
    weights = sum(prod(tensor.shape) for tensor in base.shapes.values()) if base is not None else 0
    plain = not (getattr(section, "full", False) or section.load_in_4bit) and base is not None and not base.quantised
    if section.bf16 is not None or not plain or weights < LEAST:
        return config
    if adapter is not None and read_object(adapter / CONFIG).get("bias", "none") != "none":
        return config
    import torch

    if torch.cuda.is_available() or not multiplies_bf16():
        return config
    progress.log(f"precision: bfloat16, which this processor multiplies in; {name}.bf16 = false computes in float32")
    return replace(config, **{name: replace(section, bf16=True)})


def multiplies_bf16() -> bool:
    """Whether this processor has instructions for products in bfloat16; without them they are slower than float32's."""
    import torch

    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def uses_bf16(section: TrainingSection) -> bool:
    """Whether to compute in bfloat16: as set, else where a GPU has it."""
    import torch

    if section.bf16 is not None:
        return section.bf16
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def keep_states_precise(model: Any) -> Any:
    """Keep the states between a bfloat16 model's layers in float32: under autocast, products alone are bfloat16."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.float())
    return model
