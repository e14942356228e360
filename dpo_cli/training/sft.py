"""Supervised fine-tuning of a fresh LoRA adapter on prompt-completion rows: what DPO starts from.

The loss is on the completion's tokens alone, its stop token included. Forwards are packed and score completions
alone, where that comes to TRL's log-probabilities (`forward/packed.py`). Writes through `trainer.py`. Not covered:
going on from an adapter.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from dpo_cli.config.settings import SftSection
from dpo_cli.errors import UserError
from dpo_cli.interrupts import interruptible
from dpo_cli.training.arguments import arguments
from dpo_cli.training.encode import EncodedRow
from dpo_cli.training.encoded_rows import columns
from dpo_cli.training.forward import packed
from dpo_cli.training.guards import GuardState
from dpo_cli.training.loop import fit
from dpo_cli.training.run_folder import RunContext
from dpo_cli.training.trainer import ResumableTrainer, fresh_lora, load_base

BEST = ("eval_loss", -1)


class SftTrainer(packed.PackedSteps, ResumableTrainer, SFTTrainer):  # type: ignore[misc]
    """TRL's trainer, which resumes exactly, with packed forwards."""

    best = BEST


def train(
    section: SftSection,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[EncodedRow],
    held_out: Sequence[EncodedRow],
    run: RunContext,
) -> None:
    """Train a fresh LoRA.

    Args:
        section: settings.
        base: folder of the base model.
        tokenizer: the base's.
        rows: encoded demonstrations, one completion each.
        held_out: the same for evaluation; may be empty.
        run: where everything goes.

    Raises:
        UserError: a setting is one that TRL refuses.
    """

    def make(state: GuardState) -> SftTrainer:
        with interruptible():
            model = load_base(base, section)
        lora = fresh_lora(section, model, run.progress)
        try:
            trainer = SftTrainer(
                model=model,
                args=SFTConfig(**arguments(section, run.folder, bool(held_out), *BEST, len(rows), state)),
                train_dataset=dataset(rows),
                eval_dataset=dataset(held_out) if held_out else None,
                processing_class=tokenizer,
                peft_config=lora,
            )
        except ValueError as error:
            raise UserError(f"TRL refuses this setting: {error}") from None
        reason = packed.enable(trainer, state.tokens_per_batch or section.tokens_per_batch)
        if reason is not None:
            run.progress.log(f"forward: TRL's own, padded, since {reason}")
        return trainer

    fit(make, run)


def dataset(rows: Sequence[EncodedRow]) -> Dataset:
    """Token ids with labels, the prompt's tokens being ignored."""
    return Dataset(columns(rows), fingerprint=os.urandom(8).hex())  # else it would hash all of it
