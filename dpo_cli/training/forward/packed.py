"""Training forwards without double work, behind TRL's own `fused_lm_head=True` call, so that TRL's losses stay.

A batch of pairs becomes one row without padding: `[prompt, chosen, rejected]` of each pair, where the prompt is
whatever chosen and rejected begin with in common (prefix sharing: arXiv:2410.20305); a batch of demonstrations one
row of them all. Only completions are scored. The result is scattered back to the shape that TRL's loss expects of a
padded batch; losses, metrics, evaluation and KL are TRL's and the trainer's own. Where something is computed next is
planned in the collator, on the CPU, so that a step asks the device for nothing.

Reads and writes no files. Not covered, and left to TRL's forward: what `unsupported` names, and whatever else does not
come to the same log-probabilities on a slice of the first rows.
"""

import functools
import itertools
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyarrow.compute
import torch
from accelerate.utils import send_to_device
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.errors import UserError
from dpo_cli.training import distributed
from dpo_cli.training.encode import IGNORED
from dpo_cli.training.forward import attention, deferred_metrics, fused_lora
from dpo_cli.training.forward.collator import (
    DemonstrationCollator,
    Packing,
    PairCollator,
    merged_metrics,
    micro_batches,
)
from dpo_cli.training.forward.log_probs import score

# The mean log-probability of a token may differ by so much from TRL's forward: rounding, but no other attention.
LOG_PROB_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
BATCH_LOSSES = {"aot", "aot_unpaired", "sft"}  # those that are no mean over pairs
PROMPT_SLICE, COMPLETION_SLICE = 48, 24  # tokens of the rows on which the packed forward is checked
PAIR_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")


class PackedSteps:
    """Mixed into a DPOTrainer or SFTTrainer, before it: a divided batch takes a forward and backward a micro-batch.

    The gradient is that of the undivided batch: a micro-batch counts by its share of it. In several processes
    gradients are exchanged with the last one. Metrics stay on the device until an optimizer step ends (`finish_step`)
    or they are logged.
    """

    args: Any
    state: Any
    control: Any
    callback_handler: Any
    accelerator: Any
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    _share = 1.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Loss of the batch; its gradient is added to what is there."""
        losses = []
        divided = micro_batches(inputs)
        with merged_metrics(self._metrics["train"], inputs):
            for number, (self._share, part) in enumerate(divided, 1):
                if number > 1:  # a signal can end the step here
                    self.control = self.callback_handler.on_substep_end(self.args, self.state, self.control)
                with nullcontext() if number == len(divided) else self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, part, num_items_in_batch))  # type: ignore[misc]
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Loss of the batch; logits are not kept."""
        losses = []
        with merged_metrics(self._metrics["eval"], inputs):
            for self._share, part in micro_batches(inputs):
                losses.append(super().prediction_step(model, part, True, ignore_keys)[0])  # type: ignore[misc]
        return torch.stack(losses).sum(), None, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a micro-batch, times its share of the batch unless it is a sum over the batch's tokens."""
        with deferred_metrics.metrics(self.accelerator):
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        share = self._share if num_items_in_batch is None else 1.0
        return (result[0] * share, result[1]) if return_outputs else result * share

    def finish_step(self) -> None:
        """Read the step's metrics and check its loss: the one time in a step that the host waits for the device."""
        self._read_metrics()
        super().finish_step()  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, whose metrics are numbers by then."""
        self._read_metrics()
        super().log(logs, start_time)  # type: ignore[misc]

    def _read_metrics(self) -> None:
        lists = [values for metrics in self._metrics.values() for values in metrics.values()]
        tokens, *numbers = deferred_metrics.read([self._total_train_tokens, *itertools.chain(*lists)])
        self._total_train_tokens = int(tokens)
        left = iter(numbers)
        for values in lists:
            values[:] = itertools.islice(left, len(values))


def enable(trainer: Any, tokens_per_batch: int | None = None) -> str | None:
    """Pack the forwards of a DPOTrainer or SFTTrainer from now on, where that comes to the same log-probabilities.

    Returns:
        None, or why the trainer goes on with TRL's own forward.

    Raises:
        UserError: `tokens_per_batch` with a loss that dividing a batch would change.
    """
    losses = set(getattr(trainer, "loss_types", ()))
    if tokens_per_batch is not None and BATCH_LOSSES & losses:
        raise UserError(
            f"loss {'+'.join(trainer.loss_types)} is no mean over pairs, so a batch of it can't be divided",
            where="train.tokens_per_batch",
            hint="leave tokens_per_batch unset, or take another loss_type",
        )
    trainer.data_collator = _collator(trainer, tokens_per_batch)
    models = [model for model in (trainer.model, getattr(trainer, "ref_model", None)) if model is not None]
    bare = [model.get_base_model() if hasattr(model, "peft_config") else model for model in models]
    longest, packed, padded = _longest(trainer)
    reason = next(filter(None, (unsupported(model, longest) for model in bare)), None)
    trainer.data_collator.whole = trainer.aux_loss_enabled
    if reason is None:
        reason = _try(trainer, bare)
    if reason is not None and trainer.args.bf16:  # PEFT's own would round away what an adapter adds
        for model in bare:
            fused_lora.fuse(model)
    if tokens_per_batch is not None:
        trainer.token_budget = (tokens_per_batch, packed if reason is None else padded)
    return reason


def _is_paired(trainer: Any) -> bool:
    return PAIR_COLUMNS[0] in trainer.train_dataset.column_names


def _collator(trainer: Any, tokens_per_batch: int | None) -> PairCollator | DemonstrationCollator:
    """A collator that does as the trainer's own, and divides by tokens; packing is off."""
    former = trainer.data_collator
    token, multiple = former.pad_token_id, former.pad_to_multiple_of
    if not _is_paired(trainer):
        return DemonstrationCollator(token, pad_to_multiple_of=multiple, tokens_per_batch=tokens_per_batch, pack=False)
    return PairCollator(
        token, former.max_length, former.truncation_mode, multiple, tokens_per_batch=tokens_per_batch, pack=False
    )


def _longest(trainer: Any) -> tuple[int, int, int]:
    """Most tokens of a row, of a packed example and of a padded one, over all that there are."""
    most = (0, 0, 0)
    for dataset in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
        names = PAIR_COLUMNS if _is_paired(trainer) else ("input_ids",)
        lengths = [
            torch.tensor(pyarrow.compute.list_value_length(dataset.with_format("arrow")[:][name]).to_pylist())
            for name in names
        ]
        rows = [lengths[0] + side for side in lengths[1:]] or lengths
        longest = functools.reduce(torch.maximum, rows)
        own = int(longest.max()), int(sum(lengths).max()), int(len(rows) * longest.max())  # type: ignore[union-attr]
        most = max(most[0], own[0]), max(most[1], own[1]), max(most[2], own[2])
    return most


def _try(trainer: Any, models: list[Any]) -> str | None:
    """Pack the forwards of these models, unless that changes the log-probabilities: then it says by how much."""
    forwards = [model.forward for model in models]
    for model in models:
        fused_lora.fuse(model)
        is_reference = _reads_reference(model, getattr(trainer, "ref_model", None))
        _patch(model, is_reference, trainer.accelerator.autocast, getattr(trainer, "use_weighting", False))
    trainer.data_collator.pack = True
    reason = distributed.broadcast(_difference(trainer))  # one decision for all processes
    if reason is not None:
        trainer.data_collator.pack = False
        for model, forward in zip(models, forwards, strict=True):
            fused_lora.restore(model)
            model.forward = forward
            model.set_attn_implementation("sdpa")
    return reason


def unsupported(model: Any, longest: int) -> str | None:
    """Why a causal language model can't be packed, as far as its configuration tells; None if nothing speaks against.

    What short rows would not show is asked here; the rest shows in the log-probabilities of the first rows.

    Args:
        model: without PEFT's wrapper.
        longest: tokens of the longest row.
    """
    config = model.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    window = getattr(config, "sliding_window", None)
    slides = {"sliding_attention"} if window and window >= longest else set()  # the window never closes
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"} - slides
    if config.get_text_config() is not config:
        return "the model is multimodal"
    if not model._supports_attention_backend:
        return f"{type(model).__name__} has an attention of its own"
    if config._attn_implementation != "sdpa":
        return f"attention is {config._attn_implementation}, not sdpa"
    if others:
        return f"the model has layers of {', '.join(sorted(others))}"
    if window and window < longest and not hasattr(config, "layer_types"):
        return f"attention slides over {window} tokens, and rows have up to {longest}"
    if rope in ("dynamic", "longrope"):
        return f"its {rope} position embedding depends on the longest row of a batch"
    if getattr(config, "attention_dropout", 0):
        return "attention dropout is on"
    return None


def _difference(trainer: Any) -> str | None:
    """What is wrong with the packed forward on slices of two rows; None if it comes to TRL's log-probabilities."""
    collator = trainer.data_collator
    rows = [_slice(trainer.train_dataset[number]) for number in (0, -1)]
    batch = collator.planned(collator.padded(rows))
    model = trainer.model
    batch = send_to_device(batch, next(model.parameters()).device)
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tolerance = LOG_PROB_TOLERANCE[torch.bfloat16 if trainer.args.bf16 else model.dtype]
    with torch.no_grad(), trainer.accelerator.autocast():
        theirs = model(**inputs, labels=labels, fused_lm_head=True).log_probs
        try:
            ours = model(**inputs, labels=labels, packing=batch["packing"], fused_lm_head=True).log_probs
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    mean = (ours - theirs).abs().sum().item() / max(1, len(batch["packing"]["targets"]))
    return None if mean <= tolerance else f"log-probabilities would differ by {mean:.2g} nats a token"


def _slice(row: dict[str, list[int]]) -> dict[str, list[int]]:
    """The end of a row's prompt and the beginning of its completions: enough to see whether two forwards agree."""
    if "prompt_ids" in row:
        sides = {name: row[name][:COMPLETION_SLICE] for name in PAIR_COLUMNS[1:]}
        return {"prompt_ids": row["prompt_ids"][-PROMPT_SLICE:], **sides}
    start = next((at for at, label in enumerate(row["labels"]) if label != IGNORED), 0)
    part = slice(max(0, start - PROMPT_SLICE), start + COMPLETION_SLICE)
    return {"input_ids": row["input_ids"][part], "labels": row["labels"][part]}


def _load_balance(config: Any, logits: tuple[Tensor, ...], routed: Tensor) -> Tensor:
    """What a mixture of experts adds to the loss, over the tokens of the padded batch, in which a prompt counts twice.

    Args:
        config: the model's.
        logits: (T, experts) of each layer's router.
        routed: index among T of each token of the padded batch.
    """
    every = tuple(layer.index_select(0, routed) for layer in logits)
    balance: Tensor = load_balancing_loss_func(every, config.num_experts, config.num_experts_per_tok)
    return balance


def _reads_reference(model: Any, ref_model: Any) -> Callable[[], bool]:
    """Whether a forward of `model` is the reference's: of its own model, of the adapter `ref`, or of no adapter."""
    if model is ref_model:
        return lambda: True
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None:
        return lambda: False
    return lambda: layer.disable_adapters or layer.active_adapters == ["ref"]


def _patch(model: Any, is_reference: Callable[[], bool], autocast: Callable[[], Any], squares: bool) -> None:
    """Let `model(..., labels, packing, fused_lm_head=True)` run packed; every other call is as before.

    `autocast` stands here as well, since a reference of its own is wrapped in it below this patch.
    """
    theirs = model.forward
    softcap = getattr(model.config, "final_logit_softcapping", None)
    model.set_attn_implementation(attention.NAME)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        packing: Packing | None = None,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        ids = kwargs.get("input_ids")
        if packing is None or not fused_lm_head or labels is None or ids is None:
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        mask = labels[:, 1:] != IGNORED

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(mask.numel()).index_put((packing["targets"],), values).view(mask.shape)

        router = {"output_router_logits": True} if kwargs.get("output_router_logits") else {}
        reference = is_reference()
        if reference and "reference" in packing:
            return FusedCausalLMOutput(log_probs=spread(packing["reference"]), label_mask=mask)
        with autocast():
            outputs = self.base_model(
                input_ids=ids.flatten()[packing["tokens"]][None],
                position_ids=packing["positions"],
                # Four dimensions say that the mask is ready: no other is made. Attention goes by `packing`.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
                use_cache=False,
                packing=packing,
                **router,
            )
            states = outputs.last_hidden_state[0]
            scores = score(
                # The prompt's last token predicts twice; index_select adds up its gradient without sorting indices.
                states.index_select(0, packing["scored"]),
                self.get_output_embeddings(),
                labels[:, 1:].flatten()[packing["targets"]],
                softcap,
                metrics=not reference,
                squares=squares and not reference,
            )
        spreads = {name: spread(value) for name, value in scores._asdict().items()}
        if spreads["mean_logits"] is not None:
            spreads["mean_logits"] = deferred_metrics.defer(spreads["mean_logits"])
        balance = _load_balance(self.config, outputs.router_logits, packing["routed"]) if router else None
        return FusedCausalLMOutput(label_mask=mask, aux_loss=balance, **spreads)

    model.forward = types.MethodType(forward, model)
