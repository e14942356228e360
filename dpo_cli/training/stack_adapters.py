"""Several adapters of one base as one, whose change of each weight is the sum of theirs.

Rows of A and columns of B are put side by side, B times its adapter's scale: the sum of s B A is then one product, of
the sum of the ranks and with a scale of 1. Reads PEFT's files and writes them. Not covered: adapters with patterns of
ranks or scales, rsLoRA and DoRA.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dpo_cli.data import files
from dpo_cli.data.files import read_json
from dpo_cli.errors import UserError
from dpo_cli.training.run_folder import ADAPTER_FILES, check_replaceable

PLAIN = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora")


def stack(adapters: Sequence[Path], output: Path, base: str) -> None:
    """Write one adapter that does what all of them do.

    Args:
        adapters: their folders.
        output: new folder, or one that holds an adapter.
        base: the name of the base that it is for.

    Raises:
        UserError: one of them is no plain LoRA adapter, or `output` holds something else.
    """
    check_replaceable(output)
    settings = [read_json(adapter / ADAPTER_FILES[0]) for adapter in adapters]
    for adapter, own in zip(adapters, settings, strict=True):
        if odd := next((key for key in PLAIN if own.get(key)), None):
            raise UserError(f"adapters with {odd} can't be stacked", where=str(adapter))
    weights = [load_file(adapter / ADAPTER_FILES[1]) for adapter in adapters]
    rank = sum(own["r"] for own in settings)
    names = sorted({name for own in weights for name in own})
    made = {}
    for name in names:
        is_a = ".lora_A." in name
        like = next(own[name] for own in weights if name in own)
        parts = []
        for own, setting in zip(weights, settings, strict=True):
            scale = 1.0 if is_a else setting["lora_alpha"] / setting["r"]
            shape = (setting["r"], like.shape[1]) if is_a else (like.shape[0], setting["r"])
            parts.append(own[name].float() * scale if name in own else torch.zeros(shape))  # it leaves the layer alone
        made[name] = torch.cat(parts, dim=0 if is_a else 1).to(like.dtype).contiguous()
    targets = sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in names})
    combined = settings[0] | {"r": rank, "lora_alpha": rank, "target_modules": targets, "base_model_name_or_path": base}
    with files.replacing_folder(output) as staged:
        save_file(made, staged / ADAPTER_FILES[1], metadata={"format": "pt"})
        files.write_json(staged / ADAPTER_FILES[0], combined)
