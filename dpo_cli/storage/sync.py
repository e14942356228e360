"""Sending and fetching what is not there yet, whatever the storage: compared by the service's own checksum."""

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from dpo_cli.data.files import disk_error
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Progress
from dpo_cli.storage import CHUNK, COMPLETE, MEGABYTE, Done, Fetched, PutResult, Source, Storage, Stored, connect


def put(
    files: Mapping[str, Source],
    dest: str,
    progress: Progress,
    *,
    dry_run: bool = False,
    known: Mapping[str, Stored] | None = None,
) -> PutResult:
    """Send files, except those that are there already.

    Args:
        files: name relative to `dest`, with slashes -> file or content.
        dest: `scheme://place`, or a folder.
        progress: told of megabytes.
        dry_run: compare, and send nothing.
        known: what `hashed` gave of some of them, which are not read again for it.

    Raises:
        UserError: the place is missing, closed to us or full.
    """
    storage = connect(dest)
    there = storage.listing()
    if not storage.atomic:
        known = known or {}
        files = {**files, COMPLETE: manifest({name: known.get(name) or hashed(files[name]) for name in files})}
    sizes = {name: size_of(source) for name, source in files.items()}
    missing = {name: source for name, source in files.items() if not _is_same(source, there.get(name))}
    skipped = {name: size for name, size in sizes.items() if name not in missing}
    if missing and not dry_run:
        if COMPLETE in there:
            storage.remove(COMPLETE)
        with _counted(progress, "push", sum(sizes.values()), sum(skipped.values())) as done:
            storage.send(missing, done)
    sent = {name: sizes[name] for name in missing}
    return PutResult(dest=dest, sent=sent, skipped=skipped, bytes=sum(sent.values()), dry_run=dry_run)


def get(dest: str, folder: Path, progress: Progress, wanted: Callable[[str], bool] = lambda name: True) -> Fetched:
    """Fetch files, except those that are there already; each appears whole, and with the checksum that it should have.

    Args:
        dest: where they are, `scheme://place` or a folder. Of a place with a marker, what it lists is fetched.
        folder: where they go.
        progress: told of megabytes.
        wanted: which files are fetched, by their names.

    Raises:
        UserError: nothing is there, or a file is not what was sent; or the disk is full.
    """
    storage = connect(dest)
    there = storage.listing()
    if COMPLETE in there:
        there = _listed(storage, there, dest, folder)
    if not there:
        raise UserError("nothing is there", where=dest)
    there = {name: stored for name, stored in there.items() if wanted(name)}
    _check_names(there, dest)
    missing = {name: stored for name, stored in there.items() if not _is_same(folder / name, stored)}
    skipped = {name: stored.size for name, stored in there.items() if name not in missing}
    total = sum(stored.size for stored in there.values())
    with _counted(progress, "fetch", total, sum(skipped.values())) as done:
        for name, stored in missing.items():
            _receive(storage, name, stored, folder / name, done)
    fetched = {name: stored.size for name, stored in missing.items()}
    return Fetched(folder=str(folder), fetched=fetched, skipped=skipped, bytes=sum(fetched.values()))


def digest(kind: str, source: Source) -> str:
    """Checksum of a file or content: `sha256` in hex, `git` blob hash in hex, or `crc32c` in base64, as services have.

    Raises:
        UserError: the file can't be read.
    """
    counted: Any
    if kind == "crc32c":
        import google_crc32c

        counted = google_crc32c.Checksum()  # type: ignore[no-untyped-call]
    else:
        counted = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size_of(source)}\0".encode())
    for block in blocks(source):
        counted.update(block)
    return base64.b64encode(counted.digest()).decode() if kind == "crc32c" else str(counted.hexdigest())


def blocks(source: Source) -> Iterator[bytes]:
    """What a file or content holds, in parts of at most a MiB.

    Raises:
        UserError: the file can't be read.
    """
    if isinstance(source, bytes):
        yield source
        return
    try:
        with source.open("rb") as file:
            while block := file.read(CHUNK):
                yield block
    except OSError as error:
        raise UserError(error.strerror or str(error), where=str(source)) from None


def size_of(source: Source) -> int:
    """Bytes of a file or content."""
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _is_same(source: Source, stored: Stored | None) -> bool:
    """Whether a file is the one that is stored; one of which no checksum is known counts as another."""
    if stored is None or stored.checksum is None or (isinstance(source, Path) and not source.is_file()):
        return False
    kind, _, value = stored.checksum.partition(":")
    return size_of(source) == stored.size and digest(kind, source) == value


def hashed(source: Source) -> Stored:
    """Size and SHA-256 of a file or content."""
    return Stored(size_of(source), f"sha256:{digest('sha256', source)}")


def manifest(files: Mapping[str, Stored]) -> bytes:
    """The content of a marker: the files that it is for."""
    return msgspec.json.format(msgspec.json.encode(files, order="deterministic"), indent=1) + b"\n"


def read_manifest(content: bytes, where: str) -> dict[str, Stored]:
    """What a marker lists.

    Raises:
        UserError: it is no marker of ours.
    """
    try:
        return msgspec.json.decode(content, type=dict[str, Stored])
    except msgspec.MsgspecError as error:
        raise UserError(f"not a list of files: {error}", where=where) from None


def _listed(storage: Storage, there: Mapping[str, Stored], dest: str, folder: Path) -> dict[str, Stored]:
    """What the marker lists, all of which must be there."""
    path = folder / f".{COMPLETE}.part"
    _receive(storage, COMPLETE, Stored(there[COMPLETE].size, None), path, lambda size: None)
    listed = read_manifest(path.read_bytes(), f"{dest}/{COMPLETE}")
    path.unlink()
    _check_names(listed, dest)
    for name in listed.keys() - there.keys():
        raise UserError(f"{name} is gone, and {COMPLETE} lists it", where=dest, hint="push it again")
    return listed


def _check_names(names: Iterable[str], dest: str) -> None:
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"a file is named '{name}', which leads out of the folder", where=dest)


def _receive(storage: Storage, name: str, stored: Stored, path: Path, done: Done) -> None:
    """Fetch one file beside its place, check it, and put it there."""
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.unlink(missing_ok=True)
        storage.receive(name, part, done)
        if part.stat().st_size != stored.size or (stored.checksum and not _is_same(part, stored)):
            raise UserError(
                f"{name} is not what was sent: its size or checksum differs",
                where=str(path),
                hint="the same command again; if it stays so, push it again",
                code=Exit.FAILED,
            )
        part.replace(path)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _counted(progress: Progress, stage: str, total: int, before: int) -> Iterator[Done]:
    """A callback for bytes that go, told to `progress` in whole megabytes, or kilobytes where there are few."""
    count = before
    unit, name = (MEGABYTE, "MB") if total >= 10 * MEGABYTE else (MEGABYTE // 1000, "kB")

    def done(size: int) -> None:
        nonlocal count
        count = min(total, count + size)  # what is sent again after a fault is not counted again
        progress.update(round(count / unit), megabytes=(count - before) / MEGABYTE)

    progress.begin(f"{stage} {name}", round(total / unit), round(before / unit))
    try:
        yield done
    finally:
        progress.end()
