"""The settings of a run as keyword arguments of TRL's configuration classes; reads and writes nothing."""

from typing import Any

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments

from dpo_cli.config.settings import WARMUP, TrainingSection
from dpo_cli.errors import UserError
from dpo_cli.training import distributed
from dpo_cli.training.guards import GuardState
from dpo_cli.training.plan import capped_steps
from dpo_cli.training.precision import uses_bf16
from dpo_cli.training.run_folder import RunFolder
from dpo_cli.training.trackers import PROJECT, tracker

WHOLE = 1 - 1e-9  # transformers takes 1 as one step


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
    """FSDP for all weights in several processes."""
    if not distributed.shards(section):
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {"state_dict_type": "FULL_STATE_DICT", "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
    }


def keep_outputs(asked: TrainingArguments) -> TrainingArguments:
    """Let FSDP hand on what a model puts out as it is, and add up gradients in float32.

    In bfloat16 accelerate has both rounded: log-probabilities as well, by up to 1/32 of a nat each, so that policy and
    reference did not agree at step zero.
    """
    if asked.fsdp_plugin_args and asked.bf16:
        asked.fsdp_plugin_args["mixed_precision_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return asked
