"""What loops over many records do once, whatever the records are."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """No search for cycles within: records make none, and each search goes through all that are held.

    Not for loops that call functions of the user's, whose cycles would stay.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
