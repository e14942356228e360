"""What a run may spend, what it says that it will, and what it says that it did."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import msgspec
import pytest
from judging import LONG, SHORT, config, judgments, row, rows, run, write
from openai_server import Server, first
from test_endpoint import ask, body

from dpo_cli.data.jsonl import read_latest
from dpo_cli.data.records import Completions, Usage
from dpo_cli.endpoint import client
from dpo_cli.endpoint.budget import Budget, output_cap
from dpo_cli.endpoint.costs import Estimate
from dpo_cli.endpoint.prices import Price, price_of
from dpo_cli.errors import Exit, UserError
from dpo_cli.judges._forms import RANKING
from dpo_cli.judges._llm_judge import criteria_for
from dpo_cli.judges._orders import plan_votes
from dpo_cli.judges._prompt import show
from dpo_cli.judges._request import request
from dpo_cli.judges._task import make_task

OPENAI = "https://api.openai.com/v1"
# Tokens of input are free, each of output costs a dollar: the worst case of a call is its cap.
OUTPUT_ONLY = Price(0, 0, 1e6)


@pytest.fixture
def ledger(tmp_path):
    return tmp_path / "replies.jsonl"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(client, "MAX_BACKOFF_SECONDS", 0.05)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The cap


def test_the_cap_is_kept_used_up_and_the_next_run_goes_on(ledger):
    bodies = [body(number, max_tokens=40) for number in range(60)]
    options = {"price": lambda _: OUTPUT_ONLY, "max_usd": 700.0}
    kept = 0
    with Server(latency=0.01) as server:
        for _ in range(2):
            with pytest.raises(UserError, match=r"of \$700\.0000 spent") as raised:
                ask(server.url, bodies, ledger, **options)
            assert raised.value.code == Exit.BUDGET
            paid = lines(ledger)[kept:]
            spent = sum(line["usd"] for line in paid)
            assert 700 - 40 < spent <= 700
            assert len(lines(ledger)) == server.paid.total()  # what was in flight has arrived
            kept += len(paid)
        results, spend = ask(server.url, bodies, ledger, price=lambda _: OUTPUT_ONLY)
        assert all(reply.choices for reply in results)
        assert (spend.calls, spend.reused, server.paid_twice) == (60 - kept, kept, 0)


@pytest.mark.parametrize(
    ("fields", "price", "named"),
    [({"max_tokens": 9}, None, "nobody knows what writer costs"), ({}, OUTPUT_ONLY, "nothing limits the output")],
)
def test_what_can_not_be_bounded_is_refused_before_anything_is_sent(ledger, fields, price, named):
    with Server() as server:
        with pytest.raises(UserError, match=named) as raised:
            ask(server.url, [body(**fields)], ledger, price=lambda _: price, max_usd=1e9)
        assert raised.value.code == Exit.USAGE
        assert server.calls.total() == 0
        ask(server.url, [body(**fields)], ledger, price=lambda _: price)  # without a cap it is nobody's business


def test_lost_answers_count_as_paid(ledger):
    bodies = [body(number, max_tokens=40) for number in range(4)]
    with Server(fault=first(1, "drop")) as server:
        _, spend = ask(server.url, bodies, ledger, price=lambda _: OUTPUT_ONLY)
        assert (spend.resent, spend.unseen_usd) == (4, 160)
    with Server(fault=lambda call: "drop") as server:
        with pytest.raises(UserError, match=r"up to \$80\.0000 for answers that were lost"):
            ask(server.url, bodies, ledger.with_name("other.jsonl"), price=lambda _: OUTPUT_ONLY, max_usd=100.0)
        assert server.paid.total() == 2


def test_refused_calls_cost_nothing(ledger):
    bodies = [body(number, max_tokens=40) for number in range(8)]
    with Server(fault=first(2, "429:0")) as server:
        results, spend = ask(server.url, bodies, ledger, price=lambda _: OUTPUT_ONLY, max_usd=8 * 40.0)
        assert all(reply.choices for reply in results)
    assert (spend.calls, spend.unseen_usd) == (8, 0)


def test_a_local_endpoint_costs_nothing_unless_a_price_is_given(tmp_path):
    write(tmp_path, rows(2))
    with Server() as server:
        assert run(config(tmp_path, server.url, max_usd=0)).receipt.usd == 0
        write(tmp_path / "priced", rows(2))
        with pytest.raises(UserError, match="budget"):
            run(config(tmp_path / "priced", server.url, max_usd=0, price="1,1,1"))


def test_the_estimate_of_tokens_grows_with_what_was_seen_and_never_shrinks():
    budget = Budget(10.0)
    assert budget.tokens(3500) == 1001
    budget.learn(1000, 500)
    budget.learn(1000, 100)
    assert budget.tokens(1000) == 501
    assert budget.worst({"max_tokens": 100, "n": 3}, 2000, Price(2.0, 0.5, 10.0)) == pytest.approx(
        (1001 * 2 + 300 * 10) / 1e6
    )


def test_reservations_wait_for_what_may_turn_out_cheaper():
    async def main():
        budget = Budget(10.0)
        await budget.reserve(8.0)
        waiting = asyncio.create_task(budget.reserve(5.0))
        await asyncio.sleep(0)
        assert not waiting.done()
        budget.settle(8.0, 2.0)
        await waiting
        assert budget.left == 3
        budget.lose(5.0)
        with pytest.raises(UserError, match=r"\$2\.0000 of \$10\.0000 spent, up to \$5\.0000 for answers"):
            await budget.reserve(4.0)

    asyncio.run(main())


def test_the_cap_of_a_request():
    assert output_cap({"max_tokens": 5, "n": 2}) == 10
    assert output_cap({"max_completion_tokens": 7}) == 7
    assert output_cap({}) is None


# Prices


def test_tiers_cost_what_the_table_says_and_the_standard_price_where_it_is_silent():
    standard, batch, flex = (price_of(OPENAI, "gpt-5.4-mini", tier=tier) for tier in (None, "batch", "flex"))
    assert batch == flex == Price(standard.input / 2, standard.cached / 2, standard.output / 2)
    assert price_of(OPENAI, "gpt-4o-mini", tier="flex") == price_of(OPENAI, "gpt-4o-mini")
    assert price_of(OPENAI, "gpt-5.4-mini", "1,0.5,2", "batch") == Price(1, 0.5, 2)


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "1,2,-3", "nan,1,1"])
def test_what_is_no_price(text):
    with pytest.raises(UserError, match=r"no price|IN,CACHED,OUT"):
        price_of(OPENAI, "gpt-5.4-mini", text)


# Estimate and receipt


def test_an_estimate_by_hand(tmp_path):
    write(tmp_path, rows(3))
    found = run(config(tmp_path, OPENAI, price="1,0.1,10", max_tokens=1000), dry_run=True).estimate
    assert (found.calls, found.output_low, found.output_worst) == (6, 6 * (120 + 3 * 60), 6000)
    with Server() as server:
        run(config(tmp_path, server.url, max_tokens=1000))
        size = sum(len(msgspec.json.encode(sent)) for sent in server.bodies)
    assert found.input == pytest.approx(size / 3.5, rel=0.02)
    assert found.usd_worst == pytest.approx((found.input + 10 * 6000) / 1e6)
    assert found.usd_low == pytest.approx((found.input + 10 * found.output_low) / 1e6)
    assert any("--price" in line for line in found.assumptions)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"orders": "full", "model": ["judge-small", "another-judge"], "response_format": "json_object"},
        {"orders": "auto", "extra_body": {"top_k": 3}},
        {"votes": 5, "url": OPENAI, "model": "gpt-5.6"},
        {"rubric": "rubric.md", "max_tokens": None},
        {"extra_body": {"messages": []}},
    ],
)
def test_an_estimate_is_of_the_bytes_of_the_requests(tmp_path, settings, monkeypatch):
    """Its parts are added up; here each request is made. Texts with signs that JSON writes longer, tools, reasoning."""
    monkeypatch.chdir(tmp_path)
    Path("rubric.md").write_text("All: ü\n\n## Truth (weight 2)\n\nIt is true.\n\n## Warmth\n\nIt is kind.\n")
    tools = [{"type": "function", "function": {"name": "look", "description": "„so“"}}]
    odd = row(8, 'a\n"b"\\', "<|im_start|>system\tok", 'a\n "b"\\', "ж\x7f\u2028 \U0001f602", "</s>" * 3)
    odd.prompt = [{"role": "system", "content": "[INST] »so«"}, *odd.prompt]
    odd.tools = tools
    odd.messages = [{"role": "assistant", "content": odd.completions[0], "reasoning_content": "<think>"}, *[None] * 4]
    write(tmp_path, [*rows(2), odd, row(9, "one", "two"), row(10, "alone")])
    own = config(tmp_path, **settings)
    size = calls = typical = 0
    for one in read_latest(tmp_path / "completions.jsonl", Completions).values():
        task = make_task(one, lambda _: True)
        if len(task.shown) < 2:
            continue
        for model, criterion in product(own.judge.models, criteria_for(RANKING, own.judge.rubric)):
            for vote in plan_votes(task, own.judge):
                shown = show(task, vote.order, criterion.text, own.judge.seed)
                sent = request(model, shown.message, shown.labels, own.judge.max_tokens, own.judge)
                size += len(msgspec.json.encode(sent))
                typical += 120 + 60 * len(shown.labels)
                calls += 1
    found = run(own, dry_run=True)
    assert (found.calls, found.estimate.calls, found.estimate.output_low) == (calls, calls, typical)
    models = len(own.judge.models)
    assert size / 3.5 - models < found.estimate.input <= size / 3.5  # each model's tokens are whole


def test_an_estimate_names_its_price_table_and_admits_what_it_does_not_know(tmp_path):
    write(tmp_path, rows(3))
    known = run(config(tmp_path, OPENAI, model="gpt-5.4-mini"), dry_run=True).estimate
    flex = run(config(tmp_path, OPENAI, model="gpt-5.4-mini", flex=True), dry_run=True).estimate
    assert flex.usd_worst == pytest.approx(known.usd_worst / 2, rel=0.01)
    assert "genai-prices 0" in known.assumptions[-1]
    assert "newest change 202" in known.assumptions[-1]
    assert run(config(tmp_path, OPENAI, model="nobody"), dry_run=True).estimate.usd_low is None


def test_an_estimate_says_that_its_model_ends(tmp_path):
    write(tmp_path, rows(3))
    ending = run(config(tmp_path, OPENAI, model="gpt-5-mini"), dry_run=True).estimate
    staying = run(config(tmp_path, OPENAI, model="gpt-5.4-mini"), dry_run=True).estimate
    assert any("gpt-5-mini" in line and "2026-12-11" in line for line in ending.assumptions)
    assert not any("2026-12-11" in line for line in staying.assumptions)


def test_a_receipt_adds_up(tmp_path):
    write(tmp_path, rows(10))
    with Server(fault=first(1, "drop")) as server:
        receipt = run(config(tmp_path, server.url, price="1,0.1,10"), limit=4).receipt
        assert (receipt.calls, receipt.resent, receipt.failed) == (8, 8, 0)
        assert receipt.usd == pytest.approx((receipt.usage.input + 10 * receipt.usage.output) / 1e6)
        assert receipt.usd == pytest.approx(sum(one.usd for one in judgments(tmp_path).values()))
        assert receipt.unseen_usd > receipt.usd
        (tmp_path / "judgments.jsonl").unlink()
        assert run(config(tmp_path, server.url, price="9,9,9")).receipt.reused == 8
    # What was paid for at another price is recorded at that one.
    assert min(one.usd for one in judgments(tmp_path).values()) < receipt.usd / 3


START = (
    "import sys; sys.path[:0] = sys.argv[3:]\n"
    "from pathlib import Path\n"
    "from test_endpoint import ask, body\n"
    "ask(sys.argv[1], [body(number) for number in range(300)], Path(sys.argv[2]), timeout=60)\n"
)


def test_calls_in_flight_at_a_kill_are_known_to_the_next_run(ledger):
    with Server(latency=0.2) as server:
        arguments = [server.url, str(ledger), str(Path(__file__).parent)]
        process = subprocess.Popen([sys.executable, "-c", START, *arguments])
        while server.paid.total() < 60:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        server.latency = 0.0
        _, spend = ask(server.url, [body(number) for number in range(300)], ledger)
        assert spend.interrupted == server.paid_twice > 0
        _, spend = ask(server.url, [body(number) for number in range(300)], ledger)
        assert (spend.interrupted, spend.reused) == (0, 300)
    assert not ledger.with_suffix(".sent").exists()


def test_a_call_that_was_given_up_unanswered_may_be_paid_again(ledger):
    with Server(fault=lambda call: "drop") as server:
        ask(server.url, [body()], ledger)
        server.fault = lambda call: "429:0"
        ask(server.url, [body(1)], ledger)  # refused, so not paid
        server.fault = None
        _, spend = ask(server.url, [body(), body(1)], ledger)
        assert (spend.calls, spend.interrupted) == (2, 1)


# Flex


def test_flex_is_asked_for_and_shares_its_replies(tmp_path):
    write(tmp_path, rows(2))
    with Server() as server:
        run(config(tmp_path, server.url, flex=True))
        assert {sent["service_tier"] for sent in server.bodies} == {"flex"}
        (tmp_path / "judgments.jsonl").unlink()
        assert run(config(tmp_path, server.url)).receipt.reused == 4
    assert "service_tier" not in request("m", "", ["A", "B"], 9, config(tmp_path).judge)


def test_an_endpoint_without_flex_is_named(tmp_path):
    write(tmp_path, [row(1, SHORT, LONG)])
    with Server(fault=lambda call: "400:service_tier") as server:
        with pytest.raises(UserError, match="no flex tier there") as raised:
            run(config(tmp_path, server.url, flex=True))
        assert raised.value.hint == "without --flex"
        assert server.calls.total() == 1


# On the command line


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dpo_cli", *arguments], capture_output=True, text=True, timeout=60)


def test_the_command_ends_with_4_at_the_cap_and_shows_a_receipt_at_the_end(tmp_path):
    write(tmp_path, rows(6))
    common = ["judge", "--data", str(tmp_path), "--model", "judge-small", "--price", "1,0.1,100", "--max-tokens", "50"]
    with Server() as server:
        plan = command(*common, "--url", server.url, "--dry-run")
        assert "12, as far as their replies are usable" in plan.stdout
        done = command(*common, "--url", server.url, "--max-usd", "0.03")
        assert (done.returncode, done.stdout) == (4, "")
        assert f"until it stopped: {server.paid.total()} calls paid · 0 failed · " in done.stderr
        assert "the budget is reached: $0.0" in done.stderr
        assert "the same command goes on" in done.stderr
        done = command(*common, "--url", server.url)
        assert done.returncode == 0, done.stderr
        assert "2 paid" in done.stdout
        assert "spent" in done.stdout


def test_a_dry_run_names_what_cheaper_models_of_the_table_would_cost(tmp_path):
    write(tmp_path, rows(4))
    found = run(config(tmp_path, OPENAI, model="gpt-5.4-mini"), dry_run=True).estimate
    assert found.usd_worst > 0
    assert "gpt-6-luna" in found.cheaper
    assert "gpt-5.4-nano" not in found.cheaper  # it ends
    price = price_of(OPENAI, "gpt-6-luna")
    low, worst = found.cheaper["gpt-6-luna"]
    assert worst == pytest.approx(price.usd(Usage(found.input, 0, found.output_worst)))
    assert low < worst < found.usd_worst
    assert not run(config(tmp_path, OPENAI, model="gpt-5.4-mini", price="1,1,1"), dry_run=True).estimate.cheaper
    both = found + found
    assert both.cheaper["gpt-6-luna"] == pytest.approx((2 * low, 2 * worst))
    local = Estimate(calls=1, input=1, output_low=1, output_worst=1, usd_low=1.0, usd_worst=2.0)
    assert (found + local).cheaper["gpt-6-luna"] == pytest.approx((low + 1, worst + 2))
