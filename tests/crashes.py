"""Commands that crash at every write: a disk that counts what is done to it, and strikes at the k-th operation.

A scenario runs in this process. Every open for writing, write, fsync, rename, unlink, truncation and new folder below
its own folder is counted, and every reply of the endpoint. At the k-th one it is struck in one of these ways:

    kill    the process is dead before it: nothing that follows has an effect, no handler's either
    torn    dead in the middle of it: half of a write is there; anything else was done
    full    the disk takes half of this write, and nothing more until the command has ended
    error   the disk answers EIO, once

Then the same command runs again, on a disk that works. Not covered: power cuts, at which what was never synced goes.
"""

import errno
import os
import random
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from dpo_cli.data import files
from dpo_cli.endpoint import dialect
from dpo_cli.endpoint.http import Connection
from dpo_cli.errors import UserError

WAYS = ("kill", "torn", "full", "error")
BY_PATH = ("replace", "rename", "unlink", "remove", "mkdir", "rmdir")
BY_HANDLE = ("write", "fsync", "ftruncate")


class Crash(BaseException):
    """The process has ended."""


class Disk:
    """Counts operations below a folder, and strikes one of them. A context manager.

    Args:
        folder: whose operations are counted.
        point: which one is struck, from 0; None: none is.
        way: how, one of `WAYS`.

    `done` are the operations so far, by name and file.
    """

    def __init__(self, folder: Path, point: int | None = None, way: str = "kill") -> None:
        self.done: list[str] = []
        self._folder = str(folder)
        self._point = point
        self._way = way
        self._dead = self._full = False
        self._opened: set[int] = set()
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for name in BY_PATH:
            self._patches.setattr(os, name, self._by_path(name, getattr(os, name)))
        for name in BY_HANDLE:
            self._patches.setattr(os, name, self._by_handle(name, getattr(os, name)))
        self._patches.setattr(os, "open", self._open(os.open))
        self._patches.setattr(Connection, "send", self._reply(Connection.send))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patches.undo()
        for handle in self._opened:  # as the kernel does for a dead process, locks included
            if self._path_of(handle).startswith(self._folder):
                os.close(handle)

    def _strikes(self, operation: str, path: str) -> bool:
        """Count an operation; whether it is the one that is struck."""
        if self._dead:
            raise Crash
        self.done.append(f"{operation} {_plain(path, self._folder)}")
        return len(self.done) - 1 == self._point

    def _watches(self, path: str) -> bool:
        return path.startswith(self._folder) and threading.current_thread() is threading.main_thread()

    def _by_path(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operate(path: Any, *more: Any, **options: Any) -> Any:
            where = os.fspath(path)
            if options.get("dir_fd") is not None or not self._watches(str(where)):
                return real(path, *more, **options)
            if not self._strikes(name, str(where)):
                return real(path, *more, **options)
            return self._strike(name, str(where), lambda: real(path, *more, **options))

        return operate

    def _by_handle(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operate(handle: Any, *more: Any) -> Any:
            path = self._path_of(handle)
            if not self._watches(path):
                return real(handle, *more)
            if self._full and name == "write":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if not self._strikes(name, path):
                return real(handle, *more)
            if name == "write" and self._way in ("torn", "full"):
                half = bytes(more[0])[: len(more[0]) // 2]
                written = real(handle, half) if half else 0
                self._dead, self._full = self._way == "torn", self._way == "full"
                if self._dead:
                    raise Crash
                return written or _refuse(errno.ENOSPC)
            return self._strike(name, path, lambda: real(handle, *more))

        return operate

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def operate(path: Any, flags: int, *more: Any, **options: Any) -> int:
            where = os.fspath(path)
            if not self._watches(str(where)) or options.get("dir_fd") is not None:
                return real(path, flags, *more, **options)
            if flags & os.O_CREAT:
                if self._full and not Path(where).exists():
                    _refuse(errno.ENOSPC)
                if self._strikes("open", str(where)):
                    self._strike("open", str(where), lambda: os.close(real(path, flags, *more, **options)))
            handle = real(path, flags, *more, **options)
            self._opened.add(handle)
            return handle

        return operate

    def _reply(self, real: Callable[..., Any]) -> Callable[..., Any]:
        async def send(connection: Connection, method: str, path: str, **content: Any) -> bytes:
            if self._dead:
                raise Crash
            reply: bytes = await real(connection, method, path, **content)
            if self._strikes("reply", f"{self._folder}{path}"):
                self._strike("reply", path, lambda: None)
            return reply

        return send

    def _strike(self, name: str, path: str, operate: Callable[[], Any]) -> Any:
        if self._way == "torn":
            operate()
        if self._way in ("kill", "torn"):
            self._dead = True
            raise Crash
        if name == "reply":
            return operate()
        if self._way == "full":
            self._full = True
            return (
                operate() if name in ("unlink", "remove", "rename", "replace", "ftruncate") else _refuse(errno.ENOSPC)
            )
        return _refuse(errno.EIO)

    @staticmethod
    def _path_of(handle: int) -> str:
        try:
            return str(Path(f"/proc/self/fd/{handle}").readlink()).removesuffix(" (deleted)")
        except OSError:
            return ""


@dataclass
class Scenario:
    """A command and what must come of it.

    Args:
        name: what the tests call it.
        prepare: makes its inputs in a folder.
        command: runs it there.
        result: what is in the folder afterwards, in whatever order it came.
        forget: makes the endpoint forget all calls.
        paid_twice: what was paid twice.
        in_flight: how many requests may be, at a crash.
        look: looks at the folder right after the crash; raises for what nobody may ever see.
    """

    name: str
    prepare: Callable[[Path], None]
    command: Callable[[Path], Any]
    result: Callable[[Path], Any]
    forget: Callable[[], None] = lambda: None
    paid_twice: Callable[[], int] = lambda: 0
    in_flight: int = 0
    look: Callable[[Path], None] = lambda folder: None
    faults: list[str] = field(default_factory=list)

    def operations(self, folder: Path) -> list[str]:
        """What an undisturbed run does, and the result to which every other must come."""
        self._start(folder)
        with Disk(folder) as disk:
            self.command(folder)
        self.expected, self.left = self.result(folder), names(folder)
        return disk.done

    def strike(self, folder: Path, point: int, way: str) -> str:
        """Strike one operation, run the command again, and note what is wrong then; the operation."""
        self._start(folder)
        failure = None
        with Disk(folder, point, way) as disk:
            try:
                self.command(folder)
            except (Crash, UserError):
                pass
            except BaseException as error:
                failure = _told(error)
        operation = disk.done[point] if point < len(disk.done) else "nothing"
        if failure is not None:
            self._note(failure, way, operation)
        try:
            self.look(folder)
        except AssertionError as error:
            self._note(f"right after it: {error}", way, operation)
        dialect.forget()
        try:
            self.command(folder)
        except BaseException as error:
            self._note(f"again: {_told(error)}", way, operation)
            return operation
        if (result := self.result(folder)) != self.expected:
            self._note(f"other rows: {_difference(result, self.expected)}", way, operation)
        if stale := [name for name in names(folder) if name not in self.left and not name.endswith(".sent")]:
            self._note(f"left behind: {', '.join(stale)}", way, operation)
        if (twice := self.paid_twice()) > self.in_flight:
            self._note(f"{twice} paid twice", way, operation)
        return operation

    def _start(self, folder: Path) -> None:
        self.forget()
        dialect.forget()
        files._said.clear()
        folder.mkdir()
        self.prepare(folder)

    def _note(self, what: str, way: str, operation: str) -> None:
        self.faults.append(f"{self.name}, {way} at {operation}: {what}")


def points(operations: list[str], share: float, seed: int) -> Iterator[tuple[int, str]]:
    """Every operation in every way, or a share of them: of each kind of operation at least one in each way."""
    draw = random.Random(seed)
    seen: Counter[tuple[str, str]] = Counter()
    for point, operation in enumerate(operations):
        for way in WAYS:
            if operation.startswith("reply") and way in ("full", "error"):
                continue  # an endpoint's faults are tested elsewhere
            kind = f"{operation.partition(' ')[0]} {operation.rpartition('/')[2]}"
            seen[kind, way] += 1
            if seen[kind, way] == 1 or draw.random() < share:
                yield point, way


def names(folder: Path) -> list[str]:
    """Files below a folder, without what is different each time in their names."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if not name.endswith(".lock"))


def _told(error: BaseException) -> str:
    frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
    return f"{type(error).__name__}: {error} ({' '.join(frames[-4:])})"


def _refuse(code: int) -> Any:
    raise OSError(code, os.strerror(code))


def _plain(path: str, folder: str) -> str:
    """A path without what is different each time: `.rows.jsonl.NEW`."""
    return re.sub(r"\.[0-9a-f]{8}\.new$", ".NEW", path.removeprefix(folder).lstrip("/"))


def _difference(result: Any, expected: Any) -> str:
    if isinstance(result, dict) and isinstance(expected, dict):
        keys = [key for key in result.keys() | expected.keys() if result.get(key) != expected.get(key)]
        return f"{len(result)} of {len(expected)}, {len(keys)} differ"
    return f"{result!r:.200} instead of {expected!r:.200}"
