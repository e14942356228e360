"""Whether the reference is what it must be: its weights against the SFT adapter's, and step zero's loss against ln 2.

Before the first update policy and reference are the same model, so that the loss is ln 2 and every margin 0. Anything
else means that they are not, and training would go against another reference than the one that is named.
"""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpo_cli.errors import Exit, UserError
from dpo_cli.model_loading import adapter_weights, file_weights
from dpo_cli.training.guards import LN2
from dpo_cli.training.run_history import StepZero


def check_reference(model: Any, adapter: Path) -> None:
    """See that the reference holds exactly the SFT adapter's weights, and that they are frozen.

    Args:
        model: the policy, which holds the reference as its adapter `ref`.
        adapter: folder of the SFT adapter.

    Raises:
        UserError: it does not. Resuming could otherwise go on against another reference, at a loss that looks right.
    """
    ours = [value for key, value in model.named_parameters() if ".ref." in key or key.endswith(".ref")]
    if "ref" not in model.peft_config or any(value.requires_grad for value in ours):
        raise UserError("the reference is not a frozen copy of the SFT adapter", where=str(adapter), code=Exit.FAILED)
    if not same_weights(file_weights(adapter, model), adapter_weights(model, "ref")):
        raise UserError("the reference does not hold the SFT adapter's weights", where=str(adapter), code=Exit.FAILED)


def check_step_zero(
    trainer: Any, loss: float, margins: torch.Tensor, tolerance: float, router_loss: float | None = None
) -> StepZero:
    """Compare the first batch's loss with ln 2 and its margins with 0.

    Args:
        trainer: a DPOTrainer, for the cause.
        loss: of the batch, by its preferences alone.
        margins: (pairs,), chosen minus rejected rewards.
        tolerance: most that either may be off, in nats.
        router_loss: what a mixture of experts adds to the loss; it is no matter of preferences.

    Returns:
        What was found; `ok` is false for NaN as well.
    """
    margin = margins.abs().max().item()
    expected = expected_loss(trainer)
    off = margin if expected is None else max(margin, abs(loss - expected))
    return StepZero(loss, margin, off <= tolerance, router_loss)


def expected_loss(trainer: Any) -> float | None:
    """The loss where policy and reference agree; None where it depends on the batch."""
    plain = trainer.loss_types == ["sigmoid"] and trainer.loss_weights == [1.0] and not trainer.use_weighting
    return LN2 if plain and trainer.pair_loss is None else None  # also with label smoothing


def refuse_step_zero(trainer: Any, inputs: dict[str, Any], found: StepZero, tolerance: float) -> UserError:
    """The error of a step zero that is not right, with its cause as far as that could be checked.

    Args:
        trainer: a DPOTrainer, which is of no use afterwards: its weights may be float32, and it may be in evaluation.
        inputs: the batch, as the loss took it.
        found: what it gave.
        tolerance: most that a margin may be off, in nats.
    """
    expected = expected_loss(trainer)
    said = f"loss {found.loss:.4f}" + (f" instead of {expected:.4f}" if expected else "")
    cause = other_weights(trainer) or cause_of_margins(trainer, inputs, tolerance)
    return UserError(
        f"step zero: {said}, margins up to {found.margin:.4f} instead of 0; {cause}; nothing was trained",
        hint="the reference must be a frozen copy of the adapter that is trained",
        code=Exit.FAILED,
    )


def other_weights(trainer: Any) -> str | None:
    """How the weights of policy and reference differ; None: they are equal, or lie in different places."""
    adapters = getattr(trainer.model, "peft_config", None)
    if trainer.ref_model is not None:
        if adapters is not None:  # a copy with the adapter folded in has other tensors
            return None
        return _unlike("model", trainer.model.state_dict(), trainer.ref_model.state_dict())
    if adapters is None or "ref" in adapters:
        return _unlike("adapter", adapter_weights(trainer.model, "default"), adapter_weights(trainer.model, "ref"))
    changes = [value for name, value in adapter_weights(trainer.model, "default").items() if "lora_B" in name]
    if any(value.any() for value in changes):
        init = adapters["default"].init_lora_weights
        begins = "" if init is True else f" (train.init_lora_weights = {init})"
        return f"the reference is the base model, and the adapter that is trained changes it already{begins}"
    return None


def _unlike(what: str, policy: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> str | None:
    if same_weights(policy, reference):
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if same_weights({name: value.to(dtype) for name, value in policy.items()}, reference):
            return f"the reference's weights are those of the {what} that is trained, rounded to {dtype}"
    return f"the reference is another {what} than the one that is trained"


def cause_of_margins(trainer: Any, inputs: dict[str, Any], tolerance: float) -> str:
    """Why equal weights give other log-probabilities: the first change after which the batch's margins are 0.

    The batch is computed again without dropout, then in float32 as well, then by the model's own forward as well.
    """
    dtype = "bfloat16" if trainer.args.bf16 else str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    precision = f"it is precision ({dtype}): set train.bf16 = false, or gate.step_zero_tolerance above {tolerance:g}"
    random = "dropout is on" if _drops_out(trainer.model) else "the model computes otherwise while it trains"
    forward = "the packed forward is wrong for this model, which is a bug in nothing-dpo"
    changes: list[tuple[str, Callable[[], None]]] = [(random, lambda: _evaluate(trainer))]
    if dtype != "float32":
        changes.append((precision, lambda: _to_float32(trainer)))
    if "packing" in inputs:
        changes.append((forward, lambda: inputs.pop("packing")))
    margin, tried = math.nan, []
    for cause, change in changes:
        change()
        try:
            margin = trainer.margins_again(inputs).abs().max().item()
        except (RuntimeError, TypeError, ValueError) as error:  # lack of memory is a RuntimeError
            said = " ".join(str(error).split())[:200]
            return (
                f"policy and reference agree in their weights; whether {cause.partition(':')[0]} can't be told: {said}"
            )
        if margin <= tolerance:
            others = "" if cause == random or not _drops_out(trainer.model) else "dropout is on, and "
            return f"policy and reference agree in their weights, and without that margins are 0: {others}{cause}"
        tried.append({random: "without dropout", precision: "in float32"}.get(cause, "by the model's own forward"))
    return (
        f"policy and reference agree in their weights, and margins are up to {margin:.4f} also {', '.join(tried)}: the "
        "cause is not known"
    )


def _drops_out(model: Any) -> bool:
    layers = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or bool(getattr(model.config, "attention_dropout", 0))


def _evaluate(trainer: Any) -> None:
    for model in filter(None, (trainer.model, trainer.ref_model)):
        model.eval()


def _to_float32(trainer: Any) -> None:
    """Have all forwards compute in float32; weights that are kept in 4 bits are unpacked to it."""
    accelerator = trainer.accelerator
    accelerator.native_amp = False
    torch.set_float32_matmul_precision("highest")
    for model in filter(None, (trainer.model, trainer.ref_model)):
        bare = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        for value in itertools.chain(bare.parameters(), bare.buffers()):
            if value.dtype in (torch.bfloat16, torch.float16):
                value.data = value.data.float()
        for module in bare.modules():
            if hasattr(module, "compute_dtype"):  # bitsandbytes' layers
                module.compute_dtype = torch.float32


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal bit for bit, once both are float32."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].float().cpu(), other[name].float().cpu()) for name in one
    )
