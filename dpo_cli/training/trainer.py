"""What both training stages ask of TRL's trainers: exact resume, checkpoints that are whole, quiet.

Writes checkpoints of the run folder; `loop.py` drives. On a CPU a resumed run equals an uninterrupted one bit for bit.
FSDP, which several processes use for all weights, has not been tried: accelerate has it on GPUs alone.
"""

import json
import logging
import math
import resource
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from dpo_cli import errors
from dpo_cli.base_model import check_base
from dpo_cli.config.settings import WARMUP, ModelSection, TrainingSection
from dpo_cli.data.files import write_json
from dpo_cli.errors import UserError
from dpo_cli.model_loading import check_targets, explained, load_network, load_tokenizer, routers
from dpo_cli.progress import Progress
from dpo_cli.training import distributed, guards
from dpo_cli.training.encode import Encoder
from dpo_cli.training.guards import GuardState
from dpo_cli.training.plan import capped_steps
from dpo_cli.training.run_folder import GUARDS, RunFolder, mark_complete, metric_rows
from dpo_cli.training.trackers import PROJECT, tracker

METERS = "meters.json"
WHOLE = 1 - 1e-9  # transformers takes 1 as one step
LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "torch")


class Diverged(Exception):
    """The loss is not a number."""


class ResumableTrainer:
    """Mixed into a TRL trainer, before it: rows come encoded, checkpoints are small, whole and exact.

    `best` is the metric of the best checkpoint and its sign, `kl_limit` the bound within which it must lie;
    `guard_state` is saved with each checkpoint; `token_budget` is (most tokens a forward, tokens of the largest pair)
    where tokens divide a step into forwards; `may_checkpoint` says that gradient checkpointing is off and may be
    turned on.
    """

    best: tuple[str, int]
    kl_limit: float = float("inf")
    guard_state: GuardState = GuardState()
    token_budget: tuple[int, int] | None = None
    may_checkpoint: bool = False
    owes_evaluation: bool = False
    _remembered_meters: dict[str, Any] | None = None

    args: TrainingArguments
    state: TrainerState
    model: Any
    accelerator: Any
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    _tr_loss: torch.Tensor
    _globalstep_last_logged: int

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # encoded already

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL writes one with every checkpoint; nobody reads it."""

    def _send_telemetry(self) -> None:
        """Send no telemetry: HF_HUB_DISABLE_TELEMETRY has been read long before this runs."""

    def _save(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        # `ref` is the SFT adapter: it is loaded from there again, never from a checkpoint. Asking whether the
        # vocabulary has grown ("auto") would ask the Hub.
        if hasattr(self.model, "peft_config"):
            self.model.save_pretrained(output_dir, selected_adapters=["default"], save_embedding_layers=False)
        else:
            self.model.save_pretrained(output_dir, state_dict=state_dict, max_shard_size="1TB")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        meters = self._remembered_meters or self.meters()
        self.accelerator.wait_for_everyone()  # each process adds its random state
        if not self.args.should_save:
            return
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / METERS).write_text(json.dumps(meters))
        write_json(checkpoint / GUARDS, self.guard_state)
        mark_complete(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # Which checkpoint rotation keeps: transformers would look at the metric alone, not at KL.
        rows = metric_rows(self.state.log_history)
        evaluated = [row["step"] for row in rows if "eval_loss" in row]
        is_best: bool = guards.best_step(evaluated, rows, *self.best, self.kl_limit) == self.state.global_step
        if is_best:
            self.state.best_metric, self.state.best_global_step = metrics[self.best[0]], self.state.global_step
        return is_best

    def finish_step(self) -> None:
        """Check the loss of the optimizer step that has just ended.

        Raises:
            Diverged: the loss is not a number.
        """
        if not math.isfinite(self._summed_loss()):
            raise Diverged

    def remember_step(self, owes_evaluation: bool) -> None:
        """Remember what a checkpoint of the step that has just ended would hold besides weights."""
        self.owes_evaluation = owes_evaluation
        self._remembered = self.meters(), torch.random.get_rng_state()

    def save_remembered_step(self) -> None:
        """Save the step that ended last from within the next step: the weights have not changed since."""
        self._remembered_meters, random_state = self._remembered
        torch.random.set_rng_state(random_state)
        self._save_checkpoint(self.model, None)

    def meters(self) -> dict[str, Any]:
        """What has been summed up since the last log: the trainer itself forgets it when it resumes."""
        return {
            "loss": self._summed_loss(),
            "logged": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "owes_evaluation": self.owes_evaluation,
        }

    def _summed_loss(self) -> float:
        """The loss since the last log, summed up over the steps; its mean over all processes."""
        return float(self.accelerator.gather(self._tr_loss).mean().item())

    def counters(self) -> dict[str, float]:
        """What the next log would say, by the names that progress has for it."""
        names = {"margin": "rewards/margins", "accuracy": "rewards/accuracies", "kl": "kl"}
        values = {name: self._metrics["train"].get(key) for name, key in names.items()}
        return {
            "tokens": self._total_train_tokens,
            "loss": self._tr_loss.item() / (self.state.global_step - self._globalstep_last_logged),
            **{name: sum(value) / len(value) for name, value in values.items() if value},
        }

    def restore_meters(self, checkpoint: Path) -> None:
        """Go on summing up from where a checkpoint was saved."""
        meters = json.loads((checkpoint / METERS).read_text())
        self._tr_loss += meters["loss"]
        self._globalstep_last_logged = meters["logged"]
        self._total_train_tokens = meters["tokens"]
        self._metrics["train"].update(meters["metrics"])
        self.owes_evaluation = meters["owes_evaluation"]


def arguments(
    section: TrainingSection,
    run: RunFolder,
    evaluates: bool,
    metric: str,
    sign: int,
    rows: int = 0,
    state: GuardState | None = None,
    planned: bool | None = None,
) -> dict[str, Any]:
    """Keyword arguments of TRL's configuration classes.

    Args:
        section: settings of the stage.
        run: where checkpoints go.
        evaluates: whether there are held-out rows.
        metric: evaluation metric of the best checkpoint, which rotation keeps.
        sign: 1 where larger is better, -1 where smaller is.
        rows: how many there are to train on.
        state: what the guards have changed.
        planned: whether the plan needs gradient checkpointing; None: there is no plan.
    """
    gpu = torch.cuda.is_available()
    state = state or GuardState()
    batch, accumulation, eval_batch = _batches(section, state)
    return {
        "learning_rate": section.learning_rate,
        "num_train_epochs": section.num_train_epochs,
        "max_steps": capped_steps(section, rows),
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": eval_batch,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": section.lr_scheduler_type,
        **_warmup(section),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "logging_steps": section.logging_steps,
        "eval_steps": section.eval_steps,
        "save_steps": section.save_steps,
        "save_total_limit": section.save_total_limit,
        "seed": section.seed,
        "output_dir": str(run.checkpoints),
        "run_name": run.path.name,
        "max_length": None,  # rows come shortened; TRL would cut the completion's end
        "bf16": uses_bf16(section),
        # Else transformers refuses bf16 where there is no GPU, and several processes do not find each other.
        "use_cpu": not gpu and (uses_bf16(section) or distributed.several()),
        "ddp_find_unused_parameters": False,
        **fully_sharded(section),
        "gradient_checkpointing": _checkpoints(section, state, planned),
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN is logged as such, not as the mean of what came before
        "eval_strategy": "steps" if evaluates else "no",
        "save_strategy": "steps",
        "metric_for_best_model": metric if evaluates else None,
        "greater_is_better": sign > 0,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "report_to": tracker(section),
        "project": PROJECT,  # trackio's; wandb's is given where its run begins
    }


def _checkpoints(section: TrainingSection, state: GuardState, planned: bool | None) -> bool:
    """Whether to trade time for memory: as set, else on a GPU where the plan needs it or memory has lacked."""
    if section.gradient_checkpointing is not None:
        return section.gradient_checkpointing
    return torch.cuda.is_available() and (state.checkpointing or planned is not False)


def _warmup(section: TrainingSection) -> dict[str, float]:
    """Transformers' `warmup_steps`: steps, or below 1 a share of them."""
    if section.warmup_ratio is None and section.warmup_steps is not None:
        return {"warmup_steps": section.warmup_steps}
    share = WARMUP if section.warmup_ratio is None else section.warmup_ratio
    return {"warmup_steps": min(share, WHOLE)}


def _batches(section: TrainingSection, state: GuardState) -> tuple[int, int, int]:
    """Rows a forward, forwards a step and rows a forward of evaluation, of each process.

    Raises:
        UserError: the rows of a step can't be divided equally among the processes.
    """
    processes = distributed.count()
    of_all = (section.per_device_train_batch_size, section.gradient_accumulation_steps)
    if section.batch_per_gpu:
        of_all = (of_all[0], of_all[1] * processes)
    batch, accumulation = state.batch or of_all
    rows, left = divmod(batch * accumulation, processes)
    if left:
        raise UserError(
            f"{batch} x {accumulation} rows a step can't be divided equally among {processes} processes",
            where="train.gradient_accumulation_steps",
            hint=f"set it to a multiple of {processes}, or train.batch_per_gpu = true for so many rows a GPU",
        )
    eval_batch = state.eval_batch or section.per_device_eval_batch_size
    if state.tokens_per_batch or section.tokens_per_batch:  # then tokens divide the rows of a step into forwards
        return rows, 1, rows
    batch = next(size for size in range(min(batch, rows), 0, -1) if rows % size == 0)
    return batch, rows // batch, eval_batch


def fully_sharded(section: TrainingSection) -> dict[str, Any]:
    """FSDP for all weights in several processes; an adapter is small, and its base is copied to each card."""
    if not (distributed.several() and getattr(section, "full", False)):
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {"state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    }


def uses_bf16(section: TrainingSection) -> bool:
    """Whether to compute in bfloat16: as set, else where a GPU has it; never on a CPU without being asked."""
    if section.bf16 is not None:
        return section.bf16
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def load_base(folder: Path, section: TrainingSection) -> Any:
    """The base model: in 4 bits if asked for or stored so, else in bfloat16 if that is what it computes in on this GPU.

    Raises:
        UserError: it can't be loaded, or its weights are quantised in a way that can't be trained on.
    """
    base = check_base(str(folder), tokenizer=False)
    stored = None if base is None else base.quantised
    if stored is not None and stored != "bitsandbytes":
        raise UserError(
            f"the base's weights are quantised ({stored}), and LoRA is not trained on those here",
            where=str(folder),
            hint="use the model as it was before it was quantised; --set train.load_in_4bit=true saves as much memory",
        )
    if not (section.load_in_4bit or stored):
        dtype = torch.bfloat16 if uses_bf16(section) and torch.cuda.is_available() else torch.float32
        return load_network(folder, dtype)
    errors.require("qlora", "a base in 4 bits")
    if stored:
        model = load_network(folder, torch.bfloat16)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = load_network(folder, torch.bfloat16, quantization_config=quantization)
    keep_differentiable(model)
    return model


def is_in_4bit(model: Any) -> bool:
    """Whether a base's weights are in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in an evaluation on a CPU with AVX512-BF16.

    The product with repacked weights has no backward (seen in 0.50.2), and training would go on without the gradient
    that flows through the base.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def load_encoder(folder: Path, model: ModelSection, max_length: int) -> Encoder:
    """The encoder of the base's tokenizer, chat template and stop tokens.

    Raises:
        UserError: the tokenizer can't be read, or has no chat template.
    """
    tokenizer = load_tokenizer(folder, model)
    stops = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").exists():
        with explained(folder):
            configured = GenerationConfig.from_pretrained(folder).eos_token_id
        stops += configured if isinstance(configured, list) else [configured]
    return Encoder(
        tokenizer, {stop for stop in stops if stop is not None}, max_length, model.chat_template_kwargs, model.thinking
    )


def fresh_lora(section: TrainingSection, network: Any, progress: Progress) -> LoraConfig:
    """A new adapter's configuration for a network.

    Raises:
        UserError: no layer has the name of any target module.
    """
    targets = section.target_modules
    named = sorted(targets.split(",")) if isinstance(targets, str) and "," in targets else targets
    named = sorted(named) if isinstance(named, list) else named
    if lost := check_targets(network, named):
        progress.log(f"no layer is called {', '.join(lost)}: train.target_modules counts without")
    skipped = routers(network) if named == "all-linear" else []
    if skipped:
        progress.log(f"{len(skipped)} routers of experts are left as they are, {skipped[0]} the first")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        lora_alpha=section.lora_alpha,
        lora_dropout=section.lora_dropout,
        target_modules=named,
        exclude_modules=skipped or None,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=section.init_lora_weights,
    )


def card_gb() -> float | None:
    """Memory of this process's GPU, in GB; None: there is none."""
    return torch.cuda.get_device_properties().total_memory / 1e9 if torch.cuda.is_available() else None


def peak_memory() -> float:
    """Most memory held so far, in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def redirect_logs(progress: Progress) -> Iterator[None]:
    """Keep the libraries off the terminal: their warnings go to the progress log, each once; bars go nowhere."""
    handler = _ToProgress(progress)
    transformers_logging.disable_progress_bar()
    with ExitStack() as stack:
        for name in LIBRARIES:
            logger = logging.getLogger(name)
            stack.callback(_restore, logger, logger.handlers, logger.propagate, logger.level)
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.WARNING)
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = lambda message, *_, **__: handler.say(str(message))
        yield


class _ToProgress(logging.Handler):
    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self.progress = progress
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())

    def say(self, text: str) -> None:
        text = " ".join(text.split())
        if text not in self.said and "deprecated" not in text:  # what TRL still calls is no news to a user
            self.said.add(text)
            self.progress.log(text)


def _restore(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool, level: int) -> None:
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)
