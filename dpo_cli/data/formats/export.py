"""Preference rows as files for other trainers: TRL, parquet, NeMo RL.

Reads train.jsonl and val.jsonl, writes a folder; every file is replaced whole or not at all. Scores and finish reasons
are left out: no trainer reads them. The column `margin`, where pairs have it, goes to TRL and parquet. Prompts stay
conversations: as plain texts, TRL would train them without the chat template.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.files import write_file
from dpo_cli.data.formats import nemo_rl
from dpo_cli.data.jsonl import read_rows, write_rows
from dpo_cli.data.records import Preference
from dpo_cli.errors import UserError, require

TARGETS = ("trl", "parquet", "nemo-rl")


class Exported(Struct, kw_only=True):
    """What was written where, and for `nemo-rl` what to type: title -> command."""

    to: str
    train: int
    val: int
    files: list[str]
    launch: dict[str, str]


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
    return Exported(to=to, train=len(train), val=len(val), files=[str(file) for file in files], launch=launch)


def export(train: Sequence[Preference], val: Sequence[Preference], folder: Path, to: str, config: Config) -> list[Path]:
    """Write both sides of the split for another trainer; an empty side gives no file.

    Args:
        train: pairs to train on.
        val: held-out pairs.
        folder: where to; made if missing.
        to: one of `TARGETS`.
        config: the recipe, for `nemo-rl`.

    Returns:
        The files written: `train.*` and `val.*`, and for `nemo-rl` its YAML and launch script.

    Raises:
        UserError: no pairs to train on, an unknown target, or parquet without the extra `train`.
    """
    if to not in TARGETS:
        raise UserError(f"unknown export target '{to}'", where="--to", hint=f"one of: {', '.join(TARGETS)}")
    if not train:
        raise UserError("no pairs to export", hint="nothing-dpo pair")
    # First of all, since it may refuse.
    recipe = nemo_rl.write_recipe(train, val, folder, config) if to == "nemo-rl" else []
    as_row = nemo_rl.row_format([*train, *val]) if to == "nemo-rl" else as_trl
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


def as_trl(row: Preference) -> dict[str, Any]:
    """A row in TRL's conversational preference format."""
    plain: dict[str, Any] = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return plain if row.margin is None else plain | {"margin": row.margin}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a parquet file by rows of TRL's conversational preference format."""
    require("train", "writing parquet")
    import pyarrow
    import pyarrow.parquet

    messages = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    fields = [(field, messages) for field in ("prompt", "chosen", "rejected")]
    if any("margin" in row for row in rows):
        fields.append(("margin", pyarrow.float64()))
    schema = pyarrow.schema(fields)
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), content)
    write_file(path, content.getvalue())
