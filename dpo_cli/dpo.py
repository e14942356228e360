"""DPO (arXiv:2305.18290) of a LoRA adapter against its own frozen copy: TRL's trainer with guards.

Before the first update the loss must be ln 2 and every margin 0: policy and reference are the same model then, so
anything else means that they are not. Besides TRL's metrics there are

- `kl` (nats a token): the mean of exp(d) - 1 - d over the completions' tokens, d = log policy - log reference.
  On tokens that the reference itself sampled at temperature 1 this estimates KL(reference || policy) without bias
  (k3 in http://joschu.net/blog/kl-approx.html). On other text, or on the best and worst of several samples, it only
  tells how far the policy has moved there. It costs nothing.
- `eval_kl_nats_per_token` and `eval_kl_nats_per_sequence`: KL(policy || reference), on completions of held-out
  prompts that the policy samples at temperature 1, summed over the whole vocabulary at each position. Exact but for
  the choice of prompts and samples, and for completions being cut at `kl_tokens`.

Reads the SFT adapter; writes through `trainer.py`. Not covered: several GPUs, full fine-tuning.
"""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import use_adapter

from dpo_cli import store
from dpo_cli.config import TrainSection
from dpo_cli.encode import Sequences
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.run_folder import ADAPTER_FILES, LN2, RunFolder, event
from dpo_cli.trainer import ResumableTrainer, arguments, fit, fresh_lora, load_base

STEP_ZERO_TOLERANCE = 1e-3  # for the loss and for the margin of every pair, in nats
BEST_METRIC = "eval_rewards/margins"


class Trainer(ResumableTrainer, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer, which also measures KL and checks step zero.

    Args:
        events: where the check's result goes.
        kl_prompts: token ids of the held-out prompts on which evaluation measures KL.
        kl_tokens: longest completion sampled for that.
        **trl: what DPOTrainer takes.
    """

    def __init__(self, *, events: store.Journal, kl_prompts: list[list[int]], kl_tokens: int, **trl: Any) -> None:
        super().__init__(**trl)
        self.events = events
        self.kl_prompts = kl_prompts
        self.kl_tokens = kl_tokens
        self.step_zero_checked = False
        self._log_probs: list[torch.Tensor] = []
        self._margins: list[torch.Tensor] = []
        self.model.register_forward_hook(self._keep_log_probs)

    def _keep_log_probs(self, module: Any, inputs: Any, outputs: Any) -> None:
        log_probs = getattr(outputs, "log_probs", None)
        if log_probs is not None:
            self._log_probs.append(log_probs.detach())

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> Any:
        self._log_probs.clear()
        result = super()._compute_loss(model, inputs, return_outputs)
        policy, reference = self._log_probs  # in the order in which TRL runs them
        differences = (policy - reference).float()  # (2 * pairs, tokens - 1); 0 outside the completions
        tokens = inputs["completion_mask"][:, 1:].sum()
        chosen, rejected = (self.beta * differences.sum(dim=1)).chunk(2)  # rewards: Section 4 of the paper
        training = self.model.training
        self._metrics["train" if training else "eval"]["kl"].append(
            ((differences.expm1() - differences).sum() / tokens).item()
        )
        if not training:
            self._margins.append(chosen - rejected)
        elif self.state.global_step == 0 and not self.step_zero_checked:
            self.step_zero_checked = True
            self._check_step_zero(result[0] if return_outputs else result, chosen - rejected)
        return result

    def _check_step_zero(self, loss: torch.Tensor, margins: torch.Tensor) -> None:
        """Raise UserError with the likely cause unless policy and reference agree on the first batch."""
        margin = margins.abs().max().item()
        expected = LN2 if self.loss_types == ["sigmoid"] else None  # also with label smoothing
        off = margin if expected is None else max(margin, abs(loss.item() - expected))
        ok = off <= STEP_ZERO_TOLERANCE  # false for NaN
        self.events.append(event("step_zero", 0, loss=loss.item(), margin=margin, ok=ok))
        if ok:
            return
        said = f"loss {loss.item():.4f}" + (f" instead of {expected:.4f}" if expected else "")
        raise UserError(
            f"step zero: {said}, margins up to {margin:.4f} instead of 0; {self._likely_cause()}; nothing was trained",
            hint="the reference must be a frozen copy of the adapter that is trained", code=Exit.FAILED,
        )  # fmt: skip

    def _likely_cause(self) -> str:
        if "ref" not in self.model.peft_config:
            return "the reference is the base model, and the adapter that is trained is not new"
        if not same_weights(adapter_weights(self.model, "default"), adapter_weights(self.model, "ref")):
            return "the reference is another adapter than the one that is trained"
        if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.model.modules()):
            return "dropout is on"
        return "the two agree in their weights, so the cause is numerical: try bf16 = false"

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's evaluation, with the standard error of the margin and KL on held-out prompts."""
        self._margins.clear()
        output = super().evaluation_loop(*args, **kwargs)
        margins = torch.cat(self._margins)
        if len(margins) > 1:
            output.metrics["eval_rewards/margins_stderr"] = margins.std().item() / math.sqrt(len(margins))
        if self.kl_prompts:
            per_token, per_sequence = self._kl()
            output.metrics.update(eval_kl_nats_per_token=per_token, eval_kl_nats_per_sequence=per_sequence)
        return output

    @torch.no_grad()
    def _kl(self) -> tuple[float, float]:
        """KL(policy || reference) on the policy's own completions: nats a token, nats a sequence."""
        completions = self._sample()
        total = torch.zeros((), dtype=torch.float64)
        for prompt, completion in zip(self.kl_prompts, completions, strict=True):
            ids = torch.tensor([prompt + completion], device=self.model.device)
            policy = self._next_token_log_probs(ids, len(completion))
            with reference_of(self.model):
                reference = self._next_token_log_probs(ids, len(completion))
            total += (policy.exp() * (policy - reference)).sum().double().cpu()
        return total.item() / sum(map(len, completions)), total.item() / len(completions)

    def _sample(self) -> list[list[int]]:
        """One completion a held-out prompt, at temperature 1, to the stop token or `kl_tokens`."""
        pad, stops = self._tokenizer.pad_token_id, self.model.generation_config.eos_token_id
        stops = set(stops if isinstance(stops, list) else [stops]) | {self._tokenizer.eos_token_id}
        width = max(map(len, self.kl_prompts))
        padding = [width - len(prompt) for prompt in self.kl_prompts]
        ids = [[pad] * left + prompt for left, prompt in zip(padding, self.kl_prompts, strict=True)]
        mask = [[0] * left + [1] * (width - left) for left in padding]
        device = self.model.device
        # The same draws at every evaluation, and none from the generator that training uses.
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.accelerator.autocast():
            torch.manual_seed(self.args.seed)
            output = self.model.generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device),
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                max_new_tokens=self.kl_tokens,
                eos_token_id=sorted(stop for stop in stops if stop is not None), pad_token_id=pad,
            )  # fmt: skip
        return [_until(row, stops) for row in output[:, width:].tolist()]

    def _next_token_log_probs(self, ids: torch.Tensor, count: int) -> torch.Tensor:
        """Log-probabilities of what followed: (count, vocabulary), float32, for the last `count` positions."""
        with self.accelerator.autocast():
            logits = self.model(input_ids=ids, logits_to_keep=count + 1, use_cache=False).logits
        log_probs: torch.Tensor = logits[0, :-1].float().log_softmax(-1)
        return log_probs


def train(
    section: TrainSection, base: Path, adapter: Path | None, tokenizer: PreTrainedTokenizerBase,
    rows: list[Sequences], held_out: list[Sequences], run: RunFolder, events: store.Journal, progress: Progress,
) -> None:  # fmt: skip
    """Train `adapter` against its own frozen copy, or a fresh LoRA against the base.

    Args:
        section: settings.
        base: folder of the base model.
        adapter: folder of the SFT adapter; None: a fresh LoRA.
        tokenizer: the base's.
        rows: encoded pairs, chosen before rejected.
        held_out: the same for evaluation; may be empty.
        run: where everything goes.
        events: events.jsonl of the run.
        progress: where it stands.

    Raises:
        UserError: step zero is not ln 2, the reference is not the SFT adapter, or a setting is one that TRL refuses.
    """
    model = load_base(base, section)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    try:
        trainer = Trainer(
            events=events,
            kl_prompts=_distinct([row.prompt for row in held_out])[: section.kl_prompts],
            kl_tokens=section.kl_tokens,
            model=model,
            args=DPOConfig(
                **arguments(section, run, bool(held_out), BEST_METRIC, 1),
                beta=section.beta, loss_type=section.loss_type, label_smoothing=section.label_smoothing,
            ),
            train_dataset=_dataset(rows),
            eval_dataset=_dataset(held_out) if held_out else None,
            processing_class=tokenizer,
            peft_config=None if adapter is not None else fresh_lora(section),
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"TRL refuses this setting: {error}") from None
    if adapter is not None:
        check_reference(trainer.model, adapter)
    fit(trainer, run, events, progress)


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


def reference_of(model: Any) -> Any:
    """Context in which the model is the reference: the adapter `ref`, or no adapter at all."""
    return use_adapter(model, "ref" if "ref" in model.peft_config else None)


def _dataset(rows: list[Sequences]) -> Dataset:
    return Dataset.from_dict(
        {
            "prompt_ids": [row.prompt for row in rows],
            "chosen_ids": [row.completions[0] for row in rows],
            "rejected_ids": [row.completions[1] for row in rows],
        }
    )


def _distinct(prompts: list[list[int]]) -> list[list[int]]:
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]


def _until(ids: list[int], stops: set[int]) -> list[int]:
    """Up to and with the first stop token."""
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
