"""Whole files: written in one step or not at all, hashed, and read as JSON."""

import errno
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.errors import Exit, UserError

PRIVATE = 0o600  # the mode of files that hold prompts or replies
encode_line = msgspec.json.Encoder().encode


def write_json(path: Path, value: Any) -> None:
    """Replace a file by one indented JSON value, all or nothing."""
    write_file(path, msgspec.json.format(encode_line(value), indent=2) + b"\n")


def write_file(path: Path, content: bytes, private: bool = False) -> None:
    """Replace a file, all or nothing, through a temporary file beside it; who may read it stays as it was.

    Args:
        path: its folder is made.
        content: all of it.
        private: a new file is for its owner alone, as what holds prompts and replies should be.

    Raises:
        UserError: the disk is full or the folder can't be written; the old file is as it was.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else PRIVATE if private else 0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> UserError:
    """What a person is told when a file can't be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            "the disk is full; everything written before is kept",
            where=str(path),
            hint="free some space, then run the same command again",
            code=Exit.FAILED,
        )
    return UserError(error.strerror or str(error), where=str(path), code=Exit.FAILED)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: it can't be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(str(error), where=str(path)) from None


def sha256(path: Path) -> str:
    """Hash of a file, as sha256sum prints it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
