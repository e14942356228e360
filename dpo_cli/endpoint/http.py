"""One HTTP connection to an endpoint: the key, the session, and what each kind of failure means for the caller.

Neither key nor prompt follows a redirect to another origin, and no reply is read beyond a limit.
"""

import asyncio
import os
import re
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, urljoin, urlsplit, urlunsplit

from dpo_cli import __version__
from dpo_cli.endpoint.deadlines import Deadlines
from dpo_cli.endpoint.prices import is_local
from dpo_cli.endpoint.responses import Error, one_line, read_error, retry_after
from dpo_cli.errors import Exit, UserError

if TYPE_CHECKING:
    import aiohttp

CHAT, COMPLETIONS = "/chat/completions", "/completions"
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 3.0  # without a first reply, after which a line says what is being waited for
MOST_BYTES = 64 << 20  # of one reply, unpacked
MOST_REDIRECTS = 3  # within one origin
_REQUEST = re.compile(r"model|parameter|endpoints? found|support", re.I)  # in a 404 that is not about its path
_SECRET = re.compile(r"key|token|secret|passw|signature|^sig$", re.I)
_PASSING = re.compile(
    r"try again|retry|temporar|overload|unavailable|time(d)? ?out|internal (server )?error|gateway|capacity|busy", re.I
)


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


class TooLong(Rejected):
    """The reply is longer than is read; it may have been paid."""


class Unreachable(Exception):
    """There is no connection to the server."""


class Retryable(Exception):
    """No answer this time.

    Attributes:
        status: HTTP status; 0 where there was none.
        after: seconds to wait, if the server says so.
        paid: whether the request may have been paid.
        congestion: whether the server has too much to do.
        refusal: what it means if it is no passing fault but a refusal of this request; None: it can't be one.
        content: what was paid and could not be read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        after: float | None = None,
        paid: bool = False,
        congestion: bool = False,
        refusal: Rejected | None = None,
        content: bytes = b"",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.after = after
        self.paid = paid
        self.congestion = congestion
        self.refusal = refusal
        self.content = content


class Connection:
    """Async context manager around a session with one endpoint.

    Args:
        url: base URL, usually ending in `/v1` (which is added where there is no path); a query string is kept.
        api_key_variable: environment variable that holds the key; None: no key is sent.
        api_key_required: whether to ask for a key that is not set before an endpoint elsewhere does.
        timeout: seconds to wait for one reply.
        log: told in a line if the first reply is long in coming.

    `responses` counts what came back, of any status.

    Raises:
        UserError: the URL is none, or a required key is not set.
    """

    def __init__(
        self,
        url: str,
        api_key_variable: str | None,
        api_key_required: bool,
        timeout: float,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.url, self._query = _base_url(url)
        self.responses = 0
        self._asking: asyncio.Task[None] | None = None
        self._log = log
        self._variable = api_key_variable
        self._key = os.environ.get(api_key_variable, "") if api_key_variable else ""
        if api_key_variable and api_key_required and not self._key and not is_local(url):
            raise UserError(f"no API key for {self.url}", hint=f"export {api_key_variable}=...")
        self._timeout = timeout
        self._deadlines = Deadlines(timeout)
        self._session: aiohttp.ClientSession | None = None
        self._through_proxy: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        import aiohttp

        headers = {
            "User-Agent": f"nothing-dpo/{__version__}",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
            **({"api-key": self._key} if self._key and _is_azure(self.url) else {}),
        }
        proxy = _proxy_of(self.url)
        if proxy is not None and not proxy.startswith("http://"):
            self._log(f"{self.url}: without the proxy of the environment, which is no http:// one")
            proxy = None
        if proxy is not None:
            # A session's own headers would be sent to the proxy, and the key with them.
            self._through_proxy = {"proxy": proxy, "headers": headers}
        self._session = aiohttp.ClientSession(
            # Under uvicorn's 5 s, so that no request goes into a connection which the server is closing.
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4.0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
            headers=None if proxy else headers,
        )
        self._silence = asyncio.get_running_loop().call_later(SILENCE_SECONDS, self._say_what_is_awaited)
        return self

    def _say_what_is_awaited(self) -> None:
        if not self.responses:
            self._asking = asyncio.create_task(self._explain_silence())

    async def _explain_silence(self) -> None:
        """Whether there is a connection to be had: a look of its own, so that no request pays for it."""
        parts = urlsplit(self.url)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                port = parts.port or (443 if parts.scheme == "https" else 80)
                _, writer = await asyncio.open_connection(parts.hostname, port)
            writer.close()
        except (TimeoutError, OSError):
            self._log(f"waiting for a connection to {self.url}")
        else:
            self._log(f"{self.url} is connected; waiting up to {self._timeout:g} s for its first reply")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._session is not None
        self._silence.cancel()
        if self._asking is not None:
            self._asking.cancel()
        self._deadlines.close()
        await self._session.close()

    async def send(self, method: str, path: str, *, limit: int | None = None, **content: Any) -> bytes:
        """One HTTP request; the body of its successful response.

        Args:
            method: GET or POST.
            path: after the base URL.
            limit: most bytes that are read; None: `MOST_BYTES`.
            content: `data` and `params`, as aiohttp takes them.

        Raises:
            Unreachable: nobody there.
            Retryable: no answer this time.
            Rejected: this request is refused.
            UserError: no request will be answered.
        """
        import aiohttp

        assert self._session is not None
        try:
            address = f"{self.url}{path}{self._query}"
            response, body = await self._deadlines.within(self._follow(method, address, limit or MOST_BYTES, content))
        except aiohttp.InvalidURL as error:
            raise UserError(f"not a URL: {error}", where=self.url) from None
        except aiohttp.ClientSSLError as error:
            raise UserError(f"no secure connection: {error}", where=self.url, code=Exit.FAILED) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise Unreachable(str(error)) from None
        except TimeoutError:
            raise Retryable(0, f"no reply within {self._timeout:g} s", paid=True, congestion=True) from None
        except (aiohttp.ClientError, OSError) as error:
            raise Retryable(0, f"connection lost: {error}", paid=True) from None
        self.responses += 1
        if response.status != 200:
            raise self.fault(path, response.status, read_error(body), retry_after(response.headers))
        return body

    async def _follow(
        self, method: str, address: str, limit: int, content: dict[str, Any]
    ) -> "tuple[aiohttp.ClientResponse, bytes]":
        """A response and its body; redirects are followed within the origin only.

        Raises:
            UserError: the redirect leads elsewhere.
            Rejected: the reply is longer than the limit.
        """
        assert self._session is not None
        for _ in range(MOST_REDIRECTS):
            response = await self._session.request(
                method, address, allow_redirects=False, **self._through_proxy, **content
            )
            body = await _read(response, limit)
            if response.status not in (301, 302, 303, 307, 308):
                return response, body
            target = urljoin(address, response.headers.get("Location", ""))
            if _origin(target) != _origin(address) or (method != "GET" and response.status < 307):
                raise redirected(self.url, target)
            address = target
        raise redirected(self.url, address)

    def fault(self, path: str, status: int, error: Error, after: float | None = None) -> Exception:
        """What an error response means."""
        message = one_line(error.message.replace(self._key, "***") if self._key else error.message)
        said = f"{status}: {message}" if message else str(status)
        if status in (401, 403) and error.code != "content_filter":
            given = f"is ${self._variable} right?" if self._key else "it asks for an API key"
            hint = given if self._key or not self._variable else f"export {self._variable}=..."
            return UserError(f"access refused, {said}", where=self.url, hint=hint)
        if status == 402 or error.code in ("insufficient_quota", "billing_hard_limit_reached"):
            hint = "everything paid is kept: top up, then run the same command again"
            return UserError(f"the quota is exhausted, {said}", where=self.url, hint=hint, code=Exit.FAILED)
        if status == 404 and (error.param or _REQUEST.search(message)):
            return Rejected(status, message, error.param, error.code)
        if status in (404, 405) and path == CHAT:
            hint = "the URL is the one before /chat/completions, most often ending in /v1"
            return UserError(f"no chat completions there, {said}", where=self.url, hint=hint)
        if status in (408, 409, 425, 429) or status >= 500:
            refusal = None
            if status == 500 and message and not _PASSING.search(message):  # as llama.cpp says what it does not take
                refusal = Rejected(status, message, error.param, error.code)
            return Retryable(status, said, after=after, congestion=status in (408, 429, 503), refusal=refusal)
        return Rejected(status, message, error.param, error.code)


def json_data(content: bytes) -> "aiohttp.BytesPayload":
    """JSON as the `data` of a request, with its type: headers of its own would have to be merged."""
    import aiohttp

    return aiohttp.BytesPayload(content, content_type="application/json")


async def _read(response: "aiohttp.ClientResponse", limit: int) -> bytes:
    """The body of a response, unpacked; if it can't be read to its end, the connection is closed.

    Raises:
        TooLong: there is more of it.
    """
    try:
        length = response.content_length
        if length is not None and length <= limit and "Content-Encoding" not in response.headers:
            return await response.read()
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > limit:
                raise TooLong(0, f"the reply is longer than {limit >> 20} MiB, and is not read further")
        return bytes(body)
    except BaseException:
        response.close()
        raise


def redirected(url: str, target: str) -> UserError:
    """What to raise where a server sends us elsewhere."""
    parts = urlsplit(target)
    place = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return UserError(
        f"it redirects to {one_line(place)}, where neither key nor prompt is sent",
        where=url,
        hint="give the URL to which it leads, if you trust it",
    )


def checked_url(url: str) -> str:
    """A URL of http or https that holds no secret.

    Raises:
        UserError: it is none, or holds one.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise UserError(
            f"'{re.sub('//[^/]*@', '//***@', url)}' is not an http(s) URL", hint="for example http://127.0.0.1:8000/v1"
        )
    if "@" in parts.netloc or any(_SECRET.search(name) for name, _ in parse_qsl(parts.query)):
        shown = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
        hint = "keys come from the environment only: OPENAI_API_KEY for a judge, SERVE_API_KEY for a server"
        raise UserError("the URL holds a user name, a password or a key", where=shown, hint=hint)
    return url.strip()


def _base_url(url: str) -> tuple[str, str]:
    """The base URL, and the query string that each request ends with."""
    parts = urlsplit(checked_url(url))
    path = parts.path.rstrip("/").removesuffix(CHAT) or "/v1"
    return urlunsplit((parts.scheme, parts.netloc, path, "", "")), f"?{parts.query}" if parts.query else ""


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _proxy_of(url: str) -> str | None:
    """The proxy that the environment names for it.

    aiohttp's `trust_env` looks for one at each request, in a thread, and in another for a login in ~/.netrc: a request
    costs more than twice as much, and such a login is in the way of the key.
    """
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    if is_local(url) or proxy_bypass(parts.hostname or ""):
        return None
    return getproxies().get(parts.scheme) or None


def _is_azure(url: str) -> bool:
    """Whether keys go into a header of Azure's own."""
    return (urlsplit(url).hostname or "").endswith(".azure.com")
