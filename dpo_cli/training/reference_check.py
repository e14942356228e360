"""Whether the reference is what it must be: its weights against the SFT adapter's, and step zero's loss against ln 2.

Before the first update policy and reference are the same model, so that the loss is ln 2 and every margin 0. Anything
else means that they are not, and training would go against another reference than the one that is named.
"""

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


def refuse_step_zero(trainer: Any, found: StepZero, tolerance: float) -> UserError:
    """The error of a step zero that is not right, with the likely cause."""
    expected = expected_loss(trainer)
    said = f"loss {found.loss:.4f}" + (f" instead of {expected:.4f}" if expected else "")
    cause = likely_cause(trainer, tolerance)
    return UserError(
        f"step zero: {said}, margins up to {found.margin:.4f} instead of 0; {cause}; nothing was trained",
        hint="the reference must be a frozen copy of the adapter that is trained",
        code=Exit.FAILED,
    )


def likely_cause(trainer: Any, tolerance: float) -> str:
    """Why policy and reference differ at step zero."""
    if trainer.ref_model is not None:
        if not same_weights(trainer.model.state_dict(), trainer.ref_model.state_dict()):
            return "the reference is another model than the one that is trained"
    elif "ref" not in trainer.model.peft_config:
        return "the reference is the base model, and the adapter that is trained is not new"
    elif not same_weights(adapter_weights(trainer.model, "default"), adapter_weights(trainer.model, "ref")):
        return "the reference is another adapter than the one that is trained"
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in trainer.model.modules()):
        return "dropout is on"
    dtype = "bfloat16" if trainer.args.bf16 else str(next(trainer.model.parameters()).dtype).removeprefix("torch.")
    return (
        f"policy and reference agree in their weights, so it is precision ({dtype}): set train.bf16 = false, or "
        f"gate.step_zero_tolerance above {tolerance:g}"
    )


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two adapters are equal bit for bit, once both are float32."""
    return one.keys() == other.keys() and all(
        torch.equal(one[name].float().cpu(), other[name].float().cpu()) for name in one
    )
