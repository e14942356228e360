"""Preference rows as files for other trainers: TRL, parquet, NeMo RL.

Writes a folder; every file is replaced whole or not at all. Scores and finish reasons are left out: no trainer reads
them. Prompts stay conversations: as plain texts, TRL would train them without the chat template.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config import Config
from dpo_cli.errors import UserError, require
from dpo_cli.formats import nemo_rl
from dpo_cli.schema import Preference
from dpo_cli.store import write_file, write_rows

TARGETS = ("trl", "parquet", "nemo-rl")


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
    return {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace a parquet file by rows of TRL's conversational preference format."""
    require("train", "writing parquet")
    import pyarrow
    import pyarrow.parquet

    messages = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    schema = pyarrow.schema([(field, messages) for field in ("prompt", "chosen", "rejected")])
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), content)
    write_file(path, content.getvalue())
