import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from email.utils import formatdate
from pathlib import Path

import pytest
from openai_server import Server, first

from dpo_cli.data.records import Usage
from dpo_cli.endpoint import client as endpoint
from dpo_cli.endpoint.client import Endpoint
from dpo_cli.endpoint.concurrency import Pace
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.ledger import Ledger
from dpo_cli.endpoint.prices import Price, price_of
from dpo_cli.endpoint.responses import Choice, Reply, read_error, read_reply, retry_after
from dpo_cli.errors import Exit, UserError


def body(number=0, **more):
    return {"model": "writer", "messages": [{"role": "user", "content": f"scene {number}"}], **more}


def ask(url, bodies, ledger, **options):
    """(reply or the error that its request met, for each body; what it cost)."""
    options = {"api_key_variable": None, "concurrency": 32, "timeout": 10.0} | options

    async def main():
        async with Endpoint(url, ledger=ledger, **options) as client:
            results = [None] * len(bodies)

            async def handle(index):
                try:
                    results[index] = await client.chat(bodies[index])
                except Rejected as error:
                    results[index] = error

            await client.each(range(len(bodies)), handle)
            return results, client.spend

    return asyncio.run(main())


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "replies.jsonl"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_BACKOFF_SECONDS", 0.05)
    monkeypatch.setattr(endpoint, "RESTART_SECONDS", 20)


def test_a_paid_reply_is_never_paid_again(ledger):
    with Server() as server:
        before, spend = ask(server.url, [body(0), body(1)], ledger)
        assert (spend.calls, spend.reused) == (2, 0)
        after, spend = ask(server.url, [body(0, service_tier="flex"), body(1), body(2)], ledger)
        assert (spend.calls, spend.reused) == (1, 2)
        assert after[:2] == before
        assert server.paid.total() == 3


def test_replicates_are_paid_each(ledger):
    async def main():
        async with Endpoint(server.url, api_key_variable=None, ledger=ledger, concurrency=4, timeout=5) as client:
            for replicate in (0, 1, 1):
                await client.chat(body(), replicate=replicate)
            return client.spend

    with Server() as server:
        spend = asyncio.run(main())
    assert (spend.calls, spend.reused) == (2, 1)


@pytest.mark.parametrize(
    ("fault", "paid"),
    [("429", 0), ("429:0", 0), ("500", 0), ("503", 0), ("drop", 1), ("malformed", 1), ("hang", 1)],
)
def test_a_fault_that_passes_is_retried(ledger, fault, paid):
    with Server(fault=first(1, fault)) as server:
        results, spend = ask(server.url, [body(number) for number in range(5)], ledger, timeout=0.5)
        assert [len(reply.choices) for reply in results] == [1] * 5
        assert spend.retries == 5
        # What may have been paid twice is what was paid twice.
        assert spend.resent == server.paid_twice == 5 * paid


def test_a_reply_without_choices_is_no_reply():
    with pytest.raises(Exception, match="no choices"):
        read_reply(b'{"choices": []}')


@pytest.mark.parametrize("fault", ["401", "403", "404", "quota"])
def test_a_fault_that_stays_stops_the_run(ledger, fault):
    def strike(call):
        return fault if "scene 40" in call.text else None

    with Server(latency=0.05, fault=strike) as server:
        with pytest.raises(UserError) as raised:
            ask(server.url, [body(number) for number in range(200)], ledger)
        assert server.url in str(raised.value)
        assert raised.value.hint
        assert server.calls.total() < 150
        # What was in flight has arrived and is kept.
        assert len(ledger.read_bytes().splitlines()) == server.paid.total()


def test_a_request_that_is_refused_stops_nothing(ledger):
    def strike(call):
        return "400!too long" if "scene 1" in call.text else None

    with Server(fault=strike, models=["writer"]) as server:
        bodies = [body(0), body(1), body(2) | {"model": "painter"}]
        (good, long, model), spend = ask(server.url, bodies, ledger)
        assert server.calls.total() == 3
    assert len(good.choices) == 1
    assert (long.status, long.message) == (400, "too long")
    assert (model.status, model.param) == (404, "model")
    assert spend.failed == 2


def test_a_request_that_is_never_answered_is_given_up(ledger):
    def strike(call):
        return "500" if "scene 1" in call.text else "drop" if "scene 2" in call.text else None

    with Server(fault=strike) as server:
        (good, failing, dropped), spend = ask(server.url, [body(number) for number in range(3)], ledger)
        assert sorted(server.calls.values()) == [1, endpoint.RESENDS + 1, endpoint.ATTEMPTS]
    assert len(good.choices) == 1
    assert failing.status == 500
    assert dropped.status == 0
    assert spend.failed == 2


def test_an_endpoint_that_only_fails_stops_the_run(ledger, monkeypatch):
    monkeypatch.setattr(endpoint, "ATTEMPTS", 2)
    with Server(fault=lambda call: "500") as server:
        with pytest.raises(UserError, match="in a row got no answer; the last: 500: Try again later"):
            ask(server.url, [body(number) for number in range(1000)], ledger, concurrency=8)
        assert server.calls.total() < 60


@pytest.mark.parametrize(("wait", "least"), [("1", 0.95), ("DATE", 0.9)])
def test_retry_after_holds_back_every_request(ledger, wait, least):
    with Server(latency=0.02, fault=lambda call: f"429:{wait}" if call.number == 60 else None) as server:
        ask(server.url, [body(number) for number in range(300)], ledger)
        gaps = [later - earlier for earlier, later in zip(server.arrivals, server.arrivals[1:], strict=False)]
        assert max(gaps) > least
        assert server.calls.total() == 301


def test_concurrency_settles_at_what_the_server_takes(ledger):
    with Server(latency=0.02, capacity=16) as server:
        results, _ = ask(server.url, [body(number) for number in range(600)], ledger, concurrency=256)
        assert all(reply.choices for reply in results)
        # A client that held on to 32 would be refused every second time.
        assert server.calls.total() < 600 * 1.25
        assert server.highest < 256


def test_concurrency_grows_to_its_bound_and_not_beyond(ledger):
    with Server(latency=0.4) as server:
        ask(server.url, [body(number) for number in range(300)], ledger, concurrency=80)
        assert 60 < server.highest <= 80


def test_one_round_trip_cuts_once():
    pace = Pace(100)
    for _ in range(100):
        pace.grow()
    assert pace.limit == 100
    sent = time.monotonic()
    pace.in_flight = 100
    for _ in range(50):
        pace.cut(sent)
    assert pace.limit == pytest.approx(70)
    before = pace.limit
    for _ in range(70):
        pace.grow()
    assert pace.limit - before == pytest.approx(100 / 32, rel=0.05)  # additive now: a step a round trip
    pace.cut(time.monotonic())
    assert pace.limit == pytest.approx(0.7 * (before + 100 / 32), rel=0.05)


def test_a_server_that_is_not_there_is_named_at_once(ledger):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="no connection") as raised:
        ask(url, [body(number) for number in range(50)], ledger)
    assert raised.value.where == url
    assert raised.value.hint == "is the server running?"


def test_a_server_that_restarts_is_waited_for(ledger):
    lines = []
    with Server(latency=0.02) as server:

        def restart():
            while server.calls.total() < 50:
                time.sleep(0.005)
            server.stop()
            time.sleep(2 * endpoint.START_SECONDS)
            again.__enter__()

        again = Server(port=server.port)
        restarting = threading.Thread(target=restart)
        restarting.start()
        results, _ = ask(server.url, [body(number) for number in range(200)], ledger, log=lines.append, concurrency=8)
        restarting.join()
        again.stop()
    assert all(reply.choices for reply in results)
    assert [line for line in lines if "is gone" in line] == lines != []


def test_a_full_disk_stops_the_calls(ledger):
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from test_endpoint import ask, body\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n"
        "ask(sys.argv[1], [body(number) for number in range(500)], Path(sys.argv[2]), concurrency=4)\n"
    )
    with Server(latency=0.01) as server:
        arguments = [server.url, str(ledger), str(Path(__file__).parent)]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
        assert "UserError" in done.stderr.splitlines()[-1]
        kept = ledger.read_bytes()
        assert kept.endswith(b"\n")
        assert len(kept) <= 4000
        assert server.calls.total() <= len(kept.splitlines()) + 4


def test_an_interrupt_leaves_a_clean_ledger(ledger):
    code = (
        "import sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from test_endpoint import ask, body\n"
        "ask(sys.argv[1], [body(number) for number in range(5000)], Path(sys.argv[2]), timeout=60)\n"
    )
    with Server(latency=0.05) as server:
        arguments = [server.url, str(ledger), str(Path(__file__).parent)]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)
        while server.calls.total() < 100:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert errors.splitlines()[-1] == "KeyboardInterrupt"
        _, spend = ask(server.url, [body(number) for number in range(50)], ledger)
        assert spend.reused > 40


def test_the_key_goes_where_it_is_meant_to_go_and_into_no_message(ledger, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-right")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    with Server(api_key="sk-right") as server:
        (reply,), _ = ask(server.url, [body()], ledger, api_key_variable="MY_KEY")
        assert reply.choices
        with pytest.raises(UserError) as raised:
            ask(server.url, [body(1)], ledger, api_key_variable="OPENAI_API_KEY")
        assert "sk-other" not in str(raised.value)
        assert "OPENAI_API_KEY" in raised.value.hint
        server.keys.clear()
        with pytest.raises(UserError):
            ask(server.url, [body(1)], ledger)
        assert server.keys == {""}
    assert b"sk-" not in ledger.read_bytes()


def test_a_missing_key_is_asked_for_before_anything_is_sent(ledger, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UserError, match="no API key") as raised:
        ask("https://api.openai.com/v1", [body()], ledger, api_key_variable="OPENAI_API_KEY")
    assert raised.value.hint == "export OPENAI_API_KEY=..."
    assert raised.value.code == Exit.USAGE


@pytest.mark.parametrize("form", ["{}", "{}/", "{}/chat/completions", "{root}"])
def test_forms_of_the_url(ledger, form):
    with Server() as server:
        url = form.format(server.url, root=server.url.removesuffix("/v1"))
        (reply,), _ = ask(url, [body()], ledger)
    assert reply.choices


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "", "http://"])
def test_what_is_no_url(ledger, url):
    with pytest.raises(UserError, match=r"not an http\(s\) URL"):
        ask(url, [body()], ledger)


def test_two_processes_do_not_share_a_ledger(ledger):
    async def main():
        async with Endpoint(server.url, api_key_variable=None, ledger=ledger, concurrency=1, timeout=5):
            with pytest.raises(UserError, match="another nothing-dpo command"):
                await asyncio.to_thread(ask, server.url, [body()], ledger)

    with Server() as server:
        asyncio.run(main())


def test_what_a_reply_says():
    reply = read_reply(
        b'{"model": "m", "choices": ['
        b'{"index": 1, "message": {"role": "assistant", "content": null, "refusal": "no"}, "finish_reason": "stop"},'
        b'{"index": 0, "message": {"content": "a", "tool_calls": null}, "finish_reason": "length"}],'
        b'"usage": {"prompt_tokens": 10, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4},'
        b'"completion_tokens_details": {"reasoning_tokens": 5}, "cost": 0.1}}'
    )
    assert [(choice.text, choice.finish_reason, choice.refusal) for choice in reply.choices] == [
        ("a", "length", None),
        ("", "stop", "no"),
    ]
    assert reply.usage == Usage(input=10, cached=4, output=7, reasoning=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"error": {"message": "m", "param": "n", "code": 400}}', "m"),
        (b'{"error": "m"}', "m"),
        (b'{"object": "error", "message": "m"}', "m"),
        (b'{"detail": "m"}', "m"),
        (b"m", "m"),
        (b"\xff", "�"),
    ],
)
def test_forms_of_an_error(content, message):
    assert read_error(content).message == message


def test_forms_of_retry_after():
    now = time.time()
    date = {"Retry-After": formatdate(now + 30, usegmt=True), "Date": formatdate(now - 3600, usegmt=True)}
    assert retry_after(date) == pytest.approx(3630, abs=1)  # by the server's clock, not by ours
    assert retry_after({"Retry-After": "1.5"}) == 1.5
    assert retry_after({"Retry-After": "-3"}) == 0
    assert [retry_after({"Retry-After": value}) for value in ("soon", "nan", "inf", "")] == [None] * 4
    assert retry_after({}) is None


def test_dollars_by_hand():
    usage = Usage(input=1_000_000, cached=400_000, output=100_000, reasoning=50_000)
    assert Price(2.0, 0.5, 8.0).usd(usage) == pytest.approx(0.6 * 2 + 0.4 * 0.5 + 0.1 * 8)


def test_where_a_price_comes_from():
    openai = "https://api.openai.com/v1"
    known = price_of(openai, "gpt-5.4-mini")
    assert known is not None
    assert known.output > known.input > known.cached > 0
    assert price_of(openai, "nobody-knows-this") is None
    assert price_of("http://127.0.0.1:8000/v1", "nobody-knows-this") == Price(0, 0, 0)
    assert price_of("http://127.0.0.1:8000/v1", "gpt-5.4-mini", "1,0.5,2") == Price(1, 0.5, 2)
    with pytest.raises(UserError, match="IN,CACHED,OUT"):
        price_of(openai, "gpt-5.4-mini", "1,2")


def test_dollars_are_counted_for_what_was_paid_now(ledger):
    with Server() as server:
        _, spend = ask(server.url, [body(), body(1)], ledger, price=lambda _: Price(0, 0, 1e6))
        assert spend.usd == pytest.approx(spend.usage.output)
        _, spend = ask(server.url, [body(), body(1)], ledger, price=lambda _: Price(0, 0, 1e6))
        assert spend.usd == 0


def test_more_in_flight_than_the_shell_allows_open_files(ledger):
    code = (
        "import resource, sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from test_endpoint import ask, body\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (100, 150))\n"
        "_, spend = ask(sys.argv[1], [body(number) for number in range(400)], Path(sys.argv[2]), concurrency=300)\n"
        "print(spend.calls, spend.retries)\n"
    )
    with Server(latency=0.05) as server:
        arguments = [server.url, str(ledger), str(Path(__file__).parent)]
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, timeout=60
        )
        assert done.stdout == "400 0\n"
        assert server.highest <= 150 - 64


def test_what_a_ledger_holds_is_read_where_it_stands_also_behind_a_torn_line(tmp_path):
    path, usage = tmp_path / "replies.jsonl", Usage(3, 0, 2)
    said = {key: Reply([Choice(text=key * 9, finish_reason="stop")], usage, "m") for key in "abc"}
    path.write_text("")
    with closing(opened(path)) as ledger:
        assert ledger.put("a", said["a"]) and not ledger.put("a", said["b"])
        assert ledger.put("b", said["b"]) and ledger.get("a") == said["a"]
    with path.open("a") as file:
        file.write('{"id":"c","choices":[{"text":"cc')
    with closing(opened(path)) as ledger:
        assert ledger.get("b") == said["b"]
        assert "c" not in ledger and ledger.get("c") is None
        assert ledger.put("c", said["c"])
        assert [ledger.get(key) for key in "abc"] == list(said.values())
    assert path.read_text().count("\n") == 3


def opened(path):
    ledger = Ledger(path)
    ledger.open()
    return ledger
