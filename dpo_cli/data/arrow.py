"""Parquet and Arrow files as rows, and the files of a folder that `datasets` saved. Needs pyarrow, not `datasets`."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_cli.data.bytes_in import Reader
from dpo_cli.data.files import read_json
from dpo_cli.errors import UserError, require

BATCH = 1024


def rows(path: Path, file: Reader, kind: str) -> Iterator[tuple[int, Any]]:
    """Yield (number of the row, row).

    Columns of structs hold every key that any row has; keys without a value are left out again.

    Raises:
        UserError: the extra is missing, or the file is damaged.
    """
    require("train", f"reading {kind}")
    import pyarrow

    try:
        batches = _batches(file, kind)
        yield from enumerate(itertools.chain.from_iterable(map(_as_rows, batches)), 1)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError, OverflowError, ValueError) as error:
        raise UserError(f"not a whole {kind} file: {_line(error)}", where=str(path), hint="write it again") from None


def _batches(file: Reader, kind: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    is_file = file.peek(6)[:6] == b"ARROW1"
    source = file if file.seekable() else io.BytesIO(file.read())
    if kind == "parquet":
        with pyarrow.parquet.ParquetFile(source) as opened:
            yield from opened.iter_batches(BATCH)
    elif is_file:
        with pyarrow.ipc.open_file(source) as opened:
            yield from (opened.get_batch(index) for index in range(opened.num_record_batches))
    else:
        with pyarrow.ipc.open_stream(source) as opened:
            yield from opened


def _as_rows(batch: Any) -> list[Any]:
    import pyarrow

    nested = [field.name for field in batch.schema if pyarrow.types.is_nested(field.type)]
    found: list[Any] = batch.to_pylist()
    for row in found if nested else []:
        for name in nested:
            row[name] = _without_nulls(row[name])
    return found


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def saved_files(folder: Path) -> list[Path]:
    """The files of a `save_to_disk` folder.

    Raises:
        UserError: it holds several splits, or its files are not named.
    """
    if (folder / "dataset_dict.json").exists():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        names = [name for name in splits if isinstance(name, str)] if isinstance(splits, list) else []
        if len(names) != 1:
            hint = f"name one of them: {folder / names[0]}" if names else "save it again"
            raise UserError(f"the folder holds the splits {', '.join(names)}", where=str(folder), hint=hint)
        folder = folder / names[0]
    files = read_json(folder / "state.json").get("_data_files")
    if not isinstance(files, list) or not all(isinstance(one, dict) and "filename" in one for one in files):
        raise UserError("names no data files", where=str(folder / "state.json"), hint="save it again with save_to_disk")
    return [folder / Path(str(one["filename"])).name for one in files]
