"""How many requests may be in flight, and when: a limit that adapts, and one gate that all wait at."""

import asyncio
import math
import resource
import time
from collections import deque


class Pace:
    """How many requests may be in flight: additive increase, multiplicative decrease, as in TCP (RFC 5681).

    Until the first sign of congestion the limit grows eightfold a round trip: a server that answered the first ones
    all alike is asked for as much as it may be. Then it grows by a 32nd of what it had reached; a sign cuts it to 0.7
    of what was in flight, at most once a round trip: requests sent before the last cut say nothing new.
    """

    START = 32
    RISE = 7.0  # places that an answer adds before the first sign
    CUT = 0.7

    def __init__(self, most: int) -> None:
        self.most = most
        self.limit = float(min(self.START, most))
        self.in_flight = 0
        self._step = math.inf
        self._last_cut = -math.inf
        self._gate = -math.inf
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> float:
        """Wait for a place, and for the gate; return the time of sending."""
        while True:
            wait = self._gate - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            elif self.in_flight < int(self.limit):
                self.in_flight += 1
                return time.monotonic()
            else:
                place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._waiting.append(place)
                await place

    def leave(self) -> None:
        """Give the place back."""
        self.in_flight -= 1
        self._admit()

    def _admit(self) -> None:
        free = int(self.limit) - self.in_flight
        while free > 0 and self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                free -= 1

    def grow(self) -> None:
        """A request was answered: grow so that a round trip of answers adds one step."""
        rise = self.RISE if self._step == math.inf else min(1.0, self._step / self.limit)
        self.limit = min(self.most, self.limit + rise)
        self._admit()

    def cut(self, sent: float) -> None:
        """A request that was sent at `sent` met congestion."""
        if sent > self._last_cut:
            self._last_cut = time.monotonic()
            reached = min(self.limit, self.in_flight)
            self._step = max(1.0, reached / 32)
            self.limit = max(1.0, self.CUT * reached)

    def hold(self, seconds: float) -> bool:
        """Send nothing for that long; return whether the gate was open before."""
        now = time.monotonic()
        opened = self._gate <= now
        self._gate = max(self._gate, now + seconds)
        return opened


def allowed_sockets(concurrency: int) -> int:
    """Raise the limit on open files as far as the system allows, and keep within it."""
    spare = 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = concurrency + spare
    if soft < want:
        soft = want if hard == resource.RLIM_INFINITY else min(want, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(concurrency, soft - spare))
