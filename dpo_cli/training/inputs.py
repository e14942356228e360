"""What training reads: rows as messages, from a folder or from one file that is split by prompt, and the base model.

Reads train.jsonl and val.jsonl, or one JSONL file. Writes nothing, but downloads a base model that is named by its
Hub id. Needs no torch.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from msgspec import Struct, field

from dpo_cli.config.settings import Config
from dpo_cli.data.bulk import paused_collection
from dpo_cli.data.columns import Cells, read_mapping
from dpo_cli.data.files import finish_replacement, sha256
from dpo_cli.data.formats.preferences import read_ours, read_pair
from dpo_cli.data.formats.prompts import read_demonstration
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Message, Preference, Tool, prompt_id, split_side
from dpo_cli.errors import Exit, UserError

Stage = Literal["dpo", "sft"]
MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.safetensors"]


class TrainingRow(NamedTuple):
    """A prompt and its completions (chosen and rejected, or one), how far apart their scores are, what it counts.

    `tools` are what the prompt may call, `where` the row's file and line.
    """

    prompt: list[Message]
    completions: list[list[Message]]
    gap: float | None = None
    weight: float = 1.0
    scores: tuple[float, float] | None = None
    tools: list[Tool] | None = None
    where: str = ""


class Inputs(Struct):
    """Rows to train on and rows held out, as messages; hashes of the files read; how we split, where we did.

    `dropped` counts the columns that were left out.
    """

    rows: list[TrainingRow]
    held_out: list[TrainingRow]
    files: dict[str, str]
    split: dict[str, float]
    dropped: Counter[str] = field(default_factory=Counter)


def read_inputs(config: Config, stage: Stage, data: Path | None, limit: int | None) -> Inputs:
    """The rows of a stage, in the order in which they are to be learnt.

    Args:
        config: every setting.
        stage: whose rows.
        data: folder with train.jsonl and perhaps val.jsonl, or one file to be split by prompt; unset: for dpo
            `config.data`, for sft the folder of `config.generate.prompts`.
        limit: at most so many rows to train on.

    Raises:
        UserError: there are none, a line is bad, or the curriculum lacks score gaps.
    """
    section = config.train if stage == "dpo" else config.sft
    mapping, dropped = read_mapping(section.columns), Counter[str]()
    if stage == "dpo":
        source = data or Path(config.data)
        hint = "nothing-dpo judge makes it from completions"
    else:
        source = data or Path(config.generate.prompts)
        hint = "a JSONL file of prompt-completion rows, or a folder that holds one as train.jsonl"

    def parse(row: dict[str, Any]) -> TrainingRow:
        if stage == "sft":
            return _demonstration(row, mapping, dropped)
        ours = None if mapping else read_ours(row)
        return _pair(ours or read_pair(Cells(row, mapping, dropped))[1])

    with paused_collection():
        inputs = _read_folder(source, parse, hint) if source.is_dir() else _read_file(source, parse, hint, config)
    inputs.dropped = dropped
    if not inputs.rows:
        raise UserError("no rows to train on", where=str(source), hint=hint)
    if stage == "dpo":
        _refuse_shared(inputs, source)
    inputs.rows = inputs.rows[:limit]
    if stage == "dpo" and config.train.curriculum:
        if any(row.gap is None for row in inputs.rows):
            raise UserError("the curriculum needs a score_gap in every pair", where=str(source), hint="--no-curriculum")
        inputs.rows.sort(key=lambda row: -(row.gap or 0.0))
    return inputs


def _refuse_shared(inputs: Inputs, source: Path) -> None:
    """Prompts that are held out and trained on: the held-out numbers would say nothing."""
    held_out = {prompt_id(row.prompt, row.tools) for row in inputs.held_out}
    shared = held_out & {prompt_id(row.prompt, row.tools) for row in inputs.rows} if held_out else set()
    if shared:
        raise UserError(
            f"{len(shared):,} of {len(held_out):,} held-out prompts are in train.jsonl as well",
            where=str(source),
            hint="nothing-dpo pair, which splits by prompt; or nothing-dpo inspect pairs --fix FOLDER",
        )


def _pair(preference: Preference) -> TrainingRow:
    gap, scores = preference.score_gap, None
    if preference.chosen_score is not None and preference.rejected_score is not None:
        scores = preference.chosen_score, preference.rejected_score
        gap = scores[0] - scores[1] if gap is None else gap
    weight = 1.0 if preference.weight is None else preference.weight
    return TrainingRow(
        preference.prompt, [preference.chosen, preference.rejected], gap, weight, scores, preference.tools
    )


def _demonstration(row: dict[str, Any], mapping: dict[str, str], dropped: Counter[str]) -> TrainingRow:
    prompt, completion = read_demonstration(row, mapping, dropped)
    return TrainingRow(prompt.messages, [completion], tools=prompt.tools)


def _read_folder(folder: Path, parse: Callable[[dict[str, Any]], TrainingRow], hint: str) -> Inputs:
    finish_replacement(folder)
    train, val = folder / "train.jsonl", folder / "val.jsonl"
    if not train.exists():
        raise UserError("no train.jsonl in it", where=str(folder), hint=hint)
    files = [train, val] if val.exists() else [train]
    rows = [[row._replace(where=f"{file}:{line}") for line, row in parse_rows(file, parse)] for file in files]
    return Inputs(rows[0], rows[1] if len(rows) > 1 else [], {file.name: sha256(file) for file in files}, {})


def _read_file(file: Path, parse: Callable[[dict[str, Any]], TrainingRow], hint: str, config: Config) -> Inputs:
    """One file, split by prompt as `pair` would."""
    if not file.exists():
        raise UserError("no such file or folder", where=str(file), hint=hint)
    split = {"seed": config.pair.seed, "val_share": config.pair.val_share}
    sides: tuple[list[TrainingRow], list[TrainingRow]] = ([], [])
    for line, row in parse_rows(file, parse):
        held_out = split_side(prompt_id(row.prompt, row.tools), config.pair.seed, config.pair.val_share)
        sides[held_out].append(row._replace(where=f"{file}:{line}"))
    return Inputs(*sides, {file.name: sha256(file)}, split)


def download_base(base: str) -> Path:
    """The base model's files on this machine; a Hub id is downloaded first."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, allow_patterns=MODEL_FILES, ignore_patterns=["original/*"]))
    except HFValidationError:
        raise UserError("no such folder, nor a name on the Hub", where=base, hint="set model.base") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            reason, where=base, hint="set model.base to a folder, or HF_TOKEN to a key", code=Exit.FAILED
        ) from None
