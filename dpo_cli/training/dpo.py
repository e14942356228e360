"""DPO's trainer: TRL's `DPOTrainer._compute_loss` computes the loss itself, this adds step zero's check and KL.

It trains a LoRA adapter against its own frozen copy (arXiv:2305.18290). The log-probabilities that the loss is made of
come from `forward/packed.py`; `reference_check.py` holds the first batch against ln 2. Besides TRL's metrics there are

- `kl` (nats a token): the mean of exp(d) - 1 - d over the completions' tokens, d = log policy - log reference.
  On tokens that the reference itself sampled at temperature 1 this estimates KL(reference || policy) without bias
  (k3 in http://joschu.net/blog/kl-approx.html). On other text, or on the best and worst of several samples, it only
  tells how far the policy has moved there. It costs nothing.
- `eval_kl_nats_per_token` and `eval_kl_nats_per_sequence`: KL(policy || reference), on completions of held-out
  prompts that the policy samples at temperature 1, summed over the whole vocabulary at each position. Exact but for
  the choice of prompts and samples, and for completions being cut at `kl_tokens`.

Besides a LoRA adapter, all weights can be trained, the adapter folded in, against a frozen copy. Reads the SFT
adapter; writes through `loop.py`.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from dpo_cli.adapter import FOLD
from dpo_cli.config.settings import Config, TrainSection
from dpo_cli.data import jsonl
from dpo_cli.errors import UserError
from dpo_cli.interrupts import interruptible
from dpo_cli.model_loading import attach, file_weights, fold, load_network
from dpo_cli.training import distributed, losses
from dpo_cli.training.arguments import arguments, keep_outputs
from dpo_cli.training.encode import EncodedRow
from dpo_cli.training.encoded_rows import columns
from dpo_cli.training.forward import packed
from dpo_cli.training.forward.reference_cache import keep_reference
from dpo_cli.training.guards import KL, MARGIN, GuardState
from dpo_cli.training.kl import SampledKl, mean_length, per_token
from dpo_cli.training.loop import fit
from dpo_cli.training.reference_check import check_reference, check_step_zero, expected_loss, refuse_step_zero
from dpo_cli.training.run_folder import RunContext, event
from dpo_cli.training.trainer import ResumableTrainer, fresh_lora, is_in_4bit, load_base

BEST = (MARGIN, 1)
REFERENCES = ".reference"  # beside the runs, which share it


class CurriculumSampler(Sampler[int]):
    """The first epoch in the order of the rows, later ones shuffled by seed and epoch."""

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        if self.epoch == 0:
            return iter(range(self.rows))
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.rows, generator=order).tolist())


class DpoTrainer(packed.PackedSteps, ResumableTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer, which also measures KL and checks step zero.

    Args:
        events: where the check's result goes.
        kl_prompts: token ids of the held-out prompts on which evaluation measures KL.
        kl_tokens: longest completion sampled for that.
        kl_limit: within which the best checkpoint must lie, in nats a token.
        tolerance: most that the loss and each margin may be off at step zero, in nats.
        easy_first: whether the first epoch keeps the order of the rows.
        pair_loss: the loss of pairs with scores or weights, in place of TRL's.
        **trl: what DPOTrainer takes.
    """

    best = BEST
    _signature_columns: list[str]

    def __init__(
        self,
        *,
        events: jsonl.Journal,
        kl_prompts: list[list[int]],
        kl_tokens: int,
        kl_limit: float = math.inf,
        tolerance: float = 1e-3,
        easy_first: bool = False,
        pair_loss: losses.PairLoss | None = None,
        **trl: Any,
    ) -> None:
        self.easy_first = easy_first
        self.pair_loss = pair_loss
        super().__init__(**trl)
        self.kl_limit = kl_limit
        self.tolerance = tolerance
        self.events = events
        self.kl_prompts = kl_prompts
        self.kl_tokens = kl_tokens
        self.sampled_kl: SampledKl | None = None
        self.step_zero_checked = False
        self._log_probs: list[torch.Tensor] = []
        self._router_loss: torch.Tensor | None = None
        self._rewards: list[torch.Tensor] = []
        self._batch_rewards: list[torch.Tensor] = []
        self._reference_lengths: float | None = None
        for model in (self.model, self.ref_model):
            if model is not None:
                model.register_forward_hook(self._keep_log_probs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        if self.easy_first:
            return CurriculumSampler(len(self.train_dataset), self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _keep_log_probs(self, module: Any, inputs: Any, outputs: Any) -> None:
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is not None:
            self._log_probs.append(log_probs)
            self._router_loss = getattr(outputs, "aux_loss", None) if len(self._log_probs) == 1 else self._router_loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.pair_loss is not None and losses.GAPS not in self._signature_columns:
            self._signature_columns += losses.COLUMNS

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        self._log_probs.clear()
        is_first = self.model.training and self.state.global_step == 0 and not self.step_zero_checked
        if is_first and "packing" in inputs:  # what is kept of the reference proves nothing about the one that is here
            inputs["packing"].pop("reference", None)
        columns = {name: inputs.pop(name) for name in losses.COLUMNS if name in inputs}
        result = super()._compute_loss(model, inputs, return_outputs)
        policy, reference = self._log_probs  # in the order in which TRL runs them
        self._log_probs = []
        router = self._weighted_router_loss()
        if self.pair_loss is not None:
            loss = self.pair_loss(policy, reference, inputs["completion_mask"][:, 1:], self.beta, columns)
            loss = loss if router is None else loss + router
            result = (loss, result[1]) if return_outputs else loss
        policy = policy.detach()
        differences = (policy - reference).float()  # (2 * pairs, tokens - 1); 0 outside the completions
        tokens = inputs["completion_mask"][:, 1:].sum()
        chosen, rejected = (self.beta * differences.sum(dim=1)).chunk(2)  # rewards: Section 4 of the paper
        k3 = (differences.expm1() - differences).sum() / tokens
        rewards = torch.stack((chosen, rejected), dim=1)  # (pairs, 2)
        if distributed.several():
            k3 = self.accelerator.gather(k3).mean()
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["kl"].append(k3)
        if router is not None:
            self._metrics[mode]["router_loss"].append(router.detach())  # type: ignore[arg-type]
        if not self.model.training:
            self._batch_rewards.append(rewards)
        elif is_first:
            self.step_zero_checked = True
            added = None if router is None else router.item()
            loss = (result[0] if return_outputs else result).item() - (added or 0.0)
            self._check_step_zero(loss, chosen - rejected, added, inputs)
        return result

    def _weighted_router_loss(self) -> torch.Tensor | None:
        """What TRL adds to the loss of a mixture of experts to balance their load; None: it adds nothing."""
        if not self.aux_loss_enabled or self._router_loss is None:
            return None
        weighted: torch.Tensor = self._router_loss * self.router_aux_loss_coef
        return weighted

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loss of a batch, whose pairs' rewards are kept in the order of the rows, also over several processes."""
        self._batch_rewards.clear()
        result = super().prediction_step(model, inputs, *args, **kwargs)
        rewards = torch.cat(self._batch_rewards)
        if "order" in inputs:
            rewards = rewards[inputs["order"].to(rewards.device).argsort()]
        self._rewards.append(self.accelerator.gather_for_metrics(rewards))
        return result

    def _check_step_zero(
        self, loss: float, margins: torch.Tensor, router_loss: float | None, inputs: dict[str, Any]
    ) -> None:
        found = check_step_zero(self, loss, margins, self.tolerance, router_loss)
        self.events.append(event("step_zero", 0, **msgspec.to_builtins(found)))
        if not found.ok:
            raise refuse_step_zero(self, inputs, found, self.tolerance)

    def margins_again(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Margins of a batch, (pairs,), as policy and reference compute now; nothing is trained."""
        self._log_probs.clear()
        amp = self.accelerator.native_amp  # else the step's own autocast, which surrounds this, is suspended
        with torch.no_grad(), nullcontext() if amp else torch.autocast(self.args.device.type, enabled=False):
            super()._compute_loss(self.model, dict(inputs), False)
        policy, reference = self._log_probs
        rewards: torch.Tensor = self.beta * (policy - reference).float().sum(dim=1)
        return torch.sub(*rewards.chunk(2))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's evaluation, with the standard error of the margin, KL on held-out prompts, and the beta of it all."""
        self._rewards.clear()
        output = super().evaluation_loop(*args, **kwargs)
        rewards = torch.cat(self._rewards).double().cpu()
        margins = rewards[:, 0] - rewards[:, 1]
        if expected_loss(self) is not None and self.args.ld_alpha is None:
            losses_of_pairs = losses.of_margins(margins, self.args.label_smoothing)
            output.metrics.update(_mean_and_error("eval_loss", losses_of_pairs))
        output.metrics.update(_mean_and_error(MARGIN, margins))
        # TRL's own are means of batches' means, which the last, smaller batch bends.
        exact = {"chosen": rewards[:, 0], "rejected": rewards[:, 1], "margins": margins, "accuracies": margins > 0}
        for name, values in exact.items():
            self._metrics["eval"][f"rewards/{name}"] = [values.double().mean().item()]
        output.metrics["eval_beta"] = self.beta
        output.metrics["eval_pairs"] = len(margins)
        output.metrics["eval_pairs_correct"] = int((margins > 0).sum())
        if self.kl_prompts:
            self.sampled_kl = self.sampled_kl or self._sampled_kl()
            completions, nats = self.sampled_kl.measure()
            kl_per_token, error = per_token(nats, completions)
            output.metrics.update({KL: kl_per_token, "eval_kl_nats_per_sequence": fmean(nats)})
            if error is not None:
                output.metrics[f"{KL}_stderr"] = error
            if self._reference_lengths is None:
                self._reference_lengths = mean_length(self.sampled_kl.of_reference())
            output.metrics["eval_sampled_tokens"] = mean_length(completions)
            output.metrics["eval_reference_sampled_tokens"] = self._reference_lengths
        return output

    def _reference(self) -> AbstractContextManager[Any]:
        """Context whose value is the reference: a model of its own, or the policy's with the adapter `ref` or none."""
        if self.ref_model is not None:
            return nullcontext(self.ref_model)
        return reference_of(self.model)

    def _sampled_kl(self) -> SampledKl:
        stops = self.model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops]) | {self._tokenizer.eos_token_id}
        return SampledKl(
            self.model,
            self._reference,
            self.kl_prompts,
            self.kl_tokens,
            stops - {None},
            self.args.seed,
            self.accelerator.autocast,
            self._may_stop,
        )

    def _may_stop(self) -> None:
        """Let a signal end the measurement of KL, which can take longer than a job has left."""
        self.callback_handler.on_prediction_step(self.args, self.state, self.control)


def train(
    config: Config,
    base: Path,
    adapter: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    held_out: Sequence[EncodedRow],
    run: RunContext,
    checkpointing: bool | None = None,
) -> None:
    """Train `adapter` against its own frozen copy, a fresh LoRA against the base, or all weights against theirs.

    Args:
        config: settings.
        base: folder of the base model.
        adapter: folder of the SFT adapter; None: a fresh LoRA.
        tokenizer: the base's.
        rows: encoded pairs, chosen before rejected.
        held_out: the same for evaluation; may be empty.
        run: where everything goes.
        checkpointing: whether the plan needs gradient checkpointing on a GPU; None: there is no plan.

    Raises:
        UserError: step zero is not ln 2, the reference is not the SFT adapter, or a setting is one that TRL refuses.
    """
    section = config.train
    if section.full and section.load_in_4bit:
        raise UserError("weights in 4 bits can't be trained", hint="set train.full or train.load_in_4bit to false")
    pair_loss = losses.make(section, rows)

    def make(state: GuardState) -> DpoTrainer:
        with interruptible():
            policy, reference = _models(section, base, adapter, run)
        asked = arguments(section, run.folder, bool(held_out), *BEST, len(rows), state, checkpointing)
        lora = None if adapter is not None or section.full else fresh_lora(section, policy, run.progress)
        try:
            trainer = DpoTrainer(
                events=run.events,
                kl_prompts=_distinct(held_out, section.kl_prompts),
                kl_tokens=section.kl_tokens,
                kl_limit=config.gate.kl_limit,
                tolerance=config.gate.step_zero_tolerance,
                easy_first=section.curriculum,
                model=policy,
                ref_model=reference,
                pair_loss=pair_loss,
                args=keep_outputs(DPOConfig(**asked, **losses.trl_settings(section))),
                train_dataset=_dataset(rows, pair_loss),
                eval_dataset=_dataset(held_out, pair_loss) if held_out else None,
                processing_class=tokenizer,
                peft_config=lora,
            )
        except ValueError as error:
            raise UserError(f"TRL refuses this setting: {error}") from None
        if is_in_4bit(policy):
            restore_precision(trainer.model)
        if adapter is not None and trainer.ref_model is None:
            copy_to_reference(trainer.model, adapter)
            check_reference(trainer.model, adapter)
        unset = section.gradient_checkpointing is None and torch.cuda.is_available()
        trainer.may_checkpoint = unset and not trainer.args.gradient_checkpointing
        reason = packed.enable(trainer, state.tokens_per_batch or section.tokens_per_batch)
        if reason is not None:
            run.progress.log(f"forward: TRL's own, padded, since {reason}")
        keep_reference(trainer, run.folder.path.parent / REFERENCES, run.progress, section.keep_reference)
        return trainer

    fit(make, run, config.gate)


def _models(section: TrainSection, base: Path, adapter: Path | None, run: RunContext) -> tuple[Any, Any]:
    """The policy, and the reference where it is a model of its own."""
    if section.full:
        return _folded(base, adapter).requires_grad_(True), _folded(base, adapter).requires_grad_(False)
    model = load_base(base, section)
    if adapter is None:
        return model, None
    policy = attach(model, adapter, trainable=True, progress=run.progress)
    if not hasattr(policy.get_output_embeddings(), "bias"):
        raise UserError("trained tokens of an embedding that is the head as well", where=str(adapter), hint=FOLD)
    if policy.peft_config["default"].bias == "none":
        return policy, None
    # Trained biases stand in the base itself, where a second adapter has none of its own.
    return policy, fold(base, adapter, model.dtype).requires_grad_(False).eval()


def _folded(base: Path, adapter: Path | None) -> Any:
    """The base with the adapter folded in, in float32: in bfloat16 small updates of all weights would be lost."""
    return fold(base, adapter, torch.float32) if adapter else load_network(base, torch.float32)


def restore_precision(model: Any) -> None:
    """Undo TRL's cast of the adapter over 4-bit weights to bfloat16, which loses small updates and the reference."""
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.float()


def copy_to_reference(model: Any, adapter: Path) -> None:
    """Put the adapter's own weights into both its copies, all of them.

    TRL copies what has the adapter's name in the middle of its own, and so neither the LoRA of an embedding nor
    trained tokens, whose names end with it; and over 4-bit weights it has rounded them to bfloat16 before.
    """
    weights = file_weights(adapter, model)
    for name in ("default", "ref"):
        set_peft_model_state_dict(model, weights, adapter_name=name)
    for name, value in model.named_parameters():
        if ".ref." in name or name.endswith(".ref"):
            value.requires_grad_(False)


@contextmanager
def reference_of(model: Any) -> Iterator[Any]:
    """Context in which the model, its value, is the reference: the adapter `ref`, or no adapter at all."""
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        yield model


def _mean_and_error(name: str, values: torch.Tensor) -> dict[str, float]:
    """A metric of the held-out pairs, (pairs,), and its standard error, where there are two of them."""
    found = {name: values.mean().item()}
    if len(values) > 1:
        found[f"{name}_stderr"] = values.std().item() / math.sqrt(len(values))
    return found


def _dataset(rows: Sequence[EncodedRow], pair_loss: losses.PairLoss | None = None) -> Dataset:
    table = columns(rows, pair_loss.columns(rows) if pair_loss else None)
    return Dataset(table, fingerprint=os.urandom(8).hex())  # else it would hash all of it


def _distinct(rows: Sequence[EncodedRow], most: int) -> list[list[int]]:
    """The prompts of rows, each once, `most` of them."""
    prompts: dict[tuple[int, ...], None] = {}
    for row in rows:
        if len(prompts) == most:
            break
        prompts[tuple(row.prompt)] = None
    return list(map(list, prompts))
