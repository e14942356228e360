"""One request to a server, without a session: for what is asked a few times, with the standard library alone.

The same rules hold as for `http.Connection`: no redirect is followed, a reply has a limit, a URL holds no secret, and
what goes to this machine goes through no proxy.
"""

import json
import urllib.error
import urllib.request
from typing import Any

from dpo_cli.endpoint.http import MOST_BYTES, checked_url, redirected
from dpo_cli.endpoint.prices import is_local


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the response is what the caller gets."""

    def redirect_request(self, *_: Any) -> None:
        """There is no other request."""


def request(
    address: str, body: dict[str, Any] | None = None, *, key: str | None = None, timeout: float
) -> tuple[int, bytes]:
    """GET, or POST of JSON.

    Args:
        address: the whole URL.
        body: what to post; None: nothing is posted.
        key: sent as the bearer's, if there is one.
        timeout: seconds that the server may be silent.

    Returns:
        The status, whatever it is, and the content.

    Raises:
        UserError: the URL is none or holds a secret, or the server redirects elsewhere.
        OSError: nobody answers.
        ValueError: the reply is too long.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    content = None if body is None else json.dumps(body).encode()
    proxies = [urllib.request.ProxyHandler({})] if is_local(address) else []
    opener = urllib.request.build_opener(_Stay, *proxies)
    try:
        reply = opener.open(urllib.request.Request(checked_url(address), content, headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        if 300 <= reply.status < 400:
            raise redirected(address, reply.headers.get("Location", ""))
        found: bytes = reply.read(MOST_BYTES + 1)
    if len(found) > MOST_BYTES:
        raise ValueError(f"the reply is longer than {MOST_BYTES >> 20} MiB")
    return reply.status, found
