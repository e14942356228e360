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


@contextmanager
def rare_collection() -> Iterator[None]:
    """A search for cycles per 10,000 new objects instead of 700 within.

    For loops with hundreds of requests in flight: all that belongs to them outlives the next searches, which go through
    it in vain.
    """
    before = gc.get_threshold()
    gc.set_threshold(10_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
