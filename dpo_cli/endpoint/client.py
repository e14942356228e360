"""Client of an OpenAI-compatible endpoint: concurrency that adapts, retries, a budget, and no call paid twice.

Reads and writes a ledger of paid replies: a reply is appended before it is returned, and a request whose answer stands
there is answered from it. Speaks HTTP through aiohttp rather than the OpenAI SDK, which costs eight times the CPU time
a request, nearly five times with its aiohttp transport (`tests/bench/clients.py`), and retries timed-out, perhaps paid
requests unasked. Images are not covered.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
from msgspec import Struct

from dpo_cli.data.bulk import rare_collection
from dpo_cli.data.records import Usage, content_id
from dpo_cli.endpoint.budget import Budget, estimate_tokens, is_plausible, output_cap
from dpo_cli.endpoint.concurrency import Pace, allowed_sockets
from dpo_cli.endpoint.costs import Estimate, Receipt, estimate
from dpo_cli.endpoint.http import CHAT, COMPLETIONS, Connection, Rejected, Retryable, TooLong, Unreachable, json_data
from dpo_cli.endpoint.in_flight import InFlight
from dpo_cli.endpoint.ledger import Ledger
from dpo_cli.endpoint.prices import Price, Tier, is_local, price_of
from dpo_cli.endpoint.responses import (
    ADVICE,
    FILTERED,
    Choice,
    ErrorReply,
    Reply,
    Unreadable,
    one_line,
    read_reply,
    read_usage_of,
)
from dpo_cli.errors import Exit, UserError

__all__ = [
    "COMPLETIONS", "Choice", "Endpoint", "Estimate", "Price", "Receipt", "Rejected", "Reply", "Tier", "estimate",
    "is_local", "output_cap", "price_of",
]  # fmt: skip

T = TypeVar("T")

ATTEMPTS = 8  # of a request that the server refuses for now
RESENDS = 4  # of a request that may have been paid: timed out, cut off or answered with no JSON
NO_ANSWER_IN_A_ROW = 10  # paid replies without an answer: the next would be without one, too
LOST_IN_A_ROW = 10  # requests given up without one answer between them: the endpoint is broken, not the requests
START_SECONDS = 1.0  # patience with a server that never answered
RESTART_SECONDS = 300.0  # patience with one that did
DRAIN_SECONDS = 10.0  # what is in flight at a fatal fault may still arrive, and be kept, that long
MAX_WAIT_SECONDS = 120.0  # longest Retry-After that is obeyed
MAX_BACKOFF_SECONDS = 30.0
LONG_SECONDS = 5.0  # waits that are worth a line in the log

# What does not change the reply, and so not its key.
_TRANSPORT_KEYS = frozenset(("stream", "stream_options", "service_tier"))


class Endpoint:
    """Async context manager around one endpoint and the ledger of its paid replies.

    Args:
        url: base URL, usually ending in `/v1` (which is added where there is no path).
        api_key_variable: environment variable that holds the key; None: no key is sent.
        ledger: the JSONL file of paid replies; one process at a time.
        concurrency: most requests in flight.
        timeout: seconds to wait for one reply.
        price: of a model's calls; where it is None, no dollars are counted.
        max_usd: most dollars that this run may spend on new calls; None: no limit.
        api_key_required: whether to ask for a key that is not set before an endpoint elsewhere does.
        log: told in a line about long waits.

    `spend` is what was asked and paid so far.

    Raises:
        UserError: the URL is none, or a required key is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_variable: str | None,
        ledger: Path,
        concurrency: int,
        timeout: float,
        price: Callable[[str], Price | None] = lambda _: None,
        max_usd: float | None = None,
        api_key_required: bool = True,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.connection = Connection(url, api_key_variable, api_key_required, timeout, log)
        self.url = self.connection.url
        self.spend = Receipt()
        self.budget = Budget(max_usd)
        self._place = self.url.partition("://")[2]
        self._price = cache(price)
        self._log = log
        self._pace = Pace(allowed_sockets(concurrency))
        self._ledger = Ledger(ledger)
        self._sent = InFlight(ledger)
        self._fatal: BaseException | None = None
        self._down: tuple[int, float] | None = None  # responses so far, and since when there are no more
        self._lost = 0
        self._without_answer = 0
        self._miscounted = False

    @property
    def in_flight(self) -> int:
        """Requests that wait for their reply."""
        return self._pace.in_flight

    async def __aenter__(self) -> Self:
        self._ledger.open()
        try:
            self._sent.open(answered=self._ledger)
        except BaseException:
            self._ledger.close()
            raise
        await self.connection.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.connection.__aexit__(kind, error, trace)
        if error is not None and self.spend.calls:
            self._log(f"until it stopped: {self.spend.in_words()}")
        try:
            self._sent.close()
        finally:
            self._ledger.close()

    async def chat(self, body: dict[str, Any], replicate: int = 0, *, path: str = CHAT, final: bool = True) -> Reply:
        """Send a chat completion request, unless its reply is in the ledger.

        Args:
            body: the request's JSON.
            replicate: tells apart requests of the same body that shall each be paid.
            path: `COMPLETIONS` for a completion of a bare prompt instead.
            final: whether this is the request's last form; else a server error that may be a refusal counts as one.

        Raises:
            Rejected: the endpoint refuses this request, or does not answer it.
            UserError: nothing more can be sent: bad key, bad path, no quota, no budget, no server, full disk.
        """
        key, reply = self.recall(body, replicate)
        if reply is not None:
            self.spend.reused += 1
            return reply
        price = self._price(body["model"])
        try:
            reply = await self._ask(key, body, price, path, final)
        except Rejected:
            self.spend.failed += final
            raise
        self.record(key, reply)
        self._sent.answered(key)
        self._watch(reply, bool(body.get("tools")))
        if reply.unreadable:
            self.spend.failed += 1
            raise Rejected(0, self.kept(reply))
        return reply

    def recall(self, body: dict[str, Any], replicate: int = 0) -> tuple[str, Reply | None]:
        """The key of a request, and its reply if that was paid before and holds an answer."""
        content = body
        if not _TRANSPORT_KEYS.isdisjoint(body):
            content = {name: value for name, value in body.items() if name not in _TRANSPORT_KEYS}
        key = content_id(content, self._place, replicate)
        return key, self._ledger.get(key, bool(body.get("tools")))

    def record(self, key: str, reply: Reply) -> bool:
        """Keep a paid reply and count it, unless it is in the ledger; return whether it was new.

        Raises:
            UserError: the disk is full.
        """
        if not self._ledger.put(key, reply):
            return False
        self.spend.calls += 1
        self.spend.usage += reply.usage
        self.spend.usd += reply.usd
        return True

    def kept(self, reply: Reply) -> str:
        """What is said of a reply that was paid and can't be read."""
        return f"the reply can't be read ({reply.unreadable}); it is kept in {self._ledger.path.name}"

    def understand(self, content: bytes, path: str = CHAT) -> Reply:
        """What a paid response says; if it can't be read, a reply without choices that says why.

        Raises:
            Exception: what an error in its place means.
            ValueError: it is no JSON.
        """
        try:
            reply = read_reply(content)
        except ErrorReply as wrapped:  # some proxies wrap an error into a 200
            error = wrapped.error
            if error.code and error.code.isdigit() and int(error.code) >= 400:
                raise self.connection.fault(path, int(error.code), error) from None
            raise Rejected(200, one_line(error.message) or "an error without words", error.param, error.code) from None
        except Unreadable as error:
            usage, counted = read_usage_of(content)
            reply = Reply([], usage, counted=counted, unreadable=one_line(str(error)))
        if reply.lacks():
            reply.raw = content.decode("utf-8", "replace")
        return reply

    def price(self, reply: Reply, size: int, output: int | None, price: Price | None) -> None:
        """Count what a reply cost; by our own estimate where the endpoint's count can't be right.

        Args:
            reply: its usage and dollars are set.
            size: bytes of the request.
            output: the most tokens that it asked for; None: no limit.
            price: of the model.
        """
        if not is_plausible(reply, size, output):
            if not self._miscounted:
                self._miscounted = True
                said = f"{reply.usage.input:,} in, {reply.usage.output:,} out" if reply.counted else "missing or none"
                self._log(f"{self.url} counts tokens that can't be right ({said}); our own estimate stands in for them")
            reply.usage = Usage(self.budget.tokens(size), 0, estimate_tokens(reply))
        reply.usd = price.usd(reply.usage) if price else 0.0

    def _watch(self, reply: Reply, tools: bool) -> None:
        """Stop where nothing but replies without an answer comes back.

        Raises:
            UserError: so many came in a row.
        """
        kind = reply.unreadable or reply.lacks(tools)
        if kind is None or kind == FILTERED:
            self._without_answer = 0
            return
        self._without_answer += 1
        if self._without_answer == NO_ANSWER_IN_A_ROW:
            raise UserError(
                f"{NO_ANSWER_IN_A_ROW} replies in a row are no answers: {kind}",
                where=self.url,
                hint=ADVICE.get(kind, "everything paid is kept; is it a server of chat completions?"),
                code=Exit.FAILED,
            )

    async def models(self) -> dict[str, str]:
        """The day on which each served model ends, empty where none is announced; no models if it does not say."""
        try:
            listing = msgspec.json.decode(await self.connection.send("GET", "/models"), type=_Models)
        except (Unreachable, Retryable, Rejected, UserError, msgspec.MsgspecError):
            return {}
        return {one_line(model.id): str(model.shutdown_date or "") for model in listing.data}

    async def each(self, items: Iterable[T], handle: Callable[[T], Awaitable[None]]) -> None:
        """Handle every item, at most `concurrency` at once, taking them as they are needed.

        Raises:
            BaseException: the first that `handle` raised; nothing more is sent, and what is in flight gets
                `DRAIN_SECONDS` to arrive. When cancelled, what is in flight is dropped at once.
        """
        source = iter(items)

        async def work() -> None:
            for item in source:
                await handle(item)

        workers = [asyncio.create_task(work()) for _ in range(self._pace.most)]
        try:
            with rare_collection():
                finished, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            fatal = next((error for worker in finished if (error := worker.exception())), None)
            if fatal is not None:
                self._fatal = fatal
                await self._drain()
                raise fatal
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _drain(self) -> None:
        end = time.monotonic() + DRAIN_SECONDS
        while self._pace.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def _ask(self, key: str, body: dict[str, Any], price: Price | None, path: str, final: bool) -> Reply:
        """Send until there is a reply, a refusal, or no patience left."""
        content = msgspec.json.encode(body)
        attempts = resends = 0
        while True:
            pause = 0.0
            try:
                worst = self.budget.worst(body, len(content), price)
                return await self._attempt(key, content, worst, price, path, output_cap(body))
            except Unreachable as fault:
                self._bear_with(fault)
            except Retryable as fault:
                if fault.refusal is not None and not final:
                    raise fault.refusal from None
                attempts += 1
                resends += fault.paid
                if attempts == ATTEMPTS or resends > RESENDS:
                    if fault.content:  # what it cost is among what is unseen
                        self._ledger.put(key, Reply([], Usage(), raw=fault.content.decode("utf-8", "replace")))
                    self._give_up(fault)
                self.spend.resent += fault.paid
                if fault.after is not None:
                    self._obey(min(fault.after, MAX_WAIT_SECONDS))
                else:
                    pause = random.uniform(0.5, 1) * min(MAX_BACKOFF_SECONDS, 0.5 * 2**attempts)
            self.spend.retries += 1
            await asyncio.sleep(pause)

    async def _attempt(
        self, key: str, content: bytes, worst: float, price: Price | None, path: str, output: int | None
    ) -> Reply:
        """Send once, within the budget; what it may cost is set aside until that is known."""
        await self.budget.reserve(worst)
        paid, lost = 0.0, False
        try:
            sent = await self._pace.enter()
            try:
                if self._fatal is not None:
                    raise self._fatal
                self.spend.interrupted += self._sent.begin(key)
                lost = True
                reply = self._read(await self.connection.send("POST", path, data=json_data(content)), path)
            except Retryable as fault:
                lost = fault.paid
                if fault.congestion:
                    self._pace.cut(sent)
                raise
            except (Unreachable, Rejected, UserError) as fault:
                lost = isinstance(fault, TooLong)
                raise
            finally:
                self._pace.leave()
            lost = False
            self._lost = 0
            self._pace.grow()
            self.price(reply, len(content), output, price)
            self.budget.learn(len(content), reply.usage.input)
            paid = reply.usd
            return reply
        finally:
            if lost:
                self._sent.lose(key)
                self.budget.lose(worst)
                self.spend.unseen_usd = self.budget.unseen
            else:
                self._sent.end(key)
                self.budget.settle(worst, paid)

    def _obey(self, seconds: float) -> None:
        """Nobody sends before Retry-After is over."""
        if self._pace.hold(seconds) and seconds >= LONG_SECONDS:
            self._log(f"{self.url} asks to wait {seconds:.0f} s")

    def _give_up(self, fault: Retryable) -> None:
        self._lost += 1
        if self._lost == LOST_IN_A_ROW:
            raise UserError(
                f"{self._lost} requests in a row got no answer; the last: {fault}",
                where=self.url,
                hint="everything paid is kept: run the same command again",
                code=Exit.FAILED,
            )
        raise Rejected(fault.status, str(fault))

    def _bear_with(self, fault: Unreachable) -> None:
        """Wait for a server that restarts; not for one that was never there.

        Raises:
            UserError: it has been away for too long.
        """
        now = time.monotonic()
        answered = self.connection.responses
        if self._down is None or self._down[0] != answered:
            self._down = (answered, now)
            if answered:
                self._log(f"{self.url} is gone; waiting up to {RESTART_SECONDS:.0f} s for it to come back")
        if now - self._down[1] > (RESTART_SECONDS if answered else START_SECONDS):
            hint = "run the same command again once it is back" if answered else "is the server running?"
            raise UserError(f"no connection: {fault}", where=self.url, hint=hint, code=Exit.FAILED)
        self._pace.hold(random.uniform(0.25, 0.5))

    def _read(self, body: bytes, path: str) -> Reply:
        """What a successful response says.

        Raises:
            Retryable: it is no JSON: cut off, perhaps.
            UserError: it is a web page.
        """
        try:
            return self.understand(body, path)
        except ValueError as error:
            if body.lstrip()[:1] == b"<":
                hint = "the URL is the one before /chat/completions, most often ending in /v1"
                raise UserError("it answers with a web page", where=self.url, hint=hint) from None
            said = f"the reply is no chat completion: {error}"
            raise Retryable(200, said, paid=True, content=body) from None


class _Model(Struct):
    id: str
    shutdown_date: Any = None


class _Models(Struct):
    data: list[_Model]
