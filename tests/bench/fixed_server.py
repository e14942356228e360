"""A chat endpoint that gives every request the same answer after a fixed time, at a tenth of a web framework's cost.

It is there so that a client is measured and not the server: `python tests/bench/fixed_server.py 0.2` prints its URL.
Each POST is answered, whatever it asks, one choice to each of its `n`; nothing else of HTTP is covered.
"""

import asyncio
import json
import re
import sys

TEXT = "[OTIS] You borrowed a ladder from a man who sells umbrellas?\n[MABEL] In July, Otis. He was not using it."
HEADERS = b"x-ratelimit-limit-requests: 1000000\r\nx-ratelimit-limit-tokens: 1000000000\r\n"  # peers pace by them
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
COUNT = re.compile(rb'"n": ?(\d+)')


def answer(count: int) -> bytes:
    """A whole HTTP response with `count` choices."""
    choices = [
        {"index": index, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop", "logprobs": None}
        for index in range(count)
    ]
    usage = {"prompt_tokens": 150, "completion_tokens": 30 * count, "total_tokens": 150 + 30 * count}
    content = {"id": "chatcmpl-0", "object": "chat.completion", "created": 0, "model": "writer"}
    body = json.dumps(content | {"choices": choices, "usage": usage}).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n" + HEADERS
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


ANSWERS = {count: answer(count) for count in range(1, 9)}


class Fixed(asyncio.Protocol):
    """One connection: a request, its answer `latency` seconds later, the next request."""

    def __init__(self, latency: float) -> None:
        self._latency = latency
        self._loop = asyncio.get_running_loop()
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            length = LENGTH.search(self._received, 0, end)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._received) < whole:
                return
            count = COUNT.search(self._received, end, whole)
            self._loop.call_later(self._latency, self._transport.write, ANSWERS[int(count[1]) if count else 1])
            self._received = self._received[whole:]


async def main(latency: float) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: Fixed(latency), "127.0.0.1", 0, backlog=4096)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
