"""A point on the line through the SFT adapter and the DPO adapter, as one LoRA adapter.

At scale s the change of each weight is `(1 - s) SFT + s DPO`: 0 is the SFT adapter, 1 the DPO adapter, more goes on in
the same direction (ExPO, arXiv:2404.16792) and less goes back. Side by side the two have the sum of their ranks; the
sum is then reduced by SVD to the smallest rank that vLLM has and that keeps it within `REDUCTION_TOLERANCE`, else it
stays whole. Without an SFT adapter the line begins at the base.

Reads PEFT's files and writes them. Not covered: adapters with patterns of ranks or scales, rsLoRA and DoRA.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo_cli.data import files
from dpo_cli.errors import UserError
from dpo_cli.models.adapter_settings import RANKS
from dpo_cli.training.run_folder import ADAPTER_FILES, check_replaceable
from dpo_cli.training.stack_adapters import PLAIN

REDUCTION_TOLERANCE = 1e-3  # most that a reduction may change, as a share of what DPO changed
MADE = "scaled.json"  # beside the weights: what they were made of


class Scaled(Struct, kw_only=True):
    """What was written: its rank, and what reducing it to that left out, as a share of DPO's change (Frobenius)."""

    path: str
    scale: float
    rank: int
    error: float


class LowRank(Struct):
    """A change of one weight as a product: `b` (out, rank) times `a` (rank, in), float64."""

    b: Tensor
    a: Tensor


def scale_adapter(
    reference: Path | None, policy: Path, output: Path, scale: float, base: str, rank: int | None = None
) -> Scaled:
    """Write the adapter at `scale` on the line from `reference` to `policy`.

    Args:
        reference: folder of the SFT adapter; None: the base alone.
        policy: folder of the DPO adapter.
        output: new folder, or one that holds an adapter.
        scale: 0 is the reference, 1 the policy.
        base: the name of the base that they are for.
        rank: reduce to this rank, whatever it leaves out; None: as far as `REDUCTION_TOLERANCE` allows.

    Raises:
        UserError: one of the two is no plain LoRA adapter, or `output` holds something else.
    """
    check_replaceable(output)
    ends = AdapterLine(reference, policy)
    made = dict(ends.at(scale))
    most = max(low.a.shape[0] for low in made.values())
    change = ends.change()
    candidates = [rank] if rank is not None else [size for size in RANKS if ends.rank <= size < most]
    reduced, error = made, 0.0
    for size in candidates:
        smaller = {name: reduce_rank(low, size) for name, low in made.items()}
        error = _norm(lost for _, lost in smaller.values()) / change if change else 0.0
        if rank is not None or error <= REDUCTION_TOLERANCE:
            reduced = {name: low for name, (low, _) in smaller.items()}
            break
    else:
        error = 0.0
    size = max(low.a.shape[0] for low in reduced.values())
    _write(output, ends.settings, reduced, size, base, ends.dtype)
    result = Scaled(path=str(output), scale=scale, rank=size, error=error)
    files.write_json(output / MADE, result)
    return result


def rank_of(adapter: Path) -> int:
    """The rank of a plain LoRA adapter."""
    rank: int = files.read_json(adapter / ADAPTER_FILES[0])["r"]
    return rank


class AdapterLine:
    """All points between two adapters, and beyond.

    Args:
        reference: folder of the SFT adapter; None: the base alone.
        policy: folder of the DPO adapter.

    Raises:
        UserError: one of them is no plain LoRA adapter.
    """

    def __init__(self, reference: Path | None, policy: Path) -> None:
        self.settings, self._policy, self.dtype = _read(policy)
        self._reference = _read(reference)[1] if reference is not None else {}
        self.rank: int = self.settings["r"]

    def at(self, scale: float) -> Iterator[tuple[str, LowRank]]:
        """(layer, change of its weight) at a scale, the two adapters side by side."""
        for name in sorted(self._policy.keys() | self._reference.keys()):
            ends = ((self._reference.get(name), 1 - scale), (self._policy.get(name), scale))
            parts = [(low, factor) for low, factor in ends if low is not None]
            yield (
                name,
                LowRank(
                    torch.cat([factor * low.b for low, factor in parts], 1), torch.cat([low.a for low, _ in parts])
                ),
            )

    def change(self) -> float:
        """How much DPO has changed, over all weights (Frobenius norm)."""
        ends = ((self._reference, -1.0), (self._policy, 1.0))
        norms = []
        for name in sorted(self._policy.keys() | self._reference.keys()):
            parts = [(own[name], sign) for own, sign in ends if name in own]
            b = torch.cat([sign * low.b for low, sign in parts], 1)
            a = torch.cat([low.a for low, _ in parts])
            norms.append(_singular(LowRank(b, a))[1].norm().item())
        return _norm(norms)


def reduce_rank(low: LowRank, rank: int) -> tuple[LowRank, float]:
    """The nearest product of a rank (Eckart and Young), and how far it is off (Frobenius norm).

    A smaller product is filled up with zeros, since an adapter has one rank.
    """
    u, values, v = _singular(low)
    kept = min(rank, len(values))
    root = values[:kept].sqrt()
    b = torch.zeros(u.shape[0], rank, dtype=u.dtype)
    a = torch.zeros(rank, v.shape[1], dtype=v.dtype)
    b[:, :kept], a[:kept] = u[:, :kept] * root, v[:kept] * root[:, None]
    return LowRank(b, a), values[kept:].norm().item()


def _singular(low: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of the product, from QR of its factors: what is decomposed has the size of the rank."""
    q_b, r_b = torch.linalg.qr(low.b)
    q_a, r_a = torch.linalg.qr(low.a.T)
    u, values, v = torch.linalg.svd(r_b @ r_a.T)
    return q_b @ u[:, : len(values)], values, v[: len(values)] @ q_a.T


def _norm(parts: Any) -> float:
    return float(sum(part**2 for part in parts) ** 0.5)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, LowRank], torch.dtype]:
    """Settings of an adapter, its changes by layer, its scale in them, and the type of its weights."""
    settings = files.read_json(folder / ADAPTER_FILES[0])
    if odd := next((key for key in PLAIN if settings.get(key)), None):
        raise UserError(f"an adapter with {odd} can't be scaled", where=str(folder))
    weights: Mapping[str, Tensor] = load_file(folder / ADAPTER_FILES[1])
    factor = settings["lora_alpha"] / settings["r"]
    lows = {}
    for name, a in weights.items():
        if ".lora_A." in name:
            b = weights[name.replace(".lora_A.", ".lora_B.")]
            lows[name.partition(".lora_A.")[0]] = LowRank(b.double() * factor, a.double())
    if 2 * len(lows) != len(weights):
        raise UserError("an adapter with more than LoRA weights can't be scaled", where=str(folder))
    return settings, lows, next(iter(weights.values())).dtype


def _write(
    output: Path, settings: dict[str, Any], lows: Mapping[str, LowRank], rank: int, base: str, dtype: torch.dtype
) -> None:
    tensors = {}
    for name, low in lows.items():
        missing = rank - low.a.shape[0]  # a layer that one of the two adapters leaves alone
        tensors[f"{name}.lora_A.weight"] = torch.nn.functional.pad(low.a, (0, 0, 0, missing)).to(dtype).contiguous()
        tensors[f"{name}.lora_B.weight"] = torch.nn.functional.pad(low.b, (0, missing)).to(dtype).contiguous()
    targets = sorted({name.rpartition(".")[2] for name in lows})
    combined = settings | {
        "r": rank, "lora_alpha": rank, "target_modules": targets, "base_model_name_or_path": base,
        "init_lora_weights": True, "inference_mode": True,
    }  # fmt: skip
    with files.replacing_folder(output) as staged:
        save_file(tensors, staged / ADAPTER_FILES[1], metadata={"format": "pt"})
        files.write_json(staged / ADAPTER_FILES[0], combined)
