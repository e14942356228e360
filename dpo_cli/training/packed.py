"""DPO forwards without double work, behind TRL's own `fused_lm_head=True` call, so that TRL's losses stay as they are.

A batch of pairs becomes one row without padding: `[prompt, chosen, rejected]` of each pair, where the prompt is
whatever chosen and rejected begin with in common (prefix sharing: arXiv:2410.20305). Only completions are scored. The
result is scattered back to the shape that TRL's `_compute_loss` expects of a padded batch; losses, metrics, evaluation
and KL are TRL's and the trainer's own. Where something is computed next is planned in the collator, on the CPU, so
that a step asks the device for nothing.

Reads and writes no files. Not covered, and left to TRL's forward: what `unsupported` names, and whatever else does not
come to the same log-probabilities on the first rows.
"""

import functools
import hashlib
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput

from dpo_cli.errors import UserError
from dpo_cli.training import attention
from dpo_cli.training.head import score

# The mean log-probability of a token may differ by so much from TRL's forward: rounding, but no other attention.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
BATCH_LOSSES = {"aot", "aot_unpaired", "sft"}  # those that are no mean over pairs
TOKEN_MEANS = {  # metrics that TRL averages over the tokens of these rows; all others are means over pairs
    "entropy": "all", "kl": "all", "logits/chosen": "chosen", "mean_token_accuracy": "chosen",
    "logits/rejected": "rejected",
}  # fmt: skip


class Packing(TypedDict, total=False):
    """A padded batch of `2 * pairs` rows and `width` columns, as one row of T tokens of which N are scored.

    tokens: (T,) index of each token in the flattened batch.
    positions: (1, T) position of each token in its own row.
    scored: (N,) index among T of the token that predicts.
    targets: (N,) index of what it predicts, in the flattened (2 * pairs, width - 1).
    segments: how the row divides, for attention.
    reference: (N,) log-probabilities of the reference, where they are known.
    """

    tokens: Tensor
    positions: Tensor
    scored: Tensor
    targets: Tensor
    segments: attention.Segments
    reference: Tensor


def plan(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Packing:
    """Plan the packing of a right-padded batch, chosen rows before rejected rows; each is (2 * pairs, width)."""
    rows, width = input_ids.shape
    at = torch.arange(width)
    lengths = attention_mask.sum(1) - 1  # the last token predicts nothing, so nobody needs it
    chosen, rejected = lengths.chunk(2)
    same = torch.eq(*input_ids.chunk(2)).long().cumprod(1).sum(1)
    shared = torch.minimum(same, torch.minimum(chosen, rejected))
    own = rejected - shared
    starts = ((chosen + own).cumsum(0) - (chosen + own))[:, None]
    kept = torch.stack([at < chosen[:, None], (at >= shared[:, None]) & (at < rejected[:, None])], 1)
    cells = torch.arange(rows * width).view(2, -1, width).transpose(0, 1)
    of_rejected = torch.where(at < shared[:, None], starts + at, starts + at + (chosen - shared)[:, None])
    places = torch.cat([starts + at, of_rejected])
    predicted = completion_mask[:, 1:].bool()
    return {
        "tokens": cells[kept],
        "positions": at.expand_as(kept)[kept][None],
        "scored": places[:, :-1][predicted],
        "targets": predicted.flatten().nonzero()[:, 0],
        "segments": attention.segments(chosen, rejected, shared),
    }


def row_key(ids: Tensor, completion: Tensor) -> str:
    """Content hash of one row: its token ids (n,) and where its completion is (n,)."""
    return hashlib.sha256(ids.int().numpy().tobytes() + completion.bool().numpy().tobytes()).hexdigest()[:32]


def row_keys(batch: Mapping[str, Any]) -> list[str]:
    """Content hashes of the rows of a batch on the CPU."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        row_key(ids[:length], mask[:length])
        for ids, mask, length in zip(batch["input_ids"], batch["completion_mask"], lengths, strict=True)
    ]


@dataclass
class Collator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, which also plans the packing and divides a batch into parts.

    Args:
        tokens_per_batch: most tokens in a forward; a batch with more is divided. None: it never is.
        pack: False where the model is left to TRL's forward; tokens then count with their padding.
        reference: row key -> log-probabilities of the reference at the row's completion tokens.
    """

    tokens_per_batch: int | None = None
    pack: bool = True
    reference: Mapping[str, Tensor] | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs; a batch that is divided holds its parts, whole batches each, under `parts`."""
        batch: dict[str, Any] = super().torch_call(examples)
        if self.tokens_per_batch is None:
            return self._planned(batch)
        lengths = batch["attention_mask"].sum(1)
        order = torch.maximum(*lengths.chunk(2)).argsort(descending=True, stable=True)
        groups = self._groups(batch, order)
        batch["parts"] = [self._planned(_pick(batch, torch.tensor(group))) for group in groups]
        return batch

    def _groups(self, batch: dict[str, Tensor], order: Tensor) -> Iterator[list[int]]:
        """Pairs, longest first, in groups of at most `tokens_per_batch` tokens, a single pair at least."""
        assert self.tokens_per_batch is not None
        lengths = batch["attention_mask"].sum(1)
        chosen, rejected = lengths.chunk(2)
        shared = torch.eq(*batch["input_ids"].chunk(2)).long().cumprod(1).sum(1).minimum(chosen).minimum(rejected)
        packed, longest = (chosen + rejected - shared).tolist(), torch.maximum(chosen, rejected).tolist()
        group: list[int] = []
        for pair in order.tolist():
            grown = [*group, pair]
            cost = sum(packed[i] for i in grown) if self.pack else 2 * len(grown) * longest[grown[0]]
            if group and cost > self.tokens_per_batch:
                yield group
                grown = [pair]
            group = grown
        yield group

    def _planned(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.pack:
            packing = plan(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
            if self.reference is not None:
                known = [self.reference.get(key) for key in row_keys(batch)]
                if None not in known:
                    packing["reference"] = torch.cat(known)  # type: ignore[arg-type]
            batch["packing"] = packing
        return batch


def _pick(batch: dict[str, Tensor], pairs: Tensor) -> dict[str, Tensor]:
    """Some pairs of a padded batch, as narrow as they allow."""
    rows = torch.cat([pairs, pairs + len(batch["input_ids"]) // 2])
    width = int(batch["attention_mask"][rows].sum(1).max())
    return {name: batch[name][rows, :width] for name in ("input_ids", "attention_mask", "completion_mask")}


def parts(batch: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """(share of the batch's pairs, part) of a batch; the shares add up to 1."""
    divided = batch.get("parts")
    if divided is None:
        return [(1.0, batch)]
    return [(len(part["input_ids"]) / len(batch["input_ids"]), part) for part in divided]


@contextmanager
def merged(metrics: dict[str, list[float]], batch: dict[str, Any]) -> Iterator[None]:
    """Make one value of what the parts of a batch append to each metric: the value of the undivided batch."""
    before = {name: len(values) for name, values in metrics.items()}
    yield
    divided = [part for _, part in parts(batch)]
    if len(divided) == 1:
        return
    tokens = torch.stack([part["completion_mask"][:, 1:].sum(1).view(2, -1).sum(1) for part in divided]).tolist()
    weights = {
        "all": [sum(counts) for counts in tokens],
        "chosen": [counts[0] for counts in tokens],
        "rejected": [counts[1] for counts in tokens],
        "pairs": [len(part["input_ids"]) for part in divided],
    }
    for name, values in metrics.items():
        added = values[before.get(name, 0) :]
        if len(added) == len(divided):  # `num_tokens` is a total so far, and replaced each time
            by = weights[TOKEN_MEANS.get(name, "pairs")]
            mean = sum(value * weight for value, weight in zip(added, by, strict=True)) / sum(by)
            values[before.get(name, 0) :] = [mean]


class PackedSteps:
    """Mixed into a DPOTrainer, before it: a batch that is divided takes one forward and backward a part.

    The gradient is that of the undivided batch: a part counts by its share of the pairs.
    """

    _metrics: dict[str, dict[str, list[float]]]
    _share = 1.0

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Loss of the batch; its gradient is added to what is there."""
        losses = []
        with merged(self._metrics["train"], inputs):
            for self._share, part in parts(inputs):
                losses.append(super().training_step(model, part, num_items_in_batch))  # type: ignore[misc]
        return torch.stack(losses).sum()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """Loss of the batch; logits are not kept."""
        losses = []
        with merged(self._metrics["eval"], inputs):
            for self._share, part in parts(inputs):
                losses.append(super().prediction_step(model, part, True, ignore_keys)[0])  # type: ignore[misc]
        return torch.stack(losses).sum(), None, None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss of a part, times its share of the batch."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        return (result[0] * self._share, result[1]) if return_outputs else result * self._share


def enable(trainer: Any, tokens_per_batch: int | None = None) -> str | None:
    """Pack the forwards of a DPOTrainer from now on, where that comes to the same log-probabilities.

    Returns:
        None, or why the trainer goes on with TRL's own forward.

    Raises:
        UserError: `tokens_per_batch` with a loss that dividing a batch would change.
    """
    if tokens_per_batch is not None and BATCH_LOSSES & set(trainer.loss_types):
        raise UserError(
            f"loss {'+'.join(trainer.loss_types)} is no mean over pairs, so a batch of it can't be divided",
            where="train.tokens_per_batch", hint="leave tokens_per_batch unset, or take another loss_type",
        )  # fmt: skip
    former = trainer.data_collator
    trainer.data_collator = Collator(
        former.pad_token_id, former.max_length, former.truncation_mode, former.pad_to_multiple_of,
        tokens_per_batch=tokens_per_batch, pack=False,
    )  # fmt: skip
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    bare = [model.get_base_model() if hasattr(model, "peft_config") else model for model in models]
    lengths = _lengths(trainer)
    longest = max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)
    reason = next(filter(None, (unsupported(model, longest) for model in bare)), None)
    if reason is None and trainer.use_weighting:
        reason = "WPO weights need more than log-probabilities"
    if reason is None:
        reason = _try(trainer, bare)
    if tokens_per_batch is not None:
        largest = max(map(sum, lengths)) if reason is None else 2 * longest
        trainer.token_budget = (tokens_per_batch, largest)
    return reason


def _lengths(trainer: Any) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each pair that there is."""
    lengths: list[tuple[int, int, int]] = []
    for dataset in filter(None, (trainer.train_dataset, trainer.eval_dataset)):
        columns = [map(len, dataset[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
        lengths += zip(*columns, strict=True)
    return lengths


def _try(trainer: Any, models: list[Any]) -> str | None:
    """Pack the forwards of these models, unless that changes the log-probabilities: then it says by how much."""
    forwards = [model.forward for model in models]
    for model in models:
        _patch(model, _reads_reference(model, trainer.ref_model), trainer.accelerator.autocast)
    trainer.data_collator.pack = True
    reason = _difference(trainer)
    if reason is not None:
        trainer.data_collator.pack = False
        for model, forward in zip(models, forwards, strict=True):
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
    if hasattr(config, "output_router_logits"):
        return "a mixture of experts balances its load over the tokens of a padded batch"
    return None


def _difference(trainer: Any) -> str | None:
    """What is wrong with the packed forward on the first rows; None if it comes to TRL's log-probabilities."""
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[-1]]))
    [(_, batch)] = parts(batch)[:1]
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tolerance = TOLERANCE[torch.bfloat16 if trainer.args.bf16 else trainer.model.dtype]
    with torch.no_grad(), trainer.accelerator.autocast():
        theirs = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs
        try:
            ours = trainer.model(**inputs, labels=labels, packing=batch["packing"], fused_lm_head=True).log_probs
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    mean = (ours - theirs).abs().sum().item() / max(1, len(batch["packing"]["targets"]))
    return None if mean <= tolerance else f"log-probabilities would differ by {mean:.2g} nats a token"


def _reads_reference(model: Any, ref_model: Any) -> Callable[[], bool]:
    """Whether a forward of `model` is the reference's: of its own model, of the adapter `ref`, or of no adapter."""
    if model is ref_model:
        return lambda: True
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    if layer is None:
        return lambda: False
    return lambda: layer.disable_adapters or layer.active_adapters == ["ref"]


def _patch(model: Any, is_reference: Callable[[], bool], autocast: Callable[[], Any]) -> None:
    """Let `model(..., labels, packing, fused_lm_head=True)` run packed; every other call is as before.

    `autocast` stands here as well, since a reference of its own is wrapped in it below this patch.
    """
    theirs = model.forward
    softcap = getattr(model.config, "final_logit_softcapping", None)
    model.set_attn_implementation(attention.NAME)

    @functools.wraps(type(model).forward)  # `generate` checks its arguments against this signature
    def forward(
        self: Any, *args: Any, packing: Packing | None = None, fused_lm_head: bool = False,
        labels: Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        ids = kwargs.get("input_ids")
        if packing is None or not fused_lm_head or labels is None or ids is None:
            return theirs(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        mask = labels[:, 1:] != -100

        def spread(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values.new_zeros(mask.numel()).index_put((packing["targets"],), values).view(mask.shape)

        reference = is_reference()
        if reference and "reference" in packing:
            return FusedCausalLMOutput(log_probs=spread(packing["reference"]), label_mask=mask)
        with autocast():
            states = self.base_model(
                input_ids=ids.flatten()[packing["tokens"]][None],
                position_ids=packing["positions"],
                # Four dimensions say that the mask is ready: no other is made. Attention goes by `packing`.
                attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device),
                use_cache=False,
                packing=packing,
            ).last_hidden_state[0]
            scores = score(
                # The prompt's last token predicts twice; index_select adds up its gradient without sorting indices.
                states.index_select(0, packing["scored"]),
                self.get_output_embeddings(),
                labels[:, 1:].flatten()[packing["targets"]],
                softcap,
                metrics=not reference,
            )
        return FusedCausalLMOutput(label_mask=mask, **{name: spread(value) for name, value in scores._asdict().items()})

    model.forward = types.MethodType(forward, model)
