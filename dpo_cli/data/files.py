"""Whole files and folders: written in one step or not at all, also several as one, hashed, and read as JSON.

A file is written beside its place under a hidden name and moved there once it is on the disk. Its writer holds a lock
on the hidden file, so that the next writer tells those that a killed one has left from those of a running one. File
systems that lack locks or syncs (mounted buckets) are used without, which is said once.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.errors import Exit, UserError

PRIVATE, PUBLIC = 0o600, 0o644  # the mode of files that hold prompts or replies, and of others
encode_line = msgspec.json.Encoder().encode

BLOCK_BYTES = 1 << 20  # of a write
REPLACING = ".replacing.json"  # which files of its folder are replaced as one, once it is there
UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)

_said: set[str] = set()


def write_json(path: Path, value: Any) -> None:
    """Replace a file by one indented JSON value, all or nothing."""
    write_file(path, msgspec.json.format(encode_line(value), indent=2) + b"\n")


def write_file(path: Path, content: bytes | Iterable[bytes], private: bool = False) -> None:
    """Replace a file, all or nothing, through a temporary file beside it; who may read it stays as it was.

    Args:
        path: the file; its folder is made.
        content: all of it, or its parts, which are taken one after the other.
        private: a new file is for its owner alone, as what holds prompts and replies should be.

    Raises:
        UserError: the disk is full or the folder can't be written; the old file is as it was.
    """
    with explained(path), _staged({path: content}, private) as moves:
        _rename(moves)


def write_files(contents: Mapping[Path, bytes | Iterable[bytes]], private: bool = False) -> None:
    """Replace several files of one folder as one: all of them or none, whenever this is killed.

    While they are moved to their places the old ones but the first are away, so that nobody sees old and new ones
    together. If it is killed there, `finish_replacement` goes on.

    Args:
        contents: of each file all or its parts.
        private: new files are for their owner alone.

    Raises:
        UserError: the disk is full or the folder can't be written; the old files are as they were.
    """
    (folder,) = {path.parent for path in contents}
    finish_replacement(folder)
    marker = folder / REPLACING
    with explained(marker), _staged(contents, private, unless=marker) as moves:
        names = [(hidden.name, path.name) for hidden, path in moves.items()]
        with _staged({marker: encode_line(names)}, private) as marking:
            _rename(marking)  # from here on it is done, whoever ends it
            _finish(marker, moves)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """An empty folder that takes another one's place at the end of the block, or leaves it as it is where that fails.

    All can read its files then: safetensors 0.8 makes them for their owner alone, and a server may be another user.

    Raises:
        UserError: the disk is full, or the place can't be written to.
    """
    staged, replaced = (folder.with_name(f".{folder.name}.{kind}") for kind in ("new", "old"))
    for left in (staged, replaced):
        shutil.rmtree(left, ignore_errors=True)
    with explained(staged):
        staged.mkdir(parents=True)
        yield staged
        for file in staged.rglob("*"):
            if file.is_file() and file.stat().st_mode & PUBLIC != PUBLIC:
                file.chmod(PUBLIC)
        if folder.exists():
            folder.rename(replaced)
        staged.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def finish_replacement(folder: Path) -> None:
    """Move files to their places that a killed `write_files` has written whole.

    Raises:
        UserError: the folder can't be written.
    """
    marker = folder / REPLACING
    try:
        handle = os.open(marker, os.O_RDWR)
    except OSError:  # there is nothing to do, or no way to do it
        return
    with explained(marker):
        try:
            lock(handle, marker, wait=True)
            if _is_at(handle, marker):  # else whoever held the lock has done it
                names = msgspec.json.decode(marker.read_bytes(), type=list[tuple[str, str]])
                _finish(marker, {folder / hidden: folder / name for hidden, name in names})
        finally:
            os.close(handle)


def write_all(handle: int, content: bytes) -> None:
    """Write all of it: a nearly full disk takes a part, then refuses the rest."""
    written = os.write(handle, content)
    while written < len(content):
        written += os.write(handle, content[written:])


def sync(handle: int, path: Path) -> None:
    """Have a file on the disk; where the file system can't say so, that is said once."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _say_once("no fsync there, so a power cut may lose what was written last", path)


def lock(handle: int, path: Path, wait: bool, shared: bool = False) -> bool:
    """Lock an open file for one process; whether it is locked, or could not be for want of locks.

    Args:
        handle: of the open file.
        path: its name.
        wait: for whoever holds it.
        shared: with others that lock it so.

    Raises:
        OSError: of another kind than that somebody else holds it.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        _say_once("no locks there, so run one command at a time", path)
    return True


def _finish(marker: Path, moves: Mapping[Path, Path]) -> None:
    """Move files from their hidden names to their places, as far as that is not done, and take the marker away."""
    left = {hidden: path for hidden, path in moves.items() if hidden.exists()}
    if len(left) == len(moves):
        for path in list(left.values())[1:]:
            path.unlink(missing_ok=True)
    _rename(left)
    marker.unlink(missing_ok=True)


def _rename(moves: Mapping[Path, Path]) -> None:
    for hidden, path in moves.items():
        hidden.replace(path)
        _sync_folder(path.parent)


@contextmanager
def _staged(
    contents: Mapping[Path, bytes | Iterable[bytes]], private: bool, unless: Path | None = None
) -> Iterator[dict[Path, Path]]:
    """Files under hidden names beside their places, whole and on the disk: hidden name -> place.

    They are taken away again if what follows fails, unless there is a file `unless`.
    """
    hidden: dict[Path, Path] = {}
    with ExitStack() as opened:
        try:
            for path, content in contents.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                clean_up(path)
                temporary, handle = _create(path, private)
                opened.callback(os.close, handle)
                hidden[temporary] = path
                for block in _blocks([content] if isinstance(content, bytes) else content):
                    write_all(handle, block)
                sync(handle, path)
            yield hidden
        except BaseException:
            if unless is None or not unless.exists():
                for temporary in hidden:
                    temporary.unlink(missing_ok=True)
            raise


def _create(path: Path, private: bool) -> tuple[Path, int]:
    """A new hidden file for a path, open and locked."""
    mode = path.stat().st_mode & 0o777 if path.exists() else PRIVATE if private else PUBLIC
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, PRIVATE)
        os.fchmod(handle, mode)
        lock(handle, path, wait=True)
        if _is_at(handle, temporary):  # else another writer took it for a killed one's before it was locked
            return temporary, handle
        os.close(handle)


def clean_up(path: Path) -> None:
    """Remove what killed writers of a path have left; its name may be a pattern."""
    for stale in path.parent.glob(f".{path.name}.????????.new"):
        try:
            handle = os.open(stale, os.O_RDWR)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink(missing_ok=True)
        except OSError:  # somebody writes it, or nobody can tell
            pass
        finally:
            os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(handle), there)


def _blocks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Parts of a file put together to few large writes."""
    block: list[bytes] = []
    size = 0
    for part in parts:
        block.append(part)
        size += len(part)
        if size >= BLOCK_BYTES:
            yield b"".join(block)
            block, size = [], 0
    yield b"".join(block)


def _sync_folder(folder: Path) -> None:
    """Have names on the disk, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        sync(handle, folder / ".")
    finally:
        os.close(handle)


def _say_once(text: str, path: Path) -> None:
    if text not in _said:
        _said.add(text)
        sys.stderr.write(f"{path.parent}: {text}\n")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Failures of the disk, as a person is told them."""
    try:
        yield
    except OSError as error:
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
