"""The judge stage: what is asked, what is believed, what is kept and what is paid."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from judging import LONG, MIDDLE, SHORT, Log, config, judgments, reply, row, rows, run, scripted, write
from openai_server import Server, first, shares
from raw_server import RawServer, says

from dpo_cli.config.settings import Config, GenerateSection, JudgeSection
from dpo_cli.data.jsonl import read_latest
from dpo_cli.data.records import Completions, Order
from dpo_cli.endpoint.shutdowns import SHUTDOWNS, shutdown_of, shutdown_warning
from dpo_cli.errors import UserError
from dpo_cli.judges import names
from dpo_cli.judges._forms import Verdict
from dpo_cli.judges._orders import OrderVerdict, aggregate, cyclic_orders, order_verdict, preference
from dpo_cli.judges._ranking import label_of
from dpo_cli.judges._request import request
from dpo_cli.judges._task import Task, make_task
from dpo_cli.judges._verdict import read_verdict
from dpo_cli.stages import judge

OPENAI = "https://api.openai.com/v1"


def task(*texts: str) -> Task:
    return make_task(row(1, *texts), lambda text: True)


# Aggregation


def test_scores_are_means_and_borda_points_break_ties():
    # A beats B and C in the first order (2 points); in the second B leads, C and A tie and the ranking puts A above C.
    orders = [Order([0, 1, 2], {"A": 8, "B": 6, "C": 5}, ""), Order([1, 2, 0], {"A": 9, "B": 7, "C": 7}, "")]
    verdicts = [Verdict({"A": 8, "B": 6, "C": 5}, ["A", "B", "C"]), Verdict({"A": 9, "B": 7, "C": 7}, ["A", "C", "B"])]
    preferences = [preference(order.order, verdict) for order, verdict in zip(orders, verdicts, strict=True)]
    assert preferences == [[0, 1, 2], [1, 0, 2]]
    scores, borda = aggregate([OrderVerdict(*one) for one in zip(orders, preferences, strict=True)])
    assert scores == {0: 7.5, 1: 7.5, 2: 6.0}
    assert borda == {0: (2 + 1) / 2, 1: (1 + 2) / 2, 2: 0}


def test_a_ranking_decides_between_equal_scores_and_never_against_unequal_ones():
    assert preference([2, 0, 1], Verdict({"A": 5, "B": 5, "C": 9}, ["B", "A", "C"])) == [1, 0, 2]


def test_thirds_do_not_break_ties():
    orders = [Order([0, 1], scores, "") for scores in ({"A": 1, "B": 7}, {"A": 1, "B": 1}, {"A": 7, "B": 1})]
    scores, _ = aggregate([OrderVerdict(order, [0, 1]) for order in orders])
    assert scores[0] == scores[1] == 3


@pytest.mark.parametrize(("count", "shifts"), [(2, [0, 1]), (3, [0, 1, 2]), (8, [0, 1, 2])])
def test_orders_are_cyclic_shifts_of_one_seeded_order(count, shifts):
    one = task("a", "b", "c")
    base, *_ = orders = cyclic_orders(one, count, seed=1)
    assert orders == [base[shift:] + base[:shift] for shift in shifts]
    assert sorted(base) == [0, 1, 2]
    assert orders == cyclic_orders(one, count, seed=1)


def test_orders_differ_between_prompts_and_seeds_and_are_evenly_spread():
    bases = Counter(
        tuple(cyclic_orders(make_task(one, lambda _: True), 1, seed)[0]) for one in rows(60) for seed in range(5)
    )
    assert len(bases) == 6
    assert min(bases.values()) > 25  # of 300, 50 expected
    four = cyclic_orders(task("a", "b", "c", "d"), 2, seed=1)
    assert four[1] == four[0][2:] + four[0][:2]


def test_labels_go_on_after_z():
    assert [label_of(place) for place in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]


@pytest.mark.parametrize("bonus", [1, 3])
def test_two_orders_cancel_a_preference_for_the_first_place(tmp_path, bonus):
    """One order ties or inverts two near candidates whenever the worse is shown first; two orders never do."""

    def biased(text: str, place: int) -> int:
        return (6 if text.startswith("[OTIS] better") else 5) + (bonus if place == 0 else 0)

    write(tmp_path, [row(number, f"[OTIS] worse {number}", f"[OTIS] better {number}") for number in range(12)])
    with Server(fault=scripted(biased)) as server:
        run(config(tmp_path, server.url))
        one = tmp_path / "one"
        write(one, list(read_latest(tmp_path / "completions.jsonl", Completions).values()))
        run(config(one, server.url, orders=1))
    assert {judgment.ranking[0] for judgment in judgments(tmp_path).values()} == {1}
    assert {judgment.scores[1] - judgment.scores[0] for judgment in judgments(tmp_path).values()} == {1}
    assert {judgment.scores[1] - judgment.scores[0] for judgment in judgments(one).values()} == {1 + bonus, 1 - bonus}
    # What the bias could invert is marked.
    assert {judgment.consistent for judgment in judgments(tmp_path).values()} == {bonus < 2}


# What is sent


def test_openai_gets_its_own_fields_and_others_only_what_all_know():
    def fields(model: str, url: str, **settings) -> dict:
        body = request(model, "hello", ["A", "B"], 99, JudgeSection(url=url, **settings))
        assert body.pop("messages") == [{"role": "user", "content": "hello"}]
        assert body.pop("model") == model
        assert body.pop("response_format")["json_schema"]["strict"] is True
        return body

    cap = {"max_completion_tokens": 99}
    assert fields("gpt-5.4-mini", OPENAI) == cap | {"reasoning_effort": "low"}
    assert fields("gpt-5.4-mini", OPENAI, reasoning_effort=None) == cap
    for model in ("gpt-5.6-luna", "gpt-6-luna", "gpt-5.10"):
        assert fields(model, OPENAI)["prompt_cache_options"] == {"mode": "explicit"}
    assert fields("gpt-5.6-luna", "http://127.0.0.1:8000/v1") == {"max_tokens": 99}


def test_the_schema_asks_for_evidence_first_and_every_label():
    body = request("m", "", ["A", "B"], 9, JudgeSection())
    schema = body["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == schema["required"] == ["rationale", "scores", "ranking"]
    scores = schema["properties"]["scores"]
    assert scores["required"] == list(scores["properties"]) == ["A", "B"]
    assert scores["properties"]["A"] == {"type": "integer", "enum": list(range(1, 11))}
    assert schema["properties"]["ranking"]["items"]["enum"] == ["A", "B"]
    assert schema["additionalProperties"] is scores["additionalProperties"] is False


def test_the_message_shows_rubric_prompt_and_candidates_verbatim(tmp_path):
    (tmp_path / "rubric.md").write_text("Prefer {umbrellas}.")
    write(tmp_path, [row(1, SHORT, MIDDLE)])
    with Server() as server:
        run(config(tmp_path, server.url, rubric=str(tmp_path / "rubric.md")))
    for body in server.bodies:
        (message,) = body["messages"]
        for text in ("Prefer {umbrellas}.", "Where is umbrella number 1?", SHORT, MIDDLE):
            assert text in message["content"]
    assert len(server.bodies) == 2


def test_down_the_ladder_once_and_for_all(tmp_path):
    write(tmp_path, rows(6))

    def fault(call):
        form = call.body.get("response_format")
        return "400!Invalid value for response_format" if form is not None else None

    with Server(fault=fault) as server:
        log = Log()
        result = judge.run(config(tmp_path, server.url), log)
    assert result.judged == 6
    assert [body["response_format"]["type"] for body in server.bodies[:3]] == ["json_schema"] * 2 + ["json_object"]
    assert [body["response_format"]["json_schema"].get("strict") for body in server.bodies[:2]] == [True, None]
    assert all("response_format" not in body for body in server.bodies[3:])
    assert len(server.bodies) == 3 + 12
    (line,) = log.lines
    assert "json_object; now plain text" in line


def test_a_refused_cap_takes_its_other_name_and_then_goes(tmp_path):
    write(tmp_path, rows(2))

    def fault(call):
        return next((f"400:{name}" for name in ("max_tokens", "max_completion_tokens") if name in call.body), None)

    with Server(fault=fault) as server:
        assert run(config(tmp_path, server.url)).judged == 2
    sent = [name for body in server.bodies for name in body if name.startswith("max_")]
    assert sent == ["max_tokens", "max_completion_tokens"]


# What is believed

GOOD = {"A": 3, "B": 8}


@pytest.mark.parametrize(
    "text",
    [
        reply(GOOD),
        reply({"A": 3.0, "B": 8}),
        "```json\n" + reply(GOOD) + "\n```",
        "Well then: " + reply(GOOD) + " and that is that {really}.",
        "<think>perhaps " + reply({"A": 9, "B": 1}) + "</think>" + reply(GOOD),
        reply(GOOD) + "\nOnce more: " + reply(GOOD),
        reply({"B": 8, "A": 3}),
        json.dumps({"scores": GOOD, "ranking": ["A", "B"]}),  # against its own scores: these rule
    ],
)
def test_a_verdict_is_found_among_other_words(text):
    assert read_verdict(text, ["A", "B"], ["x", "y"]).scores == GOOD


def wrapped(**parts) -> str:
    """The good verdict with some of its parts said otherwise."""
    return json.dumps({"rationale": "Why not.", "scores": GOOD, "ranking": ["B", "A"]} | parts)


LENIENT = {
    "raw line breaks": reply(GOOD).replace("Why not.", "A is flat.\nB:\tvivid.\r\n"),
    "raw line breaks in a code block": f"```json\n{reply(GOOD)}\n```".replace("Why not.", "A is flat.\nB is vivid."),
    "trailing commas": reply(GOOD).replace("]}", ",],}").replace("8}", "8,}"),
    "single quotes": str(json.loads(reply(GOOD))),
    "single quotes, apostrophe": str(json.loads(reply(GOOD))).replace("Why not.", "It's A's fault, isn't it"),
    "quotes that should be escaped": reply(GOOD).replace("Why not.", 'A says "no" and "why" twice.'),
    "typographic quotes": '{“scores”: {“A”: 3, “B”: 8}, “ranking”: [“B”, “A”]}',
    "no quotes": "{rationale: A is flat, scores: {A: 3, B: 8}, ranking: [B, A]}",
    "comments": '{"scores": {"A": 3, // flat\n "B": 8}, // vivid: 9?\n "ranking": ["B", "A"]}',
    "wrapped": '{"verdict": ' + reply(GOOD) + "}",
    "wrapped twice": '{"result": {"verdict": ' + reply(GOOD) + '}, "model": "m"}',
    "a list": "[" + reply(GOOD) + "]",
    "a string of JSON": json.dumps(reply(GOOD)),
    "lower case": wrapped(scores={"a": 3, "b": 8}, ranking=["b", "a"]),
    "candidate A": wrapped(scores={"candidate A": 3, "Candidate B": 8}, ranking=["candidate B", "candidate A"]),
    "keys in capitals": json.dumps({"Scores": GOOD, "RANKING": ["B", "A"]}),
    "A > B": wrapped(ranking="B > A"),
    "A > B in a list": wrapped(ranking=["B > A"]),
    "a numbered ranking": wrapped(ranking="1. B\n2. Candidate A"),
    "no ranking": json.dumps({"scores": GOOD}),
    "a ranking of null": wrapped(ranking=None),
    "strings": wrapped(scores={"A": "3", "B": "8"}),
    "of ten": wrapped(scores={"A": "3/10", "B": "8 out of 10"}),
    "objects": wrapped(scores={"A": {"score": 3, "why": "flat"}, "B": {"score": "8"}}),
    "a list of labels and scores": wrapped(scores=[{"label": "B", "score": 8}, {"label": "A", "score": 3}]),
    "a list that the ranking confirms": wrapped(scores=[3, 8]),
    "a ranking by rank": wrapped(ranking={"1": "B", "2": "A"}),
    "a ranking of ranks": wrapped(ranking={"A": 2, "B": 1}),
    "scores beside each other": '{"A": 3, "B": 8}',
    "all of each candidate": '{"A": {"rationale": "flat", "score": 3}, "B": {"rationale": "vivid", "score": 8}}',
    "ratings": '{"ratings": {"A": "3/10.", "B": 8}}',
    "the same one twice": reply(GOOD) + str(json.loads(reply(GOOD))),
}  # fmt: skip


@pytest.mark.parametrize("text", LENIENT.values(), ids=LENIENT.keys())
def test_what_says_the_same_is_the_same_verdict(text):
    found = read_verdict(text, ["A", "B"], ["x", "y"])
    assert found.scores == GOOD
    assert preference([0, 1], found) == [1, 0]


def test_scores_between_the_integers_are_kept():
    assert read_verdict(reply({"A": 3.5, "B": 8}), ["A", "B"], []).scores == {"A": 3.5, "B": 8}


def test_equal_scores_without_a_ranking_share_their_place():
    """The judge ranked B first in the first order, and said nothing of the two in the second: 1 and 0, then halves."""
    orders = [Order([0, 1], {"A": 5, "B": 5}, ""), Order([1, 0], {"A": 5, "B": 5}, "")]
    heard = [
        order_verdict(orders[0], Verdict({"A": 5, "B": 5}, ["B", "A"])),
        order_verdict(orders[1], Verdict({"A": 5, "B": 5}, [])),
    ]
    assert aggregate(heard[1:]) == ({0: 5, 1: 5}, {0: 0.5, 1: 0.5})
    assert aggregate(heard) == ({0: 5, 1: 5}, {0: 0.25, 1: 0.75})


INVALID = {
    "empty": "",
    "no JSON": "A is better than B.",
    "half a verdict": reply(GOOD)[:-12],
    "a label is missing": reply({"A": 3}, ["A", "B"]),
    "a label too many": reply({**GOOD, "C": 1}, ["A", "B"]),
    "zero": reply({"A": 0, "B": 8}),
    "eleven": reply({"A": 3, "B": 11}),
    "true": reply({"A": True, "B": 8}),
    "null": json.dumps({"scores": {"A": None, "B": 8}, "ranking": ["B", "A"]}),
    "NaN": '{"scores": {"A": NaN, "B": 8}, "ranking": ["B", "A"]}',
    "infinity": '{"scores": {"A": 1e999, "B": 8}, "ranking": ["B", "A"]}',
    "a ranking of one": reply(GOOD, ["B"]),
    "a ranking with a repetition": reply(GOOD, ["B", "B"]),
    "a ranking of numbers": json.dumps({"scores": GOOD, "ranking": [1, 2]}),
    "a score of a hundred": wrapped(scores={"A": "3/100", "B": "8/100"}),
    "a score in words": wrapped(scores={"A": "three", "B": "eight"}),
    "a label twice": '{"scores": {"A": 3, "a": 4, "B": 8}}',
    "a key twice": '{"scores": {"A": 3, "B": 8}, "scores": {"A": 9, "B": 8}}',
    "scores as a list": json.dumps({"scores": [3, 8]}),
    "a list that the ranking denies": wrapped(scores=[8, 3]),
    "scores by number": wrapped(scores={"1": 3, "2": 8}),
    "a ranking without scores": json.dumps({"ranking": ["B", "A"]}),
    "a ranking in words": wrapped(ranking="B is better"),
    "only thought": "<think>" + reply(GOOD),
    "two verdicts in a list": "[" + reply(GOOD) + "," + reply({"A": 9, "B": 1}) + "]",
    "open strings": '{"' * 20_000,
    "a ranking of equal ranks": wrapped(ranking={"A": 1, "B": 1}),
    "one of two beside each other": '{"A": 3}',
    "two verdicts": reply(GOOD) + reply({"A": 9, "B": 1}),
    "too deep": '{"scores": ' * 20_000,
    "too many braces": "{" * 20_000,
}


@pytest.mark.parametrize("text", INVALID.values(), ids=INVALID.keys())
def test_anything_else_is_no_verdict(text):
    with pytest.raises(ValueError, match=r"\w"):
        read_verdict(text, ["A", "B"], ["x", "y"])


@pytest.mark.parametrize("text", list(INVALID.values())[:6])
def test_an_invalid_reply_is_asked_again_once_and_becomes_an_error_never_a_score(tmp_path, text):
    write(tmp_path, [row(1, SHORT, LONG)])
    with Server(fault=lambda call: "reply!" + text) as server:
        result = run(config(tmp_path, server.url))
        assert server.calls.total() == 2
        (judgment,) = judgments(tmp_path).values()
        assert (judgment.scores, judgment.ranking, result.judged) == (None, None, 0)
        assert "no valid verdict" in judgment.error
        assert judgment.usage.input > 0
        # The next run asks anew: the ledger must not give it the same bad replies for ever.
        server.fault = None
        assert run(config(tmp_path, server.url)).judged == 1
    assert judgments(tmp_path)[judgment.id].ranking == [1, 0]
    assert len((tmp_path / "judgments.jsonl").read_text().splitlines()) == 1


def test_one_invalid_reply_is_mended_by_the_second(tmp_path):
    write(tmp_path, rows(4))
    with Server(fault=first(1, "reply!I would rather not count.")) as server:
        assert run(config(tmp_path, server.url)).judged == 4
        assert server.calls.total() == 16


def test_a_reply_cut_by_length_is_asked_again_at_twice_the_cap(tmp_path):
    write(tmp_path, [row(1, SHORT, LONG)])
    with Server(fault=lambda call: "cut" if call.body["max_tokens"] == 100 else None) as server:
        assert run(config(tmp_path, server.url, max_tokens=100)).judged == 1
    assert [body["max_tokens"] for body in server.bodies] == [100, 200, 100, 200]


def test_a_refusal_is_a_skip_with_its_reason_and_stays_one(tmp_path):
    write(tmp_path, [row(1, SHORT, LONG)])
    with Server(fault=lambda call: "refusal") as server:
        result = run(config(tmp_path, server.url))
        assert result.skipped == {"the judge refused": 1}
        assert "can't help" in next(iter(judgments(tmp_path).values())).skipped
        assert run(config(tmp_path, server.url)).owed == 0
        assert server.calls.total() == 1


def test_an_endpoint_without_the_model_stops_the_run_and_says_what_it_has(tmp_path):
    write(tmp_path, rows(3))
    with Server(models=["judge-large"]) as server, pytest.raises(UserError, match="no model 'judge-small'") as error:
        run(config(tmp_path, server.url))
    assert "judge-large" in str(error.value.hint)


# What is never shown


def test_identical_empty_and_formless_completions_are_scored_without_a_judge(tmp_path):
    texts = [MIDDLE, " \n", f"{MIDDLE} \n", "no script at all", LONG, "[OTIS] Cafe\u0301.", "[OTIS] Caf\u00e9."]
    write(tmp_path, [row(1, *texts)])
    with Server() as server:
        settings = config(tmp_path, server.url)
        settings.generate = GenerateSection(keep_lines=r"^\[[A-Z]+\] .+")
        run(settings)
    assert all("no script at all" not in body["messages"][0]["content"] for body in server.bodies)
    (judgment,) = judgments(tmp_path).values()
    assert [sorted(order.order) for order in judgment.orders] == [[0, 4, 5]] * 2
    assert judgment.scores == [1, 0, 1, 0, 4, 1, 1]
    assert judgment.ranking[0] == 4
    assert judgment.ranking[-2:] == [1, 3]


@pytest.mark.parametrize("texts", [(), (LONG,), (LONG, f" {LONG}\n"), (LONG, "", "  ")])
def test_nothing_to_compare_is_skipped_unpaid(tmp_path, texts):
    write(tmp_path, [row(1, *texts)])
    result = run(config(tmp_path))  # no server there
    assert (result.skipped, result.calls) == ({judge.TOO_FEW: 1}, 0)
    before = (tmp_path / "judgments.jsonl").read_bytes()
    assert run(config(tmp_path)).skipped == {}
    assert (tmp_path / "judgments.jsonl").read_bytes() == before


# Resume


def test_a_second_run_asks_nothing_and_changes_no_byte(tmp_path):
    write(tmp_path, rows(5))
    with Server() as server:
        one = run(config(tmp_path, server.url, price="1,0.1,10"))
        before = (tmp_path / "judgments.jsonl").read_bytes()
        two = run(config(tmp_path, server.url, price="1,0.1,10"))
        assert server.calls.total() == 10
    assert (two.owed, two.calls, two.done_before) == (0, 0, 5)
    assert (one.usage, one.usd) == (two.usage, two.usd)
    assert one.usd == pytest.approx((one.usage.input + 10 * one.usage.output) / 1e6)
    assert (tmp_path / "judgments.jsonl").read_bytes() == before


def test_raising_n_judges_only_what_changed(tmp_path):
    completions = rows(4)
    write(tmp_path, completions)
    with Server() as server:
        run(config(tmp_path, server.url))
        completions[1].completions.append("[OTIS] " + "Once more. " * 20)
        completions[1].finish_reasons.append("stop")
        write(tmp_path, completions)
        assert run(config(tmp_path, server.url), dry_run=True).calls == 2
        assert run(config(tmp_path, server.url)).owed == 1
    assert len(judgments(tmp_path)[completions[1].id].scores) == 4
    assert len((tmp_path / "judgments.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "judge-large"}, "judge.model was judge-small, now judge-large"),
        ({"orders": 3}, "judge.orders was 2, now 3"),
        ({"seed": 7}, "judge.seed was 42, now 7"),
        ({"rubric": "rubric.md"}, "judge.rubric was"),
        ({"judge": "function", "function": "json:dumps"}, "judge.judge was llm, now function"),
    ],
)
def test_another_judge_is_refused_by_the_names_of_what_differs(tmp_path, monkeypatch, changes, named):
    monkeypatch.chdir(tmp_path)
    Path("rubric.md").write_text("Prefer umbrellas.")
    write(tmp_path, rows(2))
    with Server() as server:
        run(config(tmp_path, server.url))
        before = (tmp_path / "judgments.jsonl").read_bytes()
        with pytest.raises(UserError, match="judged with other settings") as error:
            run(config(tmp_path, server.url, **changes))
        assert server.calls.total() == 4
    assert named in str(error.value)
    assert error.value.code == 2
    assert all(way in str(error.value.hint) for way in ("set that back", "--data", "rm "))
    assert (tmp_path / "judgments.jsonl").read_bytes() == before


def test_limit_and_dry_run(tmp_path):
    write(tmp_path, rows(5))
    with Server() as server:
        plan = run(config(tmp_path, server.url), limit=3, dry_run=True)
        assert (plan.total, plan.owed, plan.calls, server.calls.total()) == (3, 3, 6, 0)
        assert list(tmp_path.iterdir()) == [tmp_path / "completions.jsonl"]
        assert run(config(tmp_path, server.url), limit=3).judged == 3
        assert run(config(tmp_path, server.url)).judged == 2


RUN = "import msgspec, sys; from dpo_cli.stages import judge; from dpo_cli.config.settings import Config; "
RUN += "from dpo_cli.progress import Silent; judge.run(msgspec.json.decode(sys.argv[1], type=Config), Silent())"


def start(settings: Config) -> subprocess.Popen[bytes]:
    import msgspec

    return subprocess.Popen([sys.executable, "-c", RUN, msgspec.json.encode(settings).decode()])


def test_killed_and_run_again_it_ends_as_if_never_killed(tmp_path):
    write(tmp_path, rows(40))
    write(tmp_path / "whole", rows(40))
    faults = shares({"429:0": 0.05, "503": 0.05, "cut": 0.1})
    with Server(latency=0.03, fault=faults) as server:
        settings = config(tmp_path, server.url)
        for lines in (1, 12, 25):
            process = start(settings)
            while process.poll() is None and _lines(tmp_path / "judgments.jsonl") < lines:
                time.sleep(0.005)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        run(settings)
        assert server.paid_twice <= 3 * settings.judge.concurrency
        assert not any(one.error for one in judgments(tmp_path).values())
    with Server() as server:
        run(config(tmp_path / "whole", server.url))
    scores = {key: (one.scores, one.ranking) for key, one in judgments(tmp_path).items()}
    assert scores == {key: (one.scores, one.ranking) for key, one in judgments(tmp_path / "whole").items()}
    assert _lines(tmp_path / "judgments.jsonl") == 40


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Models


def test_models_with_an_announced_end_are_accepted_with_a_date():
    assert "shuts down on 2026-12-11; take x" in shutdown_warning("gpt-5-mini", date(2026, 11, 20), "take x")
    assert "was to shut down" in shutdown_warning("gpt-5-mini", date(2027, 1, 1), "take x")
    assert shutdown_warning("my-own-model", date(2026, 11, 20), "take x") is None
    assert shutdown_of("openai/o4-mini") == shutdown_of("ft:o4-mini-2025-04-16:mine::1") == date(2026, 10, 23)
    listed = {"gpt-5-mini": "2030-01-01", "mine": "2031-02-03T00:00:00Z", "odd": "soon"}
    assert shutdown_of("gpt-5-mini", listed) == date(2030, 1, 1)
    assert shutdown_of("mine", listed) == date(2031, 2, 3)
    assert shutdown_of("odd", listed) is None


def test_the_table_of_shutdowns_has_no_hole():
    """Against the deprecations that OpenAI's own SDK lists, where that is installed."""
    package = importlib.util.find_spec("openai")
    if package is None:
        pytest.skip("needs the package openai")
    text = (Path(package.origin).parent / "types/shared/chat_model.py").read_text().partition('"""Deprecated')[2]
    theirs = {}
    for entry in re.split(r"\n- ", text)[1:]:
        if day := re.search(r"shutdown\s+date:\s+([0-9-]+)", entry):
            theirs |= dict.fromkeys(re.findall(r'"([^"]+)"', entry.partition("Announced")[0]), day[1])
    ours = {name: day for day, names in SHUTDOWNS.items() for name in names}
    assert len(theirs) > 50
    assert theirs.items() <= ours.items()


def test_the_warning_reaches_the_log(tmp_path):
    write(tmp_path, [row(1, SHORT, LONG)])
    log = Log()
    with Server() as server:
        judge.run(config(tmp_path, server.url, model="gpt-5"), log)
    assert "2026-12-11" in log.lines[0]
    assert judgments(tmp_path)


def test_an_end_that_the_endpoint_lists_wins_over_the_table(tmp_path):
    write(tmp_path, [row(1, SHORT, LONG)])
    log = Log()

    def respond(request):
        listing = {"data": [{"id": "mine", "shutdown_date": "2031-02-03"}, {"id": "other", "shutdown_date": None}]}
        return 200, {}, json.dumps(listing).encode() if request.method == "GET" else says(reply({"A": 1, "B": 9}))

    with RawServer(respond) as server:
        judge.run(config(tmp_path, server.url, model=["mine", "other"]), log)
    assert [line for line in log.lines if "shuts down" in line] == [
        f"mine shuts down on 2031-02-03; the default judge model is {JudgeSection().model}"
    ]


def test_the_default_judge_is_of_the_gpt_5_generation_and_stays():
    model = JudgeSection().model
    assert model.startswith("gpt-5")
    assert shutdown_of(model) is None


def test_every_judge_is_a_file():
    assert {"llm", "function"} <= set(names())
    assert "_wire" not in names()
