"""One timer for all requests: who is late is given up, whatever comes meanwhile, and nobody else is touched."""

import asyncio
import time

import pytest

from dpo_cli.endpoint import client as endpoint
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.deadlines import Deadlines
from dpo_cli.endpoint.http import Rejected

FOREVER = 60


def test_each_has_its_own_time():
    async def main():
        deadlines = Deadlines(0.2)

        async def after(start, seconds):
            await asyncio.sleep(start)
            try:
                return await deadlines.within(asyncio.sleep(seconds, "done"))
            except TimeoutError:
                return "late", asyncio.current_task().cancelling()

        # The second is late after the third has begun; the fourth begins when nobody has been there for a while.
        return await asyncio.gather(after(0, 0.1), after(0, FOREVER), after(0.15, 0.1), after(0.6, FOREVER))

    assert asyncio.run(main()) == ["done", ("late", 0), "done", ("late", 0)]


@pytest.mark.parametrize("late", ["never", "before", "after"])
def test_who_is_cancelled_by_others_is_not_late(late):
    async def main():
        deadlines = Deadlines(0.01)
        task = asyncio.create_task(deadlines.within(asyncio.sleep(FOREVER)))
        await asyncio.sleep(0)
        if late != "never":
            time.sleep(0.02)  # so that both happen in one turn of the loop
        if late == "before":
            deadlines._cancel_late()
        task.cancel()
        if late == "after":
            deadlines._cancel_late()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(main())


def test_what_is_made_of_a_cancellation_is_raised_as_it_is():
    async def work():
        try:
            await asyncio.sleep(FOREVER)
        except asyncio.CancelledError:
            raise ConnectionError("cut off") from None

    async def main():
        with pytest.raises(ConnectionError):
            await Deadlines(0.05).within(work())
        async with asyncio.timeout(FOREVER):  # which a count of cancellations that is left behind would disturb
            assert asyncio.current_task().cancelling() == 0

    asyncio.run(main())


@pytest.mark.parametrize("head", [b"Content-Length: 2000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"X-Slow: "])
def test_a_server_that_trickles_is_given_up(tmp_path, monkeypatch, head):
    monkeypatch.setattr(endpoint, "RESENDS", 0)
    sent = 0

    async def respond(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + head)
        while not writer.is_closing():
            sent += 1
            writer.write(b"1\r\n \r\n" if b"chunked" in head else b" ")
            await asyncio.sleep(0.02)

    async def main():
        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with Endpoint(
            url, api_key_variable=None, ledger=tmp_path / "ledger.jsonl", concurrency=1, timeout=0.3
        ) as client:
            with pytest.raises(Rejected, match="no reply within"):
                await client.chat({"model": "writer", "messages": [{"role": "user", "content": "scene"}]})
            assert client.spend.resent == 0
        server.close()

    asyncio.run(asyncio.wait_for(main(), 20))
    assert sent > 3
