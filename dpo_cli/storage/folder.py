"""A folder: where files go that need no service. Not covered: two commands that push to one folder at once."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from dpo_cli.data.files import write_file
from dpo_cli.errors import UserError
from dpo_cli.storage import Done, Source, Stored
from dpo_cli.storage.sync import blocks, hashed


class Folder:
    """Files of a folder; names that begin with a dot are not ours."""

    atomic = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def listing(self) -> dict[str, Stored]:
        if self.path.exists() and not self.path.is_dir():
            raise UserError("is a file, not a folder", where=str(self.path))
        files = [file for file in self.path.rglob("[!.]*") if file.is_file()]
        return {file.relative_to(self.path).as_posix(): hashed(file) for file in files}

    def send(self, files: Mapping[str, Source], done: Done) -> None:
        for name, source in files.items():
            _write(source, self.path / name, done)

    def receive(self, name: str, path: Path, done: Done) -> None:
        _write(self.path / name, path, done)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()


def connect(place: str) -> Folder:
    """The folder, which need not exist."""
    return Folder(Path(place).expanduser())


def _write(source: Source, path: Path, done: Done) -> None:
    """Copy to a temporary name and rename, so that no reader sees a part of it."""

    def counted() -> Iterator[bytes]:
        for block in blocks(source):
            yield block
            done(len(block))

    write_file(path, counted())
