"""The requests whose outcome is unknown: a list beside the ledger that outlives a kill.

A line is written before a request is sent; a run that ends in its own way leaves only those that it still had in
flight, most often none and no file. A request that stands there and is sent again may be paid twice.
"""

import os
from collections.abc import Container
from pathlib import Path

from dpo_cli.data.files import PRIVATE, disk_error, explained, write_all, write_file


class InFlight:
    """Keys of requests that were sent and not seen to end, by this run and by former ones.

    Args:
        ledger: the ledger, whose lock keeps other processes out.
    """

    def __init__(self, ledger: Path) -> None:
        self._path = ledger.with_suffix(".sent")
        self._unknown: set[str] = set()
        self._open: set[str] = set()
        self._lost: set[str] = set()
        self._file = -1

    def open(self, answered: Container[str]) -> None:
        """Read what former runs left, except what was `answered`.

        Raises:
            UserError: the folder can't be written.
        """
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, PRIVATE)
        except OSError as error:
            raise disk_error(error, self._path) from error
        text = os.pread(self._file, os.fstat(self._file).st_size, 0).decode("ascii", "ignore")
        self._unknown = {key for key in text.split("\n") if key and key not in answered}

    def begin(self, key: str) -> bool:
        """Note that a request is about to be sent; whether a former run has left it open.

        Raises:
            UserError: the disk is full.
        """
        before = key in self._unknown
        self._unknown.discard(key)
        if key not in self._open:
            self._open.add(key)
            try:
                write_all(self._file, f"{key}\n".encode())
            except OSError as error:
                raise disk_error(error, self._path) from error
        return before

    def end(self, key: str) -> None:
        """This time it was not paid, or its answer is at hand."""
        self._open.discard(key)

    def lose(self, key: str) -> None:
        """Its answer is lost."""
        self._lost.add(key)

    def answered(self, key: str) -> None:
        """Its answer is in the ledger."""
        self._open.discard(key)
        self._lost.discard(key)

    def close(self) -> None:
        """Keep what may have been paid for nothing."""
        os.close(self._file)
        left = self._open | self._lost | self._unknown
        if left:
            write_file(self._path, "".join(f"{key}\n" for key in sorted(left)).encode(), private=True)
            return
        with explained(self._path):
            self._path.unlink(missing_ok=True)
