"""Plain LoRA layers without their passes over whole activations, at PEFT's own weights.

PEFT computes `x W + scaling * ((x A) B)` as two products, then multiplies and adds up everything that the layer puts
out, and multiplies again on the way back. A product can add itself to what is there (`addmm`), so that the same sum
takes no pass of its own.

LoRA's product comes first and the base's is added to it. In bfloat16 that is more than speed: a product is summed up in
float32 and rounded once, at the end. Where the base's is rounded first, as in PEFT, what LoRA adds is lost wherever it
is less than half of a step between two numbers of that height, and early in DPO it is nearly everywhere.

Reads and writes no files. Not covered, and left to PEFT: dropout, DoRA and other variants, several active adapters,
merged ones, products in mixed precision without autocast. A base in 4 bits on a GPU rounds first, as in PEFT.
"""

import types
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor

try:
    from peft.tuners.lora.bnb import Linear4bit
except ImportError:  # no bitsandbytes here
    Linear4bit = Linear


def fuse(model: Any) -> None:
    """Let the LoRA layers of a model add up within their second product."""
    for layer in model.modules():
        if type(layer) in (Linear, Linear4bit):
            layer.forward = types.MethodType(_forward, layer)


def restore(model: Any) -> None:
    """Give the LoRA layers back to PEFT."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.__dict__.pop("forward", None)


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else ""
    if name not in layer.lora_A or layer.disable_adapters or layer.merged or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    autocast = torch.is_autocast_enabled(x.device.type)
    one_precision = autocast or x.dtype == a.dtype == layer.base_layer.weight.dtype
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) > 0
    if name in layer.lora_variant or dropout or not one_precision:
        return type(layer).forward(layer, x)
    rows = x.flatten(0, -2)  # no views: autograd would copy what is changed in place through one
    if autocast:  # once, not for each product
        rows = rows.to(torch.get_autocast_dtype(x.device.type))
    inner = torch.nn.functional.linear(rows, a) * layer.scaling[name]
    change = torch.nn.functional.linear(inner, b)
    base = layer.base_layer
    if type(base) is not torch.nn.Linear:  # bitsandbytes' makes a product of its own, rounded on a GPU
        made = base(rows)
        made = (made.float() if made.device.type == "cpu" else made) + change
    else:
        # In place: what made `change` does not need it for its gradient. Autocast leaves such calls alone.
        made = change.addmm_(rows, base.weight.t().to(change.dtype))
        made = made if base.bias is None else made + base.bias.to(made.dtype)
    return made.view(*x.shape[:-1], -1)
