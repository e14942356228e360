"""What both training stages ask of TRL's trainers: exact resume, checkpoints that are whole, quiet, a clean stop.

Writes checkpoints, metrics.jsonl and events.jsonl of the run folder. One process and one device; several are not
covered. On a CPU a resumed run equals an uninterrupted one bit for bit.
"""

import json
import logging
import os
import resource
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from dpo_cli import store
from dpo_cli.config import ModelSection, TrainingSection
from dpo_cli.encode import Encoder
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.run_folder import RunFolder, event, metric_rows, seal

METERS = "meters.json"
LIBRARIES = ("transformers", "trl", "peft", "accelerate", "datasets", "torch")


class ResumableTrainer:
    """Mixed into a TRL trainer, before it: rows come encoded, checkpoints are small, whole and exact."""

    args: TrainingArguments
    state: TrainerState
    model: Any
    _metrics: dict[str, dict[str, list[float]]]
    _total_train_tokens: int
    _tr_loss: torch.Tensor
    _globalstep_last_logged: int

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset  # encoded already

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """TRL writes one with every checkpoint; nobody reads it."""

    def _send_telemetry(self) -> None:
        """Nothing is sent; by the time this runs, it is too late for HF_HUB_DISABLE_TELEMETRY."""

    def _save(self, output_dir: str, state_dict: dict[str, Any] | None = None) -> None:
        # `ref` is the SFT adapter: it is loaded from there again, never from a checkpoint. Asking whether the
        # vocabulary has grown ("auto") would ask the Hub.
        self.model.save_pretrained(output_dir, selected_adapters=["default"], save_embedding_layers=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        (checkpoint / METERS).write_text(json.dumps(self.meters()))
        seal(checkpoint)

    def meters(self) -> dict[str, Any]:
        """What has been summed up since the last log: the trainer itself forgets it when it resumes."""
        return {
            "loss": self._tr_loss.item(),
            "logged": self._globalstep_last_logged,
            "tokens": self._total_train_tokens,
            "metrics": dict(self._metrics["train"]),
        }

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


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, shows progress, and ends the run at a step's end when a signal asks for it."""

    def __init__(self, trainer: Any, metrics: store.Journal, progress: Progress, stop: "Stop") -> None:
        self.trainer = trainer
        self.metrics = metrics
        self.progress = progress
        self.stop = stop
        self.resumed_from: Path | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.resumed_from is not None:
            self.trainer.restore_meters(self.resumed_from)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for row in metric_rows(state.log_history[-1:]):
            self.metrics.append(row)
            if "eval_loss" in row:
                self.progress.log(f"step {row['step']}: {_evaluation(row)}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            control.should_log = True
        elif self.stop.signal is not None:
            control.should_save = control.should_training_stop = True
        self.progress.update(state.global_step, memory_gb=peak_memory(), **self.trainer.counters())
        return control


class Stop:
    """Notes the first SIGTERM or Ctrl-C, so that a step can end; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        else:
            self._former = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def fit(trainer: Any, run: RunFolder, events: store.Journal, progress: Progress) -> None:
    """Train from the newest complete checkpoint, or from the start, to the end.

    metrics.jsonl is written anew from the checkpoint's own log first, so that no step is there twice or missing.

    Raises:
        UserError: SIGTERM came; a checkpoint was saved (exit 143).
        KeyboardInterrupt: Ctrl-C came; a checkpoint was saved.
    """
    checkpoint = next(reversed(run.complete_checkpoints().values()), None)
    store.write_rows(run.metrics, metric_rows(run.trainer_state().get("log_history", [])))
    with store.Journal(run.metrics) as metrics, Stop() as stop:
        recorder = Recorder(trainer, metrics, progress, stop)
        recorder.resumed_from = checkpoint
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(recorder)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if stop.signal is None or step >= trainer.state.max_steps:
        return
    events.append(event("stopped", step, signal=signal.Signals(stop.signal).name))
    if stop.signal == signal.SIGINT:
        raise KeyboardInterrupt
    raise UserError(
        f"stopped by SIGTERM after step {step}, which is saved",
        where=str(run.path), hint="the same command goes on from there", code=Exit.PREEMPTED,
    )  # fmt: skip


def arguments(section: TrainingSection, run: RunFolder, evaluates: bool, metric: str, sign: int) -> dict[str, Any]:
    """Keyword arguments of TRL's configuration classes.

    Args:
        section: settings of the stage.
        run: where checkpoints go.
        evaluates: whether there are held-out rows.
        metric: evaluation metric of the best checkpoint, which rotation keeps.
        sign: 1 where larger is better, -1 where smaller is.
    """
    gpu = torch.cuda.is_available()
    return {
        "learning_rate": section.learning_rate,
        "num_train_epochs": section.num_train_epochs,
        "max_steps": section.max_steps,
        "per_device_train_batch_size": section.per_device_train_batch_size,
        "per_device_eval_batch_size": section.per_device_eval_batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "lr_scheduler_type": section.lr_scheduler_type,
        "warmup_steps": section.warmup_steps,
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
        "use_cpu": uses_bf16(section) and not gpu,  # else transformers refuses bf16 where there is no GPU
        "gradient_checkpointing": gpu if section.gradient_checkpointing is None else section.gradient_checkpointing,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a NaN is logged as such, not as the mean of what came before
        "eval_strategy": "steps" if evaluates else "no",
        "save_strategy": "steps",
        "metric_for_best_model": metric if evaluates else None,
        "greater_is_better": sign > 0,
        "dataloader_pin_memory": gpu,
        "disable_tqdm": True,
        "report_to": "wandb" if os.environ.get("WANDB_API_KEY") and find_spec("wandb") else "none",
    }


def uses_bf16(section: TrainingSection) -> bool:
    """Whether to compute in bfloat16: as set, else where a GPU has it; never on a CPU without being asked."""
    if section.bf16 is not None:
        return section.bf16
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def load_base(folder: Path, section: TrainingSection) -> Any:
    """The base model, in bfloat16 if that is what it computes in on this GPU."""
    dtype = torch.bfloat16 if uses_bf16(section) and torch.cuda.is_available() else torch.float32
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def load_encoder(folder: Path, model: ModelSection, max_length: int) -> Encoder:
    """The encoder of the base's tokenizer, chat template and stop tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = [tokenizer.eos_token_id]
    if (folder / "generation_config.json").exists():
        configured = GenerationConfig.from_pretrained(folder).eos_token_id
        stops += configured if isinstance(configured, list) else [configured]
    return Encoder(tokenizer, {stop for stop in stops if stop is not None}, max_length, model.chat_template_kwargs)


def fresh_lora(section: TrainingSection) -> LoraConfig:
    """A new adapter's configuration."""
    targets = section.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM", r=section.r, lora_alpha=section.lora_alpha, lora_dropout=section.lora_dropout,
        target_modules=targets.split(",") if isinstance(targets, str) and "," in targets else targets,
    )  # fmt: skip


def peak_memory() -> float:
    """Most memory held so far, in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def hushed(progress: Progress) -> Iterator[None]:
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


def _evaluation(row: dict[str, Any]) -> str:
    names = {
        "held-out loss": "eval_loss", "margin": "eval_rewards/margins", "accuracy": "eval_rewards/accuracies",
        "KL in nats a token": "eval_kl_nats_per_token",
    }  # fmt: skip
    return ", ".join(f"{name} {row[key]:.4f}" for name, key in names.items() if key in row)
