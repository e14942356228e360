"""Client of an OpenAI-compatible endpoint: concurrency that adapts, retries, prices, and no call paid twice.

Reads and writes a ledger of paid replies: a reply is appended before it is returned, and a request whose reply stands
there is answered from it. Speaks HTTP through aiohttp rather than the OpenAI SDK, which costs five times the CPU time a
request (and retries timed-out, perhaps paid requests unasked). Streaming, tools and images are not covered.
"""

import asyncio
import os
import random
import resource
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

import msgspec
from msgspec import Struct

from dpo_cli import __version__
from dpo_cli.endpoint.pace import Pace
from dpo_cli.endpoint.prices import Price, is_local, price_of
from dpo_cli.endpoint.wire import Choice, Error, Reply, one_line, read_error, read_reply, retry_after
from dpo_cli.errors import Exit, UserError
from dpo_cli.schema import Usage, content_id
from dpo_cli.store import Journal, read_latest

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Choice", "Endpoint", "Price", "Rejected", "Reply", "Spend", "is_local", "price_of"]

T = TypeVar("T")

ATTEMPTS = 8  # of a request that the server refuses for now
RESENDS = 4  # of a request that may have been paid: timed out, cut off or answered with no JSON
LOST_IN_A_ROW = 10  # requests given up without one answer between them: the endpoint is broken, not the requests
START_SECONDS = 1.0  # patience with a server that never answered
RESTART_SECONDS = 300.0  # patience with one that did
DRAIN_SECONDS = 10.0  # what is in flight at a fatal fault may still arrive, and be kept, that long
MAX_WAIT_SECONDS = 120.0  # longest Retry-After that is obeyed
MAX_BACKOFF_SECONDS = 30.0
LONG_SECONDS = 5.0  # waits that are worth a line in the log

# What does not change the reply, and so not its key.
_TRANSPORT_KEYS = ("stream", "stream_options", "service_tier")


class Spend(Struct):
    """Live totals: `calls` answered by the endpoint, `reused` from the ledger, `retries` of any kind, `resent`
    (retries of requests that may have been paid already), requests `failed` for good.
    """

    calls: int = 0
    reused: int = 0
    retries: int = 0
    resent: int = 0
    failed: int = 0
    usage: Usage = msgspec.field(default_factory=Usage)
    usd: float = 0.0
    in_flight: int = 0


class Rejected(Exception):
    """The endpoint refuses this one request, or (`status` 0 or retryable) gave no answer to it after every retry.

    Attributes:
        status: HTTP status; 0 where there was none.
        message: the endpoint's own words, on one line.
        param: the field that it names, if any.
        code: its error code, if any.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(f"{status}: {message}" if status else message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code


class Endpoint:
    """Async context manager around one endpoint and the ledger of its paid replies.

    Args:
        url: base URL, usually ending in `/v1` (which is added where there is no path).
        api_key_variable: environment variable that holds the key; None: no key is sent.
        ledger: the JSONL file of paid replies; one process at a time.
        concurrency: most requests in flight.
        timeout: seconds to wait for one reply.
        price: to count dollars with; None counts none.
        api_key_required: whether to ask for a key that is not set before an endpoint elsewhere does.
        log: told in a line about long waits.

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
        price: Price | None = None,
        api_key_required: bool = True,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url = _base_url(url)
        self.spend = Spend()
        self._variable = api_key_variable
        self._key = os.environ.get(api_key_variable, "") if api_key_variable else ""
        if api_key_variable and api_key_required and not self._key and not is_local(url):
            raise UserError(f"no API key for {self.url}", hint=f"export {api_key_variable}=...")
        self._post_url = f"{self.url}/chat/completions"
        self._place = self.url.partition("://")[2]
        self._timeout = timeout
        self._price = price
        self._log = log
        self._pace = Pace(_allowed_sockets(concurrency))
        self._journal = Journal(ledger)
        self._replies: dict[str, _Paid] = {}
        self._session: aiohttp.ClientSession | None = None
        self._fatal: BaseException | None = None
        self._answered = False
        self._down_since: float | None = None
        self._lost = 0

    async def __aenter__(self) -> Self:
        import aiohttp

        self._journal.__enter__()
        try:
            self._replies = read_latest(self._journal.path, _Paid)
        except BaseException:
            self._journal.close()
            raise
        self._session = aiohttp.ClientSession(
            # Under uvicorn's 5 s, so that no request goes into a connection which the server is closing.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            trust_env=not is_local(self.url),
            headers={
                "Content-Type": "application/json",
                "User-Agent": f"nothing-dpo/{__version__}",
                **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            },
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        await self._session.close()
        self._journal.close()

    async def chat(self, body: dict[str, Any], replicate: int = 0) -> Reply:
        """Send a chat completion request, unless its reply is in the ledger.

        Args:
            body: the request's JSON.
            replicate: tells apart requests of the same body that shall each be paid.

        Raises:
            Rejected: the endpoint refuses this request, or does not answer it.
            UserError: nothing more can be sent: bad key, bad path, no quota, no server, full disk.
        """
        content = {name: value for name, value in body.items() if name not in _TRANSPORT_KEYS}
        key = content_id(content, self._place, replicate)
        paid = self._replies.get(key)
        if paid is not None:
            self.spend.reused += 1
            return Reply(paid.choices, paid.usage, paid.model)
        try:
            reply = await self._ask(msgspec.json.encode(body))
        except Rejected:
            self.spend.failed += 1
            raise
        self.spend.calls += 1
        self.spend.usage += reply.usage
        if self._price is not None:
            self.spend.usd += self._price.usd(reply.usage)
        paid = _Paid(id=key, choices=reply.choices, usage=reply.usage, model=reply.model)
        self._journal.append(paid)
        self._replies[key] = paid
        return reply

    async def models(self) -> list[str]:
        """Names that the endpoint serves; empty if it does not say."""
        import aiohttp

        assert self._session is not None
        try:
            async with self._session.get(f"{self.url}/models") as response:
                listing = msgspec.json.decode(await response.read(), type=_Models)
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError):
            return []
        return [one_line(model.id) for model in listing.data]

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

    async def _ask(self, body: bytes) -> Reply:
        """Send until there is a reply, a refusal, or no patience left."""
        attempts = resends = 0
        while True:
            sent = await self._pace.enter()
            self.spend.in_flight = self._pace.in_flight
            pause = 0.0
            try:
                if self._fatal is not None:
                    raise self._fatal
                reply = await self._send(body)
                self._lost = 0
                self._pace.grow()
                return reply
            except _Down as fault:
                self._bear_with(fault)
            except _Again as fault:
                attempts += 1
                resends += fault.paid
                if fault.congestion:
                    self._pace.cut(sent)
                if attempts == ATTEMPTS or resends > RESENDS:
                    self._give_up(fault)
                self.spend.resent += fault.paid
                if fault.after is not None:
                    self._obey(min(fault.after, MAX_WAIT_SECONDS))
                else:
                    pause = random.uniform(0.5, 1) * min(MAX_BACKOFF_SECONDS, 0.5 * 2**attempts)
            finally:
                self._pace.leave()
                self.spend.in_flight = self._pace.in_flight
            self.spend.retries += 1
            await asyncio.sleep(pause)

    def _obey(self, seconds: float) -> None:
        """Nobody sends before Retry-After is over."""
        if self._pace.hold(seconds) and seconds >= LONG_SECONDS:
            self._log(f"{self.url} asks to wait {seconds:.0f} s")

    def _give_up(self, fault: "_Again") -> None:
        self._lost += 1
        if self._lost == LOST_IN_A_ROW:
            raise UserError(
                f"{self._lost} requests in a row got no answer; the last: {fault}",
                where=self.url, hint="everything paid is kept: run the same command again", code=Exit.FAILED,
            )  # fmt: skip
        raise Rejected(fault.status, str(fault))

    def _bear_with(self, fault: "_Down") -> None:
        """Wait for a server that restarts; not for one that was never there.

        Raises:
            UserError: it has been away for too long.
        """
        now = time.monotonic()
        if self._down_since is None:
            self._down_since = now
            if self._answered:
                self._log(f"{self.url} is gone; waiting up to {RESTART_SECONDS:.0f} s for it to come back")
        if now - self._down_since > (RESTART_SECONDS if self._answered else START_SECONDS):
            hint = "run the same command again once it is back" if self._answered else "is the server running?"
            raise UserError(f"no connection: {fault}", where=self.url, hint=hint, code=Exit.FAILED)
        self._pace.hold(random.uniform(0.25, 0.5))

    async def _send(self, body: bytes) -> Reply:
        """One HTTP request."""
        import aiohttp

        assert self._session is not None
        try:
            async with self._session.post(self._post_url, data=body) as response:
                content = await response.read()
        except aiohttp.InvalidURL as error:
            raise UserError(f"not a URL: {error}", where=self.url) from None
        except aiohttp.ClientSSLError as error:
            raise UserError(f"no secure connection: {error}", where=self.url, code=Exit.FAILED) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _Down(str(error)) from None
        except TimeoutError:
            raise _Again(0, f"no reply within {self._timeout:g} s", paid=True, congestion=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Again(0, f"connection lost: {error}", paid=True) from None
        self._answered, self._down_since = True, None
        if response.status != 200:
            raise self._fault(response.status, read_error(content), retry_after(response.headers))
        try:
            return read_reply(content)
        except msgspec.MsgspecError as error:
            inner = read_error(content)  # some proxies wrap an error into a 200
            if inner.code and inner.code.isdigit():
                raise self._fault(int(inner.code), inner, None) from None
            raise _Again(200, f"the reply is no chat completion: {error}", paid=True) from None

    def _fault(self, status: int, error: Error, after: float | None) -> Exception:
        """What an error response means."""
        message = one_line(error.message.replace(self._key, "***") if self._key else error.message)
        said = f"{status}: {message}" if message else str(status)
        if status in (401, 403):
            given = f"is ${self._variable} right?" if self._key else "it asks for an API key"
            hint = given if self._key or not self._variable else f"export {self._variable}=..."
            return UserError(f"access refused, {said}", where=self.url, hint=hint)
        if status == 402 or error.code in ("insufficient_quota", "billing_hard_limit_reached"):
            hint = "everything paid is kept: top up, then run the same command again"
            return UserError(f"the quota is exhausted, {said}", where=self.url, hint=hint, code=Exit.FAILED)
        if status == 404 and (error.param == "model" or "model" in message.lower()):
            return Rejected(status, message, error.param, error.code)
        if status in (404, 405):
            hint = "the URL is the one before /chat/completions, most often ending in /v1"
            return UserError(f"no chat completions there, {said}", where=self.url, hint=hint)
        if status in (408, 409, 425, 429) or status >= 500:
            return _Again(status, said, after=after, congestion=status in (408, 429, 503))
        return Rejected(status, message, error.param, error.code)


class _Paid(Struct, omit_defaults=True):
    """One line of a ledger."""

    id: str
    choices: list[Choice]
    usage: Usage
    model: str = ""


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


class _Down(Exception):
    """There is no connection to the server."""


class _Again(Exception):
    """No answer this time; `paid` if the request may have been paid, `after` seconds if the server says so."""

    def __init__(
        self, status: int, message: str, *, after: float | None = None, paid: bool = False, congestion: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.after = after
        self.paid = paid
        self.congestion = congestion


def _base_url(url: str) -> str:
    parts = urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"'{url}' is not an http(s) URL", hint="for example http://127.0.0.1:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/chat/completions") or "/v1"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], path, "", ""))


def _allowed_sockets(concurrency: int) -> int:
    """Raise the limit on open files as far as the system allows, and keep within it."""
    spare = 64
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = concurrency + spare
    if soft < want:
        soft = want if hard == resource.RLIM_INFINITY else min(want, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(concurrency, soft - spare))
