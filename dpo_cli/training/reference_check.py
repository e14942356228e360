"""Whether the frozen reference holds the SFT adapter's weights, tensor by tensor."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

from dpo_cli.errors import Exit, UserError
from dpo_cli.training.run_folder import ADAPTER_FILES


def check_reference(model: Any, adapter: Path) -> None:
    """See that the reference holds exactly the SFT adapter's weights, and that they are frozen.

    Raises:
        UserError: it does not. Resuming could otherwise go on against another reference, at a loss that looks right.
    """
    frozen = not any(value.requires_grad for name, value in model.named_parameters() if ".ref." in name)
    if "ref" not in model.peft_config or not frozen:
        raise UserError("the reference is not a frozen copy of the SFT adapter", where=str(adapter), code=Exit.FAILED)
    if not same_weights(load_file(adapter / ADAPTER_FILES[1]), adapter_weights(model, "ref")):
        raise UserError("the reference does not hold the SFT adapter's weights", where=str(adapter), code=Exit.FAILED)


def adapter_weights(model: Any, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors in memory, under the names that they have in its file."""
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return weights


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal bit for bit, once both are float32."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].float().cpu(), other[name].float().cpu()) for name in one
    )
