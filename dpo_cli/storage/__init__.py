"""Where files are sent to and fetched from: one module a scheme, `gs` for `gs://…`; a path without one is a folder.

Only what isn't there, by the service's own checksum, is sent; so the same command after a kill sends the rest, and
after a success nothing. Where a service can't take all files at once, a marker `COMPLETE`, which holds their hashes, is
removed first and sent last. Files that are there and not among those sent stay. Within one file nothing resumes, but
for the parts that Modal and the Hub keep of their own accord.
"""

import pkgutil
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Protocol, TypeAlias, cast

from msgspec import Struct

from dpo_cli.errors import UserError, require

COMPLETE = "COMPLETE"
CHUNK = 1 << 20
MEGABYTE = 1_000_000
EXTRAS = {"gs": "gcs", "hf": "hub", "modal": "modal"}

Source: TypeAlias = Path | bytes  # a file, or the content of one
Done: TypeAlias = Callable[[int], None]  # is told of bytes as they go


class Stored(Struct):
    """A file that is there: its bytes, and its checksum as `kind:value`, where one is known."""

    size: int
    checksum: str | None


class PutResult(Struct, kw_only=True):
    """What went to `dest`, or in a dry run would: file name -> bytes; `bytes` is the sum of those sent."""

    dest: str
    sent: dict[str, int]
    skipped: dict[str, int]
    bytes: int
    dry_run: bool = False


class Fetched(Struct, kw_only=True):
    """What came into `folder`, and what was there before: file name -> bytes; `bytes` is the sum of those fetched."""

    folder: str
    fetched: dict[str, int]
    skipped: dict[str, int]
    bytes: int


class Storage(Protocol):
    """What `connect(place)` of a scheme's module returns; its methods raise UserError with the command that mends it.

    `atomic`: all files of one `send` appear at once, so that none needs to mark the others as complete.
    """

    atomic: bool

    def listing(self) -> dict[str, Stored]:
        """Every file by its name relative to the place; none where nothing was ever sent."""

    def send(self, files: Mapping[str, Source], done: Done) -> None:
        """Send files in their order, replacing those of their names."""

    def receive(self, name: str, path: Path, done: Done) -> None:
        """Write a file that is listed to a new path."""

    def remove(self, name: str) -> None:
        """Remove a file that is listed."""


def names() -> list[str]:
    """Every scheme."""
    others = ("folder", "sync")
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in others)


def connect(dest: str) -> Storage:
    """What is behind `scheme://place`, or a folder.

    Raises:
        UserError: unknown scheme, or its library is not installed.
    """
    scheme, separator, place = dest.partition("://")
    if not separator:
        scheme, place = "folder", dest
    elif scheme not in names():
        raise UserError(
            f"nothing is sent to '{dest}'", hint=f"a folder, or {', '.join(f'{name}://…' for name in names())}"
        )
    if scheme in EXTRAS:
        require(EXTRAS[scheme], f"{scheme}://")
    return cast(Storage, import_module(f"{__name__}.{scheme}").connect(place))
