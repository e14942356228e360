"""Whether train.jsonl and val.jsonl are what the judgments give already, so that nothing need be made again.

Reads and writes `.paired.json` beside them: the settings, what was read and written, each file by its size, its time
and its inode, and how many pairs came out. Whatever differs, also a cleaned copy or a newer version, is no match. A
change that leaves all three of a file as they were is not seen.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli import __version__
from dpo_cli.config.settings import Config
from dpo_cli.data.files import encode_line, write_file
from dpo_cli.errors import UserError

RECORD = ".paired.json"
OUTPUTS = ("train.jsonl", "val.jsonl")


class PairCounts(Struct):
    """Pairs by side, and why prompts gave none, the most frequent reason first."""

    train: int
    val: int
    skipped: dict[str, int]


class _Record(Struct):
    version: str
    settings: dict[str, Any]
    files: dict[str, list[int]]
    counts: PairCounts


def stand(folder: Path, names: tuple[str, ...]) -> dict[str, list[int]]:
    """What tells a file from a changed one, by name; a file that is not there has nothing."""
    found: dict[str, list[int]] = {}
    for name in names:
        with suppress(OSError):
            status = (folder / name).stat()
            found[name] = [status.st_size, status.st_mtime_ns, status.st_ino]
    return found


def known(config: Config, inputs: tuple[str, ...]) -> PairCounts | None:
    """What came out when the files were made; None if they would come out otherwise today, or nobody knows."""
    folder = Path(config.data)
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=_Record)
    except (OSError, msgspec.MsgspecError, UnicodeError):
        return None
    now = _Record(__version__, _settings(config), stand(folder, (*inputs, *OUTPUTS)), record.counts)
    return record.counts if record == now else None


def keep(config: Config, inputs: dict[str, list[int]], counts: PairCounts) -> None:
    """Note what came out of which inputs. A disk that is full costs nothing but the next making.

    Args:
        config: the settings.
        inputs: as `stand` gave it before they were read.
        counts: what came out.
    """
    folder = Path(config.data)
    record = _Record(__version__, _settings(config), inputs | stand(folder, OUTPUTS), counts)
    with suppress(UserError):
        write_file(folder / RECORD, encode_line(record), private=True)


def _settings(config: Config) -> dict[str, Any]:
    settings: dict[str, Any] = msgspec.json.decode(encode_line(config.pair))
    return settings
