"""How many weights a run trains: counted in the adapter's file, or by the base's own layers for a fresh adapter.

Reads headers of weights; writes nothing and needs no torch. Which layers a fresh adapter goes to is by PEFT's rules
for `target_modules`. Not covered: the experts of a mixture, and bases whose weights are quantised or no safetensors,
for which the sizes of a Llama-like model are taken.
"""

import math

from dpo_cli.adapter import EMBEDDINGS, Adapter, adapter_tensors, is_target, lost_targets
from dpo_cli.config.settings import TrainingSection
from dpo_cli.models.base_model import CONV1D, Base
from dpo_cli.models.weights import FLOATS
from dpo_cli.training.plan import Shape

ROUTERS = ("router", "mlp.gate", "block_sparse_moe.gate")  # of experts: LoRA can't be added to them


def of_adapter(adapter: Adapter) -> int:
    """Weights of an adapter on disk."""
    return sum(math.prod(tensor.shape) for tensor in adapter_tensors(adapter.path).values())


def of_fresh_adapter(section: TrainingSection, shape: Shape, base: Base | None) -> tuple[int, list[str]]:
    """Weights of a fresh adapter, and names of target modules that match no layer of the base.

    Args:
        section: rank and targets.
        shape: sizes of the base, for where its layers are not known.
        base: the base's files, if they are here.

    Raises:
        UserError: no layer has the name of any target module.
    """
    targets = split_targets(section.target_modules)
    layers = _linear_layers(base) if base is not None else {}
    if not layers:
        layers = {
            f"layers.{n}.{name}": size for n in range(shape.num_hidden_layers) for name, size in shape.linears().items()
        }
    taken = {name: size for name, size in layers.items() if is_target(name, targets)}
    lost = lost_targets(targets, list(layers), list(layers))
    trained = sum(section.r * (ins + outs) + (outs if section.use_dora else 0) for ins, outs in taken.values())
    return trained, lost


def split_targets(targets: str | list[str]) -> str | list[str]:
    """`train.target_modules` as PEFT takes it: `a,b` is a list of names, any other text one pattern."""
    if isinstance(targets, str) and "," in targets:
        return sorted(name.strip() for name in targets.split(","))
    return sorted(targets) if isinstance(targets, list) else targets


def _linear_layers(base: Base) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the base's linear layers, the head aside; empty where they are not known."""
    if base.quantised:
        return {}
    found = {}
    for key, tensor in base.shapes.items():
        name = key.removesuffix(".weight")
        if name == key or len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            continue
        if name.endswith((*EMBEDDINGS, *ROUTERS, "wpe")) or ".experts." in name:
            continue
        outs, ins = tensor.shape
        found[name] = (outs, ins) if base.model_type in CONV1D else (ins, outs)
    return found
