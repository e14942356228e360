"""A checkpoint that went too far, scaled back along the line to the SFT adapter until its KL is the limit.

An earlier checkpoint within the limit may be far below it, or there may be none; the line has a point at every KL
between 0 and the checkpoint's (`scale_adapter.py`). KL is measured as in training, on the policy's own samples of the
same held-out prompts, and so are loss and margins. Reads base, adapter and checkpoint; writes an adapter. Not covered:
whole models, bases in 4 bits.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional

from dpo_cli.config.settings import Config
from dpo_cli.progress import Progress
from dpo_cli.training.encode import Encoder, Sequences
from dpo_cli.training.forward import fused_lora
from dpo_cli.training.kl import SampledKl, per_token
from dpo_cli.training.run_history import Retreat
from dpo_cli.training.scale_adapter import Scaled, scale_adapter
from dpo_cli.training.trainer import load_base

NEAR = 0.95  # of the limit: near enough
TRIES = 10


def retreat(
    config: Config,
    base: Path,
    reference: Path | None,
    checkpoint: Path,
    kl_before: float,
    output: Path,
    encoder: Encoder,
    held_out: list[Sequences],
    progress: Progress,
) -> tuple[Retreat, dict[str, float]]:
    """Write the point of the line whose KL is the limit.

    Args:
        config: every setting; `gate.kl_limit` is where it ends.
        base: folder of the base model.
        reference: folder of the SFT adapter; None: the base alone.
        checkpoint: folder of the checkpoint's adapter.
        kl_before: the checkpoint's KL, in nats a token.
        output: folder of the scaled adapter.
        encoder: of the base.
        held_out: encoded pairs.
        progress: hears of each try.

    Returns:
        What was done, and what evaluation in training would say of it, by its names.
    """
    limit = config.gate.kl_limit
    network = PeftModel.from_pretrained(load_base(base, config.train), checkpoint, adapter_name="checkpoint")
    if reference is not None:
        network.load_adapter(reference, adapter_name="reference")
    network.requires_grad_(False).eval()
    fused_lora.fuse(network)  # as in training
    prompts = [list(ids) for ids in dict.fromkeys(tuple(row.prompt) for row in held_out)][: config.train.kl_prompts]
    # As an evaluation in training measures it, with the same draws.
    sampled_kl = SampledKl(
        network,
        lambda: _reference(network),
        prompts,
        config.train.kl_tokens,
        encoder.stop_ids,
        config.train.seed,
        partial(_autocast, network),
    )
    low, high = (0.0, 0.0), (1.0, kl_before)  # (scale, its KL)
    made: Scaled | None = None
    for number in range(TRIES):
        scale = _guess(low, high, limit) if number % 2 == 0 else (low[0] + high[0]) / 2
        made = scale_adapter(reference, checkpoint, output, scale, config.model.base)
        network.load_adapter(output, adapter_name=f"try-{number}")
        network.requires_grad_(False)
        network.set_adapter(f"try-{number}", inference_mode=True)
        completions, nats = sampled_kl.measure()
        measured, _ = per_token(nats, completions)
        progress.log(f"retreat: scale {scale:.3f} has a KL of {measured:.4f}, the limit is {limit:g}")
        if NEAR * limit <= measured <= limit:
            break
        low, high = ((scale, measured), high) if measured < limit else (low, (scale, measured))
        network.delete_adapter(f"try-{number}")
    else:
        scale, measured = low
        made = scale_adapter(reference, checkpoint, output, scale, config.model.base)
        network.load_adapter(output, adapter_name="last")
        network.set_adapter("last", inference_mode=True)
    assert made is not None
    metrics = _evaluate(network, held_out, config.train.beta) | {"eval_kl_nats_per_token": measured}
    found = Retreat(
        checkpoint=checkpoint.name, scale=scale, kl_before=kl_before, kl=measured, rank=made.rank, error=made.error
    )
    return found, metrics


def _guess(low: tuple[float, float], high: tuple[float, float], limit: float) -> float:
    """Where the limit lies, if KL rises with the square of the scale; halfway if that is outside."""
    aim = limit * (1 + NEAR) / 2
    (start, before), (end, after) = low, high
    if after > before:
        share = (math.sqrt(aim) - math.sqrt(before)) / (math.sqrt(after) - math.sqrt(before))
        if 0.02 < share < 0.98:
            return start + share * (end - start)
    return (start + end) / 2


def _autocast(network: Any) -> AbstractContextManager[Any]:
    """The precision of training."""
    return torch.autocast(network.device.type, torch.bfloat16, enabled=network.dtype == torch.bfloat16)


@contextmanager
def _reference(network: Any) -> Iterator[Any]:
    if "reference" not in network.peft_config:
        with network.disable_adapter():
            yield network
        return
    active = network.active_adapter
    network.set_adapter("reference", inference_mode=True)
    try:
        yield network
    finally:
        network.set_adapter(active, inference_mode=True)


def _evaluate(network: Any, rows: list[Sequences], beta: float) -> dict[str, float]:
    """Loss, rewards and margins of pairs, under the names of an evaluation in training."""
    sides: list[tuple[float, float]] = []
    for row in rows:
        moved = []
        for completion in row.completions:
            policy = _log_prob(network, row.prompt, completion)
            with _reference(network) as reference:
                moved.append(beta * (policy - _log_prob(reference, row.prompt, completion)))
        sides.append((moved[0], moved[1]))
    margins = [chosen - rejected for chosen, rejected in sides]
    found = {
        "eval_loss": fmean(-functional.logsigmoid(torch.tensor(margin)).item() for margin in margins),
        "eval_rewards/chosen": fmean(chosen for chosen, _ in sides),
        "eval_rewards/rejected": fmean(rejected for _, rejected in sides),
        "eval_rewards/margins": fmean(margins),
        "eval_rewards/accuracies": fmean(margin > 0 for margin in margins),
        "eval_pairs_correct": sum(margin > 0 for margin in margins),
        "eval_beta": beta,
    }
    if len(margins) > 1:
        found["eval_rewards/margins_stderr"] = stdev(margins) / math.sqrt(len(margins))
    return found


@torch.no_grad()
def _log_prob(network: Any, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion], device=network.device)
    with _autocast(network):
        logits = network(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return float(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).sum())
