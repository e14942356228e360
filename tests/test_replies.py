"""What endpoints reply: each part read for itself, no good reply thrown away, what is no answer never taken for one.

The replies are written down from what servers and providers document or have in their sources: content in parts from
Mistral's reasoning models, `reasoning_content` from vLLM and SGLang, `reasoning` from Ollama and OpenRouter, error
choices from OpenRouter, `abort` from vLLM, filtered replies without choices from Azure.
"""

import gzip
import json
import stat

import pytest
from judging import config as judge_config
from judging import rows as judged_rows
from judging import run as run_judge
from judging import write as write_completions
from openai_server import Server
from raw_server import RawServer, completion, says
from test_evaluate_judged import ask
from test_evaluate_judged import config as evaluate_config
from test_evaluate_judged import run as run_evaluation
from test_generate import Lines, folder, rows, run, texts  # noqa: F401
from test_quiz import quiz  # noqa: F401
from test_quiz import run as run_quiz

from dpo_cli.data.jsonl import read_latest
from dpo_cli.data.records import Usage
from dpo_cli.endpoint import client, http
from dpo_cli.endpoint.ledger import _Paid
from dpo_cli.endpoint.responses import (
    ABORTED,
    CUT_IN_REASONING,
    EMPTY,
    FILTERED,
    IN_REASONING,
    SERVER_ERROR,
    TOOL_CALLS,
    after_thinking,
    read_reply,
)
from dpo_cli.errors import UserError
from dpo_cli.stages.serve_config.server import listed
from dpo_cli.training.template_check import _tokenize


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(client, "MAX_BACKOFF_SECONDS", 0.05)


TEXT = "[OTIS] It was raining."
USAGE = {"prompt_tokens": 20, "completion_tokens": 5}
THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
HALF = '{"choices": [{"index": 0, "message": {"content": "a \\ud83d b"}, "finish_reason": "stop"}]}'
STREAM = b"""\
data: {"model": "writer", "choices": [{"index": 0, "delta": {"role": "assistant", "content": "[OTIS] It"}}]}

data: {"choices": [{"index": 0, "delta": {"content": " was raining."}, "finish_reason": "stop"}]}

data: {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 5}}

data: [DONE]
"""

READABLE = {
    "usage null": says(TEXT, usage=None),
    "usage {}": says(TEXT, usage={}),
    "usage text": says(TEXT, usage={"prompt_tokens": "20", "completion_tokens": "5"}),
    "usage float": says(TEXT, usage={"prompt_tokens": 20.0, "completion_tokens": 5.0}),
    "usage negative": says(TEXT, usage={"prompt_tokens": -1, "completion_tokens": -5}),
    "usage list": says(TEXT, usage=[1, 2]),
    "details text": says(TEXT, usage=USAGE | {"prompt_tokens_details": "none"}),
    "index null": says(TEXT).replace(b'"index":0', b'"index":null'),
    "index text": says(TEXT).replace(b'"index":0', b'"index":"0"'),
    "no index": says(TEXT).replace(b'"index":0,', b""),
    "parts": completion({"content": [{"type": "text", "text": text} for text in ("[OTIS] It", " was raining.")]}),
    "thinking apart": completion({"content": [THINKING, {"type": "text", "text": TEXT}]}),
    "reasoning beside": completion({"content": TEXT, "reasoning_content": "Hm."}),
    "finish reason null": completion({"content": TEXT}, None),
    "finish reason number": completion({"content": TEXT}, 7),
    "unknown fields": says(TEXT, x_groq={"id": 1}, service_tier=None, citations=[None]),
    "model null": says(TEXT, model=None),
    "log-probs NaN": says(TEXT).replace(b'"index":0', b'"index":0,"logprobs":{"content":[{"logprob":NaN}]}'),
    "not UTF-8": says(TEXT).replace(b'"id":"x"', b'"id":"\xff"'),
    "raw newline": says("[OTIS] It was\nraining.").replace(b"\\n", b"\n"),
    "in a list": b"[" + says(TEXT) + b"]",
    "message a text": completion(TEXT),
    "a stream": STREAM,
    "a byte order mark": b"\xef\xbb\xbf" + says(TEXT),
    "something behind it": says(TEXT) + b"\n\n[proxy: 12 ms]",
    "a delta": says(TEXT).replace(b'"message"', b'"delta"'),
}


@pytest.mark.parametrize("name", READABLE)
def test_a_paid_reply_is_read_however_it_is_written(folder, name):  # noqa: F811
    with RawServer(lambda _: (200, {}, READABLE[name])) as server:
        result = run(server, limit=1, generate__n=1)
        assert len(server.requests) == 1
    assert (result.failed, result.error) == (0, None)
    ((text,),) = texts(folder).values()
    assert text.replace("\n", " ") == TEXT
    (row,) = rows(folder).values()
    assert row.usage.input > 0
    assert row.usage.output > 0


def test_half_of_a_surrogate_pair_costs_one_character(folder):  # noqa: F811
    with RawServer(lambda _: (200, {}, HALF.encode())) as server:
        run(server, limit=1, generate__n=1)
    assert list(texts(folder).values()) == [["a \ufffd b"]]


def test_choices_are_in_the_order_of_their_index():
    def choice(index, text):
        return {"index": index, "message": {"content": text}, "finish_reason": "stop"}

    def order(*indices):
        body = json.dumps({"choices": [choice(index, str(place)) for place, index in enumerate(indices)]})
        return [one.text for one in read_reply(body.encode()).choices]

    assert order(2, 0, 1) == ["1", "2", "0"]
    assert order("1", "0") == ["1", "0"]
    assert order(None, None) == ["0", "1"]


def test_reasoning_and_tool_calls_are_kept(folder):  # noqa: F811
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "sea"}'}}
    message = {"content": TEXT, "reasoning": "Hm.", "tool_calls": [call]}
    with RawServer(lambda _: (200, {}, completion(message))) as server:
        run(server, limit=1, generate__n=1)
    (row,) = rows(folder).values()
    assert row.completions == [TEXT]
    (kept,) = row.messages
    assert kept["reasoning_content"] == "Hm."
    assert kept["tool_calls"][0]["function"]["name"] == "look"


NO_ANSWERS = {
    IN_REASONING: completion({"content": None, "reasoning_content": TEXT}),
    f"{IN_REASONING} ": completion({"content": " \n", "reasoning": TEXT}),
    CUT_IN_REASONING: completion({"content": None, "reasoning": TEXT}, "length"),
    f"{CUT_IN_REASONING} ": completion({"content": f"<think>{TEXT}"}, "length"),
    TOOL_CALLS: completion({"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}),
    EMPTY: completion({"content": ""}),
    f"{EMPTY} ": completion({"content": []}),
    f"{EMPTY}  ": completion({"content": f"<think>{TEXT}</think>\n"}),
    SERVER_ERROR: completion({"content": "[OTIS] It"}, "error"),
    f"{SERVER_ERROR} ": says(TEXT).replace(b'"index":0', b'"index":0,"error":{"code":502,"message":"Upstream"}'),
    f"{SERVER_ERROR}  ": completion(None),
    ABORTED: completion({"content": "[OTIS] It"}, "abort"),
    FILTERED: completion({"content": "[OTIS] It"}, "content_filter"),
}


@pytest.mark.parametrize("name", NO_ANSWERS)
def test_what_is_no_answer_is_no_completion_and_is_counted_by_its_kind(folder, name):  # noqa: F811
    content = [NO_ANSWERS[name]]
    with RawServer(lambda _: (200, {}, content[0])) as server:
        result = run(server, limit=3, generate__n=1)
        assert 3 <= len(server.requests) <= 6  # each once more, where that may help
        assert result.missing == {name.strip(): 3}
        assert (result.failed, result.completions, rows(folder)) == (3, 0, {})
        content[0] = says(TEXT)  # the same requests to the same server, mended
        assert run(server, limit=3, generate__n=1).completions == 3


def test_where_no_reply_is_an_answer_the_run_ends_and_says_why(folder):  # noqa: F811
    with RawServer(lambda _: (200, {}, NO_ANSWERS[IN_REASONING])) as server:
        with pytest.raises(UserError, match=IN_REASONING) as raised:
            run(server, generate__n=1, generate__concurrency=1)
        assert len(server.requests) == client.NO_ANSWER_IN_A_ROW
    assert "enable_thinking" in raised.value.hint


def test_of_several_completions_the_good_ones_are_kept_and_the_rest_is_owed(folder):  # noqa: F811
    def fault(call):
        return "empty" if call.body["n"] == 1 else None

    def spoil(server):
        answer = server._answer

        def spoiled(call, fault):
            reply = answer(call, fault)
            if call.body["n"] == 3:
                reply["choices"][1]["message"]["content"] = ""
            return reply

        server._answer = spoiled

    with Server(fault=fault) as server:
        spoil(server)
        result = run(server, limit=2)
        assert (result.failed, result.completions, result.missing) == (2, 4, {EMPTY: 2})
        assert [len(found) for found in texts(folder).values()] == [2, 2]
        server.fault = None
        calls = server.calls.total()
        result = run(server, limit=2)
        assert server.calls.total() - calls <= 4  # one more each, and once again where it is a twin
    assert [len(set(found)) for found in texts(folder).values()] == [3, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"choices": []}', "no choices"),
        (b'{"answer": "yes"}', "none of its fields is `choices`: answer"),
        (b'{"message": {"content": "hello"}, "done": true}', "none of its fields is `choices`: message, done"),
        (b'"hello"', "str"),
        (b"", "an empty reply"),
        (b"upstream connect error", "no JSON, but 'upstream connect error'"),
        (b'{"error": {"message": "no slot available", "type": "overloaded"}}', "no slot available"),
        (b'{"object": "error", "message": "broken", "code": null}', "broken"),
    ],
)
def test_a_complete_reply_of_another_shape_is_asked_for_once(folder, content, said):  # noqa: F811
    with RawServer(lambda _: (200, {}, content)) as server:
        result = run(server, limit=1, generate__n=1)
        assert len(server.requests) == 1
    assert result.failed == 1
    assert said in result.error


def test_what_can_not_be_read_is_kept_counted_once_and_read_by_a_version_that_can(folder, monkeypatch):  # noqa: F811
    odd = b'{"answer": "[OTIS] It was raining.", "usage": {"prompt_tokens": 20, "completion_tokens": 5}}'
    with RawServer(lambda _: (200, {}, odd)) as server:
        result = run(server, limit=1, generate__n=1, generate__price="1,1,2")
        assert result.receipt.calls == 1
        assert result.receipt.usd == pytest.approx(30e-6)
        assert result.receipt.unseen_usd == 0
        (paid,) = read_latest(folder / "data/dpo/generate.replies.jsonl", _Paid).values()
        assert paid.raw == odd.decode()

        def later(content):
            return read_reply(says(json.loads(content)["answer"]))

        monkeypatch.setattr("dpo_cli.endpoint.ledger.read_reply", later)
        run(server, limit=1, generate__n=1)
        assert len(server.requests) == 1
    assert list(texts(folder).values()) == [[TEXT]]


def test_what_is_cut_off_every_time_is_kept_as_well(folder, monkeypatch):  # noqa: F811
    torn = says(TEXT)[:-20]
    with RawServer(lambda _: (200, {}, torn)) as server:
        result = run(server, limit=1, generate__n=1, generate__price="1,1,2")
        assert len(server.requests) == 1 + client.RESENDS
        assert run(server, limit=1, generate__n=1).failed == 1  # it is no answer
    (paid,) = read_latest(folder / "data/dpo/generate.replies.jsonl", _Paid).values()
    assert paid.raw == torn.decode()
    assert (result.receipt.usd, result.receipt.unseen_usd > 0) == (0, True)


@pytest.mark.parametrize(
    ("said", "read"), [("MAX_TOKENS", "length"), ("end_turn", "stop"), ("SAFETY", "content_filter"), ("odd", "odd")]
)
def test_finish_reasons_in_other_words(said, read):
    assert read_reply(completion({"content": TEXT}, said)).choices[0].finish_reason == read


def test_empty_replies_in_an_old_ledger_are_no_answers(folder):  # noqa: F811
    with Server(fault=lambda _: "empty") as server:
        run(server, limit=1, generate__n=1)
        ledger = folder / "data/dpo/generate.replies.jsonl"
        old = [json.loads(line) for line in ledger.read_text().splitlines()]
        ledger.write_text("".join(json.dumps({**row, "raw": ""}) + "\n" for row in old))
        server.fault = None
        assert run(server, limit=1, generate__n=1).completions == 1


def test_after_thinking():
    assert after_thinking("<think>a</think> b ") == "b"
    assert after_thinking("a</think>b</think>c") == "c"
    assert after_thinking("<think>a") == ""
    assert after_thinking(" b <think> ") == "b <think>"


# Judges, evaluations, quizzes


@pytest.mark.parametrize("name", [IN_REASONING, CUT_IN_REASONING, EMPTY, SERVER_ERROR])
def test_what_is_no_answer_is_no_verdict(tmp_path, name):
    write_completions(tmp_path, judged_rows(2))
    verdict = json.dumps({"rationale": "r", "scores": {"A": 9, "B": 1, "C": 5}, "ranking": ["A", "C", "B"]})
    content = NO_ANSWERS[name].replace(json.dumps(TEXT)[1:-1].encode(), json.dumps(verdict)[1:-1].encode())
    with RawServer(lambda _: (200, {}, content)) as server:
        result = run_judge(judge_config(tmp_path, server.url))
        assert sum(one.method == "POST" for one in server.requests) <= 4
    assert (result.judged, result.errors) == (0, {f"no valid verdict: {name}": 2})


def silent(model):
    """One adapter's replies are all reasoning."""
    return lambda call: "empty" if call.body["model"] == model else None


def test_what_is_no_answer_is_neither_won_nor_lost(tmp_path):
    ask(tmp_path, 4)
    with Server(fault=silent("dpo")) as server, pytest.raises(UserError, match="no prompt has a result: no text"):
        run_evaluation(evaluate_config(tmp_path, server.url))

    def some(call):
        return "empty" if call.body["model"] == "sft" and "2" in call.body["messages"][-1]["content"] else None

    with Server(fault=some) as server:
        result = run_evaluation(evaluate_config(tmp_path, server.url))
    assert (result.n, result.failed, result.errors) == (3, 1, {"no text": 1})


def test_a_quiz_reads_what_follows_the_thinking_and_leaves_out_what_is_no_answer(quiz):  # noqa: F811
    def fault(call):
        number = int(call.body["messages"][-1]["content"][-2])
        if call.body["model"] == "dpo":
            return f"reply!{['<think>A pear? No.</think>Mango.', '<think>Still', 'Plum.', 'Plum.'][number]}"
        return "reply!No idea."

    with Server(fault=fault) as server:
        result = run_quiz(quiz, server.url)
    assert result.n == 3
    assert result.failed == 1
    assert result.accuracy["policy"].value == pytest.approx(1 / 3)
    assert result.errors == {CUT_IN_REASONING: 1}


# What an endpoint may not do


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_key_nor_prompt_follows_a_redirect_elsewhere(folder, status, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SERVE_API_KEY", "secret")
    with RawServer(lambda _: (200, {}, says(TEXT))) as elsewhere:
        target = elsewhere.url.replace("127.0.0.1", "localhost")
        with RawServer(lambda _: (status, {"Location": f"{target}/chat/completions"}, b"")) as server:
            with pytest.raises(UserError, match="redirects to http://localhost") as raised:
                run(server)
            assert "secret" not in str(raised.value)
        assert elsewhere.requests == []


def test_no_other_client_follows_one_either(monkeypatch):
    monkeypatch.setenv("SERVE_API_KEY", "secret")
    with RawServer(lambda _: (200, {}, b'{"data": [], "tokens": [1]}')) as elsewhere:
        target = elsewhere.url.replace("127.0.0.1", "localhost")
        with RawServer(lambda request: (307, {"Location": f"{target}/models"}, b"")) as server:
            for asked in (lambda: listed(server.url), lambda: _tokenize(server.url, [], None, True, {})):
                with pytest.raises(UserError, match="redirects to http://localhost"):
                    asked()
        assert elsewhere.requests == []
        assert listed(elsewhere.url) == {}
        assert elsewhere.requests[0].headers["authorization"] == "Bearer secret"


def test_a_redirect_within_the_server_is_followed(folder):  # noqa: F811
    def respond(request):
        if request.path.startswith("/v1/"):
            return 307, {"Location": "/v2/chat/completions"}, b""
        return 200, {}, says(TEXT)

    with RawServer(respond) as server:
        assert run(server, limit=1, generate__n=1).completions == 1


def test_a_reply_without_end_is_not_read_to_its_end(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(http, "MOST_BYTES", 1 << 20)
    bomb = gzip.compress(b" " * (64 << 20))
    with RawServer(lambda _: (200, {"Content-Encoding": "gzip"}, bomb)) as server:
        result = run(server, limit=1, generate__n=1, generate__price="1,1,2")
        assert len(server.requests) == 1
    assert "longer than" in result.error
    assert result.receipt.unseen_usd > 0  # it may have been paid


def test_a_web_page_is_named(folder):  # noqa: F811
    page = b"<!DOCTYPE html><html>Sign in</html>"
    with RawServer(lambda _: (200, {}, page)) as server, pytest.raises(UserError, match="a web page"):
        run(server)


@pytest.mark.parametrize(
    "url", ["http://me:secret@127.0.0.1:9/v1", "http://h/v1?api_key=secret", "http://me:secret@h:x/v1"]
)
def test_a_url_that_holds_a_secret_is_refused_and_not_shown(folder, url):  # noqa: F811
    with pytest.raises(UserError) as raised:
        run(None, generate__url=url)
    assert "secret" not in f"{raised.value} {raised.value.where}"


def test_the_query_string_is_kept_and_keys_nothing(folder):  # noqa: F811
    with RawServer(lambda _: (200, {}, says(TEXT))) as server:
        run(None, limit=1, generate__n=1, generate__url=f"{server.url}?api-version=2024-10-21")
        assert [one.path for one in server.requests] == ["/v1/chat/completions?api-version=2024-10-21"]


def test_files_with_prompts_or_replies_are_for_their_owner_alone(folder):  # noqa: F811
    with Server() as server:
        run(server, limit=2)
    for file in (folder / "data/dpo").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


def test_a_long_silence_is_explained(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(http, "SILENCE_SECONDS", 0.05)
    progress = Lines()
    with Server(latency=0.3) as server:
        run(server, progress, limit=1)
    assert "waiting up to 5 s for its first reply" in progress.lines[0]


# Counts that can't be right


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {"prompt_tokens": -1000, "completion_tokens": -1000},
        {"prompt_tokens": 10**9, "completion_tokens": 10**9},
        {"prompt_tokens": 0, "completion_tokens": 0},
        {"prompt_tokens": 1e400, "completion_tokens": 5},
    ],
)
def test_the_budget_holds_whatever_the_endpoint_counts(folder, usage):  # noqa: F811
    progress = Lines()
    with RawServer(lambda _: (200, {}, says(TEXT, usage=usage).replace(b"null", b"null"))) as server:
        with pytest.raises(UserError, match="the budget is reached"):
            run(server, progress, generate__n=1, generate__price="1,1,1", generate__max_usd=500e-6,
                generate__max_tokens=10)  # fmt: skip
        assert 2 <= len(server.requests) <= 5  # a request of some 350 bytes is about 110 tokens in and out
    assert sum("our own estimate" in line for line in progress.lines) == 1
    assert all(row.usage != Usage() for row in rows(folder).values())
