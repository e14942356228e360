"""`modal://volume/path`: a Modal volume.

A volume knows its content by hash and takes none twice, but lists no hashes. So each file is committed together with a
list of what has arrived, `INCOMPLETE`, until `COMPLETE` takes its place.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from dpo_cli.errors import Exit, UserError
from dpo_cli.storage import COMPLETE, Done, Source, Stored
from dpo_cli.storage.sync import hashed, manifest, read_manifest, size_of

INCOMPLETE = "INCOMPLETE"
T = TypeVar("T")

CONNECT_SECONDS = 15  # the client alone would try for a minute


class Volume:
    """The files under a path of a volume."""

    atomic = False

    def __init__(self, name: str, path: str) -> None:
        self.name = name
        self.path = path
        self._arrived: dict[str, Stored] = {}
        with self._explained():
            import modal

            self._volume: Any = modal.Volume.from_name(name)
            within(CONNECT_SECONDS, self._volume.hydrate)

    def listing(self) -> dict[str, Stored]:
        from modal.exception import NotFoundError

        with self._explained():
            try:
                found = self._volume.listdir(f"/{self.path}", recursive=True)
            except (FileNotFoundError, NotFoundError):
                return {}
        inside = f"{self.path}/" if self.path else ""
        entries = {entry.path.lstrip("/").removeprefix(inside): entry for entry in found if entry.type.name == "FILE"}
        marker = next((name for name in (COMPLETE, INCOMPLETE) if name in entries), None)
        if marker:
            content = self._read(marker)
            listed = read_manifest(content, f"modal://{self.name}/{inside}{marker}") | {marker: hashed(content)}
            self._arrived = {
                name: stored
                for name, stored in listed.items()
                if name in entries
                and entries[name].size == stored.size
                and entries[name].mtime <= entries[marker].mtime  # not written by another since
            }
        entries.pop(INCOMPLETE, None)
        return {name: self._arrived.get(name, Stored(entry.size, None)) for name, entry in entries.items()}

    def send(self, files: Mapping[str, Source], done: Done) -> None:
        for name, source in files.items():
            self._arrived |= {name: hashed(source)}
            arrived = {key: stored for key, stored in self._arrived.items() if key not in (COMPLETE, INCOMPLETE)}
            with self._explained(), self._volume.batch_upload(force=True) as batch:
                batch.put_file(BytesIO(source) if isinstance(source, bytes) else source, self._full(name))
                if name != COMPLETE:
                    batch.put_file(BytesIO(manifest(arrived)), self._full(INCOMPLETE))
            done(size_of(source))
        if COMPLETE in files:
            self.remove(INCOMPLETE)

    def receive(self, name: str, path: Path, done: Done) -> None:
        with self._explained(), path.open("wb") as file:
            done(self._volume.read_file_into_fileobj(self._full(name), file))

    def remove(self, name: str) -> None:
        with self._explained(), suppress(FileNotFoundError):
            self._volume.remove_file(self._full(name))

    def _full(self, name: str) -> str:
        return f"/{self.path}/{name}" if self.path else f"/{name}"

    def _read(self, name: str) -> bytes:
        content = BytesIO()
        with self._explained():
            self._volume.read_file_into_fileobj(self._full(name), content)
        return content.getvalue()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the client raises, as one line and the command that mends it."""
        from modal import exception

        where, again = f"modal://{self.name}", "the same command again sends what is missing"
        try:
            yield
        except exception.AuthError:
            raise UserError("not logged in to Modal", where=where, hint="modal token new") from None
        except exception.NotFoundError:
            raise UserError("no such volume", where=where, hint=f"modal volume create {self.name}") from None
        except exception.PermissionDeniedError as error:
            raise UserError(" ".join(str(error).split()), where=where, hint="modal profile activate OTHER") from None
        except (exception.Error, TimeoutError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(text, where=where, hint=again, code=Exit.FAILED) from None


def connect(place: str) -> Volume:
    """The files of `volume/path`.

    Raises:
        UserError: no volume is named, there is none of that name, or nobody is logged in.
    """
    name, _, path = place.partition("/")
    if not name:
        raise UserError("no volume is named", where="modal://", hint="modal://VOLUME/PATH")
    return Volume(name, path.strip("/"))


def within(seconds: float, act: Callable[[], T]) -> T:
    """Do something, or give up waiting for it.

    Raises:
        TimeoutError: it has not ended in time.
    """
    returned: list[T] = []
    raised: list[BaseException] = []

    def attempt() -> None:
        try:
            returned.append(act())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"Modal does not answer within {seconds:g} s")
    return returned[0]
