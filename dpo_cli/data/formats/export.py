"""Preference rows as files for other trainers: TRL, parquet, NeMo RL, LLaMA-Factory, axolotl, ms-swift, OpenAI.

Reads train.jsonl and val.jsonl, writes a folder; every file is replaced whole or not at all. Scores and finish reasons
are left out: no trainer reads them. The column `margin`, where pairs have it, goes to TRL and parquet. Prompts stay
conversations: as plain texts, TRL would train them without the chat template. In parquet, tool calls and tools are JSON
texts: its columns would give every call the arguments of all others.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.files import encode_line, write_file
from dpo_cli.data.formats import foreign, nemo_rl
from dpo_cli.data.jsonl import read_rows, write_rows
from dpo_cli.data.records import Message, Preference
from dpo_cli.errors import UserError, require

TARGETS = ("trl", "parquet", "nemo-rl", "llama-factory", "axolotl", "ms-swift", "openai")
_FOREIGN = TARGETS[3:]


class Exported(Struct, kw_only=True):
    """What was written where, the first row of it as text, and what to type: title -> command."""

    to: str
    train: int
    val: int
    files: list[str]
    launch: dict[str, str]
    example: str = ""


def export_split(data: Path, to: str, folder: Path | None, config: Config, dry_run: bool = False) -> Exported:
    """Export the train.jsonl and val.jsonl of a folder; with `dry_run` only count them.

    Args:
        data: the folder that holds them.
        to: one of `TARGETS`.
        folder: where to; unset: a folder of the target's name in `data`.
        config: the recipe, for `nemo-rl`.
        dry_run: write nothing.

    Raises:
        UserError: as `export`, or the export would replace what it reads.
    """
    folder = folder or data / to
    if folder.resolve() == data.resolve():
        raise UserError("this would replace the pairs themselves", where="--out", hint="name another folder")
    paths = (data / "train.jsonl", data / "val.jsonl")
    train, val = ([row for _, row in read_rows(path, Preference)] if path.exists() else [] for path in paths)
    files = [] if dry_run else export(train, val, folder, to, config)
    launch = nemo_rl.launch_lines(folder, len(train), config) if to == "nemo-rl" and train else {}
    if to in _FOREIGN:
        launch = foreign.launch_lines(to, folder, bool(val), config)
    example = msgspec.json.format(encode_line(row_format(to, [*train, *val])(train[0])), indent=2) if train else b""
    return Exported(
        to=to,
        train=len(train),
        val=len(val),
        files=[str(file) for file in files],
        launch=launch,
        example=example.decode(),
    )


def export(train: Sequence[Preference], val: Sequence[Preference], folder: Path, to: str, config: Config) -> list[Path]:
    """Write both sides of the split for another trainer; an empty side gives no file.

    Args:
        train: pairs to train on.
        val: held-out pairs.
        folder: where to; made if missing.
        to: one of `TARGETS`.
        config: the recipe, for `nemo-rl`.

    Returns:
        The files written: `train.*` and `val.*`, and what the trainer wants beside them.

    Raises:
        UserError: no pairs to train on, an unknown target, pairs that it has no place for, or parquet without the
            extra `train`.
    """
    if to not in TARGETS:
        raise UserError(f"unknown export target '{to}'", where="--to", hint=f"one of: {', '.join(TARGETS)}")
    if not train:
        raise UserError("no pairs to export", hint="nothing-dpo pair")
    # First of all, since they may refuse.
    as_row = row_format(to, [*train, *val])
    recipe = nemo_rl.write_recipe(train, val, folder, config) if to == "nemo-rl" else []
    if to in _FOREIGN:
        recipe = foreign.write_files(to, [*train, *val], bool(val), folder, config)
    files = []
    for side, rows in (("train", train), ("val", val)):
        path = folder / f"{side}.{'parquet' if to == 'parquet' else 'jsonl'}"
        if not rows:  # none of an earlier export may stay
            path.unlink(missing_ok=True)
            continue
        plain = [as_row(row) for row in rows]
        write_parquet(path, plain) if to == "parquet" else write_rows(path, plain)
        files.append(path)
    return files + recipe


def row_format(to: str, rows: Sequence[Preference]) -> Callable[[Preference], dict[str, Any]]:
    """How rows are written for a target.

    Raises:
        UserError: a row holds what the target has no place for.
    """
    if to == "nemo-rl":
        return nemo_rl.row_format(rows)
    return foreign.row_format(to, rows) if to in _FOREIGN else as_trl


def as_trl(row: Preference) -> dict[str, Any]:
    """A row in TRL's conversational preference format."""
    plain: dict[str, Any] = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    if row.margin is not None:
        plain["margin"] = row.margin
    return plain | {"tools": row.tools} if row.tools else plain


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a parquet file by rows of TRL's conversational preference format."""
    require("train", "writing parquet")
    import pyarrow
    import pyarrow.parquet

    sides = ("prompt", "chosen", "rejected")
    used = {key for row in rows for side in sides for message in row[side] for key in message}
    names = [key for key in Message.__annotations__ if key in used]
    messages = pyarrow.list_(pyarrow.struct([(name, pyarrow.string()) for name in names]))
    fields = [(side, messages) for side in sides]
    if any("margin" in row for row in rows):
        fields.append(("margin", pyarrow.float64()))
    if any("tools" in row for row in rows):
        fields.append(("tools", pyarrow.string()))
    flat = [
        {
            **row,
            **{side: [*map(_flat_message, row[side])] for side in sides},
            **({"tools": encode_line(row["tools"]).decode()} if "tools" in row else {}),
        }
        for row in rows
    ]
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat, schema=pyarrow.schema(fields)), content)
    write_file(path, content.getvalue(), private=True)


def _flat_message(message: Message) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return {**message, "tool_calls": encode_line(calls).decode()} if calls else dict(message)
