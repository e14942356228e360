"""A loopback server whose responses a test writes down byte by byte.

In a test:      with RawServer(lambda request: (200, {}, b"...")) as server: ... server.url, server.requests
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import msgspec

Response = tuple[int, dict[str, str], bytes]


@dataclass
class Received:
    """One request as it arrived; header names are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    content: bytes

    @property
    def body(self) -> dict[str, Any]:
        return msgspec.json.decode(self.content) if self.content else {}


class RawServer:
    """The server in a thread of its own; a context manager. `requests` are all that came."""

    def __init__(self, respond: Callable[[Received], Response]) -> None:
        self.requests: list[Received] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                headers = {name.lower(): value for name, value in self.headers.items()}
                received = Received(self.command, self.path, headers, self.rfile.read(size))
                outer.requests.append(received)
                status, more, content = respond(received)
                self.send_response(status)
                for name, value in ({"Content-Type": "application/json"} | more).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(message: Any, finish_reason: Any = "stop", **fields: Any) -> bytes:
    """A chat completion of one choice, as most servers give it."""
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    usage = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
    body = {"id": "x", "object": "chat.completion", "model": "writer", "choices": [choice], "usage": usage, **fields}
    return msgspec.json.encode(body)


def says(text: str, **fields: Any) -> bytes:
    """A chat completion with this text."""
    return completion({"role": "assistant", "content": text}, **fields)
