"""Rows as they were read to rows of token ids, and what is said of those that were shortened or refused.

Reads the base's tokenizer; records one event of the run. Not covered: the tokens of a server (`template_check.py`).
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_cli.config.settings import ModelSection, TrainingSection
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import check_base
from dpo_cli.progress import Progress
from dpo_cli.training.encode import REMEDIES, TOO_LONG, Encoder, Exchange
from dpo_cli.training.inputs import Inputs, TrainingRow
from dpo_cli.training.run_folder import RunContext

if TYPE_CHECKING:  # needs pyarrow
    from dpo_cli.training.encoded_rows import EncodedFile

ENCODED = ".encoded"  # beside the runs, which share it


def encode_inputs(
    model: ModelSection, section: TrainingSection, base: Path, inputs: Inputs, run: RunContext
) -> "tuple[Encoder, EncodedFile, EncodedFile]":
    """The encoder, the rows to train on and those held out.

    Raises:
        UserError: no row is left, or what the encoder raises.
    """
    from dpo_cli.training.encoded_rows import encode_rows, prune
    from dpo_cli.training.trainer import load_encoder

    encoder = load_encoder(base, model, _longest(section, base, run.progress))
    if encoder.inserts_date():
        run.progress.log(
            "the chat template writes today's date into every prompt, so that the same rows are other tokens "
            "tomorrow: set model.chat_template_kwargs, or model.chat_template to a template without it"
        )
    folder = run.folder.path.parent / ENCODED
    rows, held_out = (encode_rows(encoder, side, folder, base, run.progress) for side in (inputs.rows, inputs.held_out))
    prune(folder, run.progress)
    _tell(rows, held_out, run)
    if not rows.rows:
        reason, count = max(rows.refused.items(), key=lambda item: item[1])
        raise UserError(
            f"no row is left to train on: {count} of {len(inputs.rows)} are refused, since {reason}",
            where=", ".join(inputs.files),
            hint=_remedy(reason, section, encoder.max_length),
        )
    return encoder, rows, held_out


def _remedy(reason: str, section: TrainingSection, longest: int) -> str:
    """What mends it, where most rows are refused for a reason."""
    if reason == TOO_LONG and longest < section.max_length:  # a larger max_length changes nothing
        return f"the base has {longest} positions: shorter completions (generate.max_tokens), or a base with more"
    return REMEDIES[reason]


def exchange(row: TrainingRow) -> Exchange:
    """A row as the encoder takes it."""
    return Exchange(row.prompt, row.completions, row.tools, row.where)


def _longest(section: TrainingSection, base: Path, progress: Progress) -> int:
    """Longest row, in tokens: as set, and no longer than the model has positions for."""
    found = check_base(str(base))
    positions = found.positions if found is not None else None
    if positions is None or positions >= section.max_length:
        return section.max_length
    progress.log(f"max_length is {positions}, the base's positions, not {section.max_length}")
    return positions


def _tell(rows: "EncodedFile", held_out: "EncodedFile", run: RunContext) -> None:
    """Say and record what encoding did to the rows."""
    shortened = rows.shortened + held_out.shortened
    reasons = sorted(rows.refused.keys() | held_out.refused.keys())
    refused = {reason: rows.refused.get(reason, 0) + held_out.refused.get(reason, 0) for reason in reasons}
    run.record("encoded", 0, shortened=shortened, refused=refused, held_out=len(held_out.rows))
    if shortened:
        run.progress.log(f"{shortened} prompts lost their oldest part to fit into max_length")
    for reason, count in refused.items():
        run.progress.log(f"{count} rows refused: {reason}")
    if os.environ.get("WANDB_API_KEY") and not find_spec("wandb"):
        run.progress.log("WANDB_API_KEY is set, but wandb is not installed: nothing is reported to it")
    if not held_out.rows:
        run.progress.log("no held-out rows: nothing will show whether what is learnt holds elsewhere")
