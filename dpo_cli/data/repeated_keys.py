"""A key that stands twice in an object of JSON: readers keep the last value, and what stood before is lost.

To look at every row would take a fifth to two fifths of the time of decoding it. What writes a key twice does so in
every row: the first rows of a file are looked at, and where one of them has such a key, all that follow.
"""

import json
from typing import Any

from dpo_cli.data.bad_rows import Fault

FIRST = 64  # rows


class RepeatedKeys:
    """Looks for keys that stand twice in the rows of one file, in their order."""

    def __init__(self) -> None:
        self._seen = 0
        self._found = False

    @property
    def looking(self) -> bool:
        """Whether the next row is to be looked at."""
        return self._found or self._seen < FIRST

    def checked(self, text: bytes | str, row: dict[str, Any] | Fault) -> dict[str, Any] | Fault:
        """The row, or that a key stands twice in its text, with different values."""
        self._seen += 1
        if isinstance(row, Fault):
            return row
        try:
            _decode(text if isinstance(text, str) else text.decode("utf-8"))
        except Fault as fault:
            self._found = True
            return Fault(str(fault), row, "keep one of them: the others would be lost")
        except (ValueError, RecursionError):  # what is not read here was read by its own reader
            pass
        return row


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise Fault(f'the key "{key}" stands twice in an object, with different values')
    return found


_decode = json.JSONDecoder(object_pairs_hook=_once).decode
