"""One timer for all requests of a session: aiohttp's own `total` sets one for each, which costs 3% of a request.

As all have the same time, they end in the order in which they began, and only the first end is waited for.
"""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlines:
    """Cancels what takes too long, as `asyncio.timeout` does.

    Args:
        seconds: that each has.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._ends: dict[asyncio.Task[Any], float] = {}  # of who is in time, by the loop's clock, the first end first
        self._timer: asyncio.TimerHandle | None = None

    async def within(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; one at a time in each task.

        Raises:
            TimeoutError: it took too long, and was cancelled.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        cancelled_before = task.cancelling()
        self._ends[task] = end = loop.time() + self._seconds
        if self._timer is None:
            self._timer = loop.call_at(end, self._cancel_late)
        try:
            return await work
        except BaseException as error:
            late = task not in self._ends
            if not late or task.uncancel() > cancelled_before or not isinstance(error, asyncio.CancelledError):
                raise
            raise TimeoutError from error
        finally:
            self._ends.pop(task, None)

    def _cancel_late(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        for task, end in list(self._ends.items()):
            if end > loop.time():
                self._timer = loop.call_at(end, self._cancel_late)
                return
            del self._ends[task]
            task.cancel()

    def close(self) -> None:
        """Wait for nobody's end any more."""
        if self._timer is not None:
            self._timer.cancel()
