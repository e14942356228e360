"""What both training stages ask of TRL's trainers: exact resume, checkpoints that are whole, quiet.

Writes checkpoints of the run folder; `loop.py` drives. On a CPU a resumed run equals an uninterrupted one bit for bit.
FSDP2, which several processes use for all weights, has been tried on a CPU, where accelerate has to be made to take it.
"""

import json
import logging
import math
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors import SafetensorError
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging as transformers_logging

from dpo_cli import errors
from dpo_cli.config.settings import ModelSection, TrainingSection
from dpo_cli.data.files import write_json
from dpo_cli.errors import Exit, UserError
from dpo_cli.model_loading import check_targets, explained, load_network, load_tokenizer, routers
from dpo_cli.models.base_model import check_base
from dpo_cli.progress import Progress
from dpo_cli.training import guards
from dpo_cli.training.encode import Encoder
from dpo_cli.training.guards import GuardState
from dpo_cli.training.precision import keep_states_precise, uses_bf16
from dpo_cli.training.run_folder import GUARDS, RunFolder, mark_complete, metric_rows
from dpo_cli.training.trained_parameters import split_targets

METERS = "meters.json"
FULL = 1e6  # bytes; what is left of a disk on which nothing more goes
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
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        kept, self.args.save_total_limit = self.args.save_total_limit, None  # none goes before this one is whole
        try:
            with saved_whole(checkpoint):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                meters = self._remembered_meters or self.meters()
                self.accelerator.wait_for_everyone()  # each process adds its random state
                if not self.args.should_save:
                    return
                (checkpoint / METERS).write_text(json.dumps(meters))
                write_json(checkpoint / GUARDS, self.guard_state)
                mark_complete(checkpoint)
        finally:
            self.args.save_total_limit = kept
        rotate_checkpoints(self.args.output_dir, kept, self.state.best_model_checkpoint, use_mtime=True)

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


@contextmanager
def saved_whole(checkpoint: Path) -> Iterator[None]:
    """Save a checkpoint within; one that can't be saved is removed, and the one before is named.

    Raises:
        UserError: the disk is full, or can't be written.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (UserError, OSError, RuntimeError, SafetensorError) as error:  # torch's own is a RuntimeError
        free = shutil.disk_usage(checkpoint.parent).free
        shutil.rmtree(checkpoint, ignore_errors=True)
        newest = max(RunFolder(checkpoint.parent.parent).complete_checkpoints(), default=0)
        said = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        said = "the disk is full" if free < FULL else f"{said} ({free / 1e9:,.1f} GB are free there)"
        raise UserError(
            f"{checkpoint.name} can't be saved: {said}; "
            + (f"checkpoint-{newest} is whole" if newest else "there is none before it"),
            where=str(checkpoint.parent),
            hint="make room; then the same command goes on from " + (f"step {newest}" if newest else "the start"),
            code=Exit.FAILED,
        ) from error


def load_base(folder: Path, section: TrainingSection) -> Any:
    """The base model: in 4 bits if asked for or stored so, else in bfloat16 if that is what it computes in.

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
        if not uses_bf16(section):
            return load_network(folder, torch.float32)
        network = load_network(folder, torch.bfloat16)
        return network if torch.cuda.is_available() else keep_states_precise(network)
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
    named = split_targets(section.target_modules)
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
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


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
