"""Judging through the Batch API: the same judgments, and no batch lost or made twice, whenever it is killed."""

import json
import os
import signal
import subprocess
import sys

import msgspec
import pytest
from batch_server import BatchServer
from judging import Log, config, judgments, rows, run, write
from openai_server import Server, shares

from dpo_cli.endpoint import batch
from dpo_cli.errors import Exit, UserError
from dpo_cli.stages import judge


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(batch, "FIRST_POLL_SECONDS", 0.02)
    monkeypatch.setattr(batch, "MAX_POLL_SECONDS", 0.05)
    monkeypatch.setattr(batch, "SETTLE_SECONDS", 0.02)


def verdicts(folder):
    return {key: (one.scores, one.ranking, one.error) for key, one in judgments(folder).items()}


@pytest.fixture
def expected(tmp_path):
    """The verdicts of a live judge."""
    write(tmp_path / "live", rows(12))
    with Server() as server:
        run(config(tmp_path / "live", server.url))
    return verdicts(tmp_path / "live")


def lines(server):
    """Requests that went through batches."""
    return [line["custom_id"] for made in server.batches.values() for line in made["lines"]]


def test_a_batch_gives_the_verdicts_of_the_live_judge_for_its_own_price(tmp_path, expected):
    write(tmp_path, rows(12))
    with BatchServer(seconds=0.1) as server:
        result = run(config(tmp_path, server.url, batch=True, price="1,0.1,10"))
        assert verdicts(tmp_path) == expected
        assert (len(server.batches), len(lines(server)), server.paid.total()) == (1, 22, 24)  # one task is asked live
        (made,) = server.batches.values()
        assert made["completion_window"] == "24h"
        assert {(line["method"], line["url"]) for line in made["lines"]} == {("POST", "/v1/chat/completions")}
        assert (result.receipt.calls, result.receipt.reused, result.judged) == (24, 0, 12)
        assert result.receipt.usd == pytest.approx(sum(one.usd for one in judgments(tmp_path).values()))
        # Live and batch share what is paid.
        (tmp_path / "judgments.jsonl").unlink()
        assert run(config(tmp_path, server.url)).receipt.reused == 24
        assert server.paid_twice == 0
    assert sorted(file.name for file in tmp_path.glob("judge.*")) == ["judge.batches.jsonl", "judge.replies.jsonl"]


RUN = "import msgspec, sys; from dpo_cli.stages import judge; from dpo_cli.config.settings import Config; "
RUN += "from dpo_cli.progress import Silent; judge.run(msgspec.json.decode(sys.argv[1], type=Config), Silent())"


MOMENTS = {
    "upload": "the intent is written",
    "uploaded": "the file is there, and nobody knows its id",
    "create": "the id of the file is written",
    "created": "the batch is there, and nobody knows its id",
    "poll": "the batch is waited for",
    "results": "it has ended",
    "errors": "a part of its results is taken in",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_nothing_is_lost_and_nothing_made_twice(tmp_path, expected, moment):
    write(tmp_path, rows(12))
    with BatchServer(stall=moment) as server:
        server.fault = lambda call: "400!no" if moment == "errors" and server.batches and call.number % 4 == 0 else None
        settings = config(tmp_path, server.url, batch=True)
        process = subprocess.Popen([sys.executable, "-c", RUN, msgspec.json.encode(settings).decode()])
        assert server.stalled.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        result = run(settings)
        assert (len(server.uploads), len(server.batches), server.paid_twice) == (1, 1, 0)
        assert len(lines(server)) == len(set(lines(server))) == 22
        server.fault = None
        if moment == "errors":
            assert sum(result.errors.values()) > 0
            run(settings)
    assert verdicts(tmp_path) == expected


def test_a_lost_answer_is_looked_for_before_anything_is_made_again(tmp_path, expected):
    for moment in ("uploaded", "created"):
        folder = tmp_path / moment
        write(folder, rows(12))
        with BatchServer(stall=moment) as server:
            run(config(folder, server.url, batch=True, timeout=0.5))
            assert (len(server.uploads), len(server.batches), server.paid_twice) == (1, 1, 0)
        assert verdicts(folder) == expected


def test_what_expired_was_cancelled_or_failed_is_sent_again(tmp_path, expected):
    write(tmp_path, rows(12))
    with BatchServer() as server:

        def fault(call):
            chosen = shares({"expire": 0.2, "cancel": 0.2, "500": 0.2, "garbage": 0.1})(call)
            return chosen if server.batches and call.attempt == 1 else None

        server.fault = fault
        run(config(tmp_path, server.url, batch=True))
        assert len(server.batches) == 2
        assert {made["status"] for made in server.batches.values()} & {"expired", "cancelled"}
        assert 0 < len(server.batches["batch_1"]["lines"]) < 22
        unreadable = [error for _, _, error in verdicts(tmp_path).values() if error]
        assert unreadable  # paid, and the same if it were asked again at once
        assert all("can't be read" in error for error in unreadable)
        run(config(tmp_path, server.url, batch=True))
    assert verdicts(tmp_path) == expected


def test_the_same_requests_again_are_another_batch(tmp_path, expected):
    write(tmp_path, rows(12))
    with BatchServer() as server:
        server.fault = lambda call: "expire" if server.batches and call.attempt == 1 else None
        run(config(tmp_path, server.url, batch=True))
        assert len(server.batches) == 2
        assert len({made["metadata"]["input"] for made in server.batches.values()}) == 2
    assert verdicts(tmp_path) == expected


def test_an_invalid_verdict_is_asked_again_in_the_next_batch(tmp_path, expected):
    write(tmp_path, rows(12))
    with BatchServer() as server:
        server.fault = lambda call: "reply!No." if server.batches and len(server.batches) == 1 else None
        run(config(tmp_path, server.url, batch=True))
        assert [len(made["lines"]) for made in server.batches.values()] == [22, 22]
    assert verdicts(tmp_path) == expected


def test_what_stays_unanswered_is_an_error_and_is_never_sent_live(tmp_path):
    write(tmp_path, rows(3))
    with BatchServer() as server:
        server.fault = lambda call: "expire" if server.batches else None
        result = run(config(tmp_path, server.url, batch=True))
        assert (result.judged, sum(result.errors.values()), server.paid.total()) == (1, 2, 2)
        server.fault = None
        assert run(config(tmp_path, server.url, batch=True)).judged == 2


def test_a_refused_request_is_an_error_of_its_own(tmp_path):
    write(tmp_path, rows(4))
    with BatchServer() as server:
        server.fault = lambda call: "400!too long" if server.batches and "number 2?" in call.text else None
        result = run(config(tmp_path, server.url, batch=True))
        assert (result.judged, result.errors, len(server.batches)) == (3, {"400: too long": 1}, 1)


def test_sent_and_left_to_be_taken_in_later(tmp_path, expected):
    write(tmp_path, rows(12))
    with BatchServer(seconds=1e9) as server:
        settings = config(tmp_path, server.url, batch=True, wait=False)
        assert run(settings).receipt.waiting == 22
        assert run(settings).receipt.waiting == 22
        with pytest.raises(UserError, match="22 requests wait in batches, and would be paid twice"):
            run(config(tmp_path, server.url))
        for made in server.batches.values():
            made["due"] = 0.0
        result = run(settings)
        assert (result.receipt.waiting, len(server.batches), server.paid_twice) == (0, 1, 0)
    assert verdicts(tmp_path) == expected


def test_shards_wait_for_room_in_the_queue(tmp_path, expected):
    write(tmp_path, rows(12))
    with BatchServer(seconds=0.05) as server:
        run(config(tmp_path, server.url, batch=True, batch_queue_tokens=6000))
        sizes = [server.files[made["input_file_id"]]["bytes"] / 3.5 for made in server.batches.values()]
        assert len(sizes) > 2
        assert max(sizes) <= 6000
        assert sorted(lines(server)) == sorted(set(lines(server)))
    assert verdicts(tmp_path) == expected


def test_limits_of_a_file(tmp_path, monkeypatch, expected):
    monkeypatch.setattr(batch, "MAX_REQUESTS", 10)
    write(tmp_path, rows(12))
    with BatchServer() as server:
        run(config(tmp_path, server.url, batch=True))
        assert [len(made["lines"]) for made in server.batches.values()] == [10, 10, 2]
        monkeypatch.setattr(batch, "MAX_BYTES", 20_000)
        write(tmp_path / "bytes", rows(12))
        run(config(tmp_path / "bytes", server.url, batch=True))
        assert max(file["bytes"] for file in server.uploads[3:]) <= 20_000
    assert verdicts(tmp_path) == verdicts(tmp_path / "bytes") == expected


def test_a_queue_that_is_smaller_than_it_was_said_to_be(tmp_path, expected):
    write(tmp_path, rows(12))
    log = Log()
    with BatchServer(queue_bytes=40_000) as server:
        judge.run(config(tmp_path, server.url, batch=True), log)
        assert server.paid_twice == 0
    assert any("the queue takes fewer tokens" in line for line in log.lines)
    assert verdicts(tmp_path) == expected


def test_a_batch_is_reserved_as_a_whole_and_the_next_run_goes_on(tmp_path, expected):
    write(tmp_path, rows(12))
    runs = 0
    with BatchServer() as server:
        settings = config(tmp_path, server.url, batch=True, price="0,0,1000000", max_tokens=60, max_usd=700)
        while True:
            runs += 1
            try:
                result = run(settings)
                break
            except UserError as error:
                assert error.code == Exit.BUDGET
                spent = float(str(error).partition("$")[2].partition(" ")[0].replace(",", ""))
                assert 640 < spent <= 700
        paid = [json.loads(line)["usd"] for line in (tmp_path / "judge.replies.jsonl").read_text().splitlines()]
        assert runs == -(-sum(paid) // 700) or runs == -(-sum(paid) // 640)
        assert (len(paid), server.paid_twice, result.receipt.failed) == (24, 0, 0)
    assert verdicts(tmp_path) == expected


def test_an_endpoint_without_batches_is_named(tmp_path):
    write(tmp_path, rows(2))
    with Server() as server, pytest.raises(UserError, match="no Batch API there") as raised:
        run(config(tmp_path, server.url, batch=True))
    assert raised.value.hint == "without --batch"


def test_batch_and_flex_exclude_each_other(tmp_path):
    write(tmp_path, rows(2))
    with pytest.raises(UserError, match="two tiers"):
        run(config(tmp_path, batch=True, flex=True))
