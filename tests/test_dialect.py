"""How an endpoint's refusals are found out: each server here refuses as the real one of its name does.

The texts are those of the servers' sources and documents, written down from there.
"""

import json

import pytest
from openai_server import Server
from test_generate import Lines, command, folder, messages, rows, run, texts, write_prompts  # noqa: F401

from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import GenerateSection
from dpo_cli.endpoint.budget import Budget
from dpo_cli.endpoint.dialect import FORMATS, OUTPUT_LIMIT, SYSTEM, forget, is_about_fields, transform
from dpo_cli.endpoint.http import Rejected
from dpo_cli.endpoint.prices import Price
from dpo_cli.engines._engine import sampling
from dpo_cli.errors import UserError
from dpo_cli.judges._request import request


def refuse(text, *names, status=400):
    """Refused with a text wherever one of these fields is sent; `n` only where it is more than 1."""

    def strike(call):
        held = any(name in call.body and (name != "n" or call.body["n"] > 1) for name in names)
        return f"{status}!{text}" if held else None

    return strike


def is_system(call):
    return any(message["role"] == "system" for message in call.body["messages"])


ONE_CHOICE = {
    "llama.cpp": refuse("Only one completion choice is allowed", "n"),
    "llama.cpp before 2025": refuse("Only one completion choice is allowed", "n", status=500),
    "Gemini": refuse("Multiple candidates is not enabled for this model", "n"),
    "Hugging Face": refuse("num_return_sequences greater than 1 is not supported", "n", status=422),
    "a proxy without words": refuse("Bad Request", "n"),
    "OpenRouter": refuse("No endpoints found that can handle the requested parameters.", "n", status=404),
}


@pytest.mark.parametrize("name", ONE_CHOICE)
def test_several_choices_are_asked_for_one_by_one(folder, name):  # noqa: F811
    with Server() as server:
        run(server, data="plain")
    progress = Lines()
    with Server(fault=ONE_CHOICE[name]) as server:
        result = run(server, progress)
        assert server.paid.total() == 36
        refused = server.calls.total() - 36
    assert refused <= 3  # found out once, not by every prompt
    assert result.failed == 0
    assert texts(folder) == texts(folder, "plain")
    (line,) = progress.lines
    assert "refuses n > 1" in line


def test_what_waited_for_the_first_answer_is_sent_together(folder):  # noqa: F811
    with Server(latency=0.2) as server:
        assert run(server).failed == 0
        assert len(server.bodies) == 12
    assert server.highest >= 11  # one finds out whether the form is taken; then nobody waits for another


MISTRAL = '{"object": "error", "message": %s, "type": "invalid_request_error", "param": null, "code": null}'
EXTRA = '{"detail": [{"type": "extra_forbidden", "loc": ["body", "%s"], "msg": "Extra inputs are not permitted"}]}'
UNKNOWN = (
    '[{"error": {"code": 400, "message": "Invalid JSON payload received. Unknown name \\"%s\\": Cannot find field."}}]'
)


@pytest.mark.parametrize("text", [EXTRA, MISTRAL % EXTRA, UNKNOWN, "property '%s' is unsupported", "Bad Request %.0s"])
@pytest.mark.parametrize("names", [("chat_template_kwargs", "seed"), ("frequency_penalty",), ("temperature",)])
def test_only_what_is_refused_is_left_out(folder, text, names):  # noqa: F811
    def strike(call):
        held = [name for name in names if name in call.body]
        return f"422!{text % held[0]}" if held else None

    progress = Lines()
    with Server(fault=strike) as server:
        result = run(server, progress, generate__n=1)
        sent = server.bodies[-1]
        assert server.paid.total() == 12
        assert server.calls.total() <= 12 + 60
    assert result.failed == 0
    optional = {"chat_template_kwargs", "seed", "frequency_penalty", "top_p", "temperature"}
    assert optional - set(sent) == set(names)
    assert len(progress.lines) == len(names)


def test_of_two_that_exclude_each_other_the_nucleus_goes(folder):  # noqa: F811
    said = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."

    def strike(call):
        return f"400!{said}" if {"temperature", "top_p"} <= set(call.body) else None

    with Server(fault=strike) as server:
        run(server)
        assert "temperature" in server.bodies[-1]
        assert "top_p" not in server.bodies[-1]


def test_a_template_without_a_system_role_finds_it_in_the_first_user_message(folder):  # noqa: F811
    progress = Lines()
    with Server(fault=lambda call: "400!System role not supported" if is_system(call) else None) as server:
        result = run(server, progress)
        (sent,) = server.bodies[-1]["messages"]
    assert sent["role"] == "user"
    assert sent["content"].startswith("Write the next lines.\n\n[OTIS] This is scene")
    assert result.failed == 0
    assert "system role" in progress.lines[0]


@pytest.mark.parametrize(
    "said",
    [
        "System role not supported",
        "Conversation roles must alternate user/assistant/user/assistant/...",  # vLLM with Mistral's first templates
    ],
)
def test_a_system_role_is_found_out_by_a_later_prompt_as_well(folder, said):  # noqa: F811
    write_prompts(folder / "data/val.jsonl", [{"prompt": "Hello."}, {"prompt": "Bye."}, *({"prompt": messages(0)},)])
    with Server(fault=lambda call: f"400!{said}" if is_system(call) else None) as server:
        result = run(server, generate__concurrency=1)
    assert (result.failed, result.completions) == (0, 9)


def test_names_of_several_fields_in_one_refusal_are_all_left_out(folder):  # noqa: F811
    """Gemini's compatible endpoint names all that it does not know at once, in a list."""

    def strike(call):
        unknown = [name for name in ("chat_template_kwargs", "frequency_penalty", "seed") if name in call.body]
        lines = [f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.' for name in unknown]
        error = {"error": {"code": 400, "message": "\n".join(lines), "status": "INVALID_ARGUMENT"}}
        return f"400!{json.dumps([error])}" if unknown else None

    with Server(fault=strike) as server:
        result = run(server)
        assert (result.failed, server.calls.total()) == (0, 12 + 3)
        assert "temperature" in server.bodies[-1]


def test_a_flagged_prompt_is_refused_alone(folder):  # noqa: F811
    """OpenRouter refuses what a provider's moderation flags with 403, as it does a key that is wrong."""
    flagged = {"error": {"code": 403, "message": "requires moderation", "metadata": {"reasons": ["violence"]}}}
    with Server(fault=lambda call: f"403!{json.dumps(flagged)}" if "scene 3." in call.text else None) as server:
        result = run(server)
        assert server.calls.total() == 12
    assert (result.failed, result.completions) == (1, 33)


def test_a_server_error_that_is_no_refusal_is_waited_for(folder):  # noqa: F811
    progress = Lines()
    with Server(fault=lambda call: "500!CUDA error: device-side assert" if call.number <= 30 else None) as server:
        result = run(server, progress, limit=1)
    assert result.failed == 0
    assert not progress.lines


def test_a_request_that_is_refused_in_every_form_costs_the_others_nothing(folder):  # noqa: F811
    said = "I will not continue this."
    with Server(fault=lambda call: f"400!{said}" if "scene 0." in call.text else None) as server:
        result = run(server, generate__concurrency=1)
        before = server.calls.total()
        assert (result.failed, result.error) == (1, f"400: {said}")
        assert server.paid.total() == 11
        assert before < 11 + 60
        run(server)
        assert server.calls.total() == before + 1  # every form has been taken by now


def test_a_request_that_is_too_long_is_not_sent_otherwise(folder):  # noqa: F811
    said = "This model's maximum context length is 64 tokens. However, you requested 200 tokens (max_tokens 256)."
    with Server(fault=lambda call: f"400!{said}") as server:
        run(server)
        assert server.calls.total() == 12


def test_rows_say_what_was_sent_and_the_next_run_goes_on(folder):  # noqa: F811
    with Server(fault=lambda call: "400:frequency_penalty" if "frequency_penalty" in call.body else None) as server:
        run(server, limit=3)
        forget()  # as another process
        assert run(server, limit=4).owed_prompts == 1
        for row in rows(folder).values():
            assert (row.sampling["frequency_penalty"], row.sampling["temperature"]) == (None, 0.9)
            assert row.sampling["refused"] == ["frequency_penalty"]
        with pytest.raises(UserError, match=r"temperature was 0\.9, now 0\.5"):
            run(server, generate__temperature=0.5)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "Model Not Exist"),  # DeepSeek
        (400, "Invalid model: writer"),  # Mistral
        (400, "writer is not a valid model ID"),  # OpenRouter
        (404, "model 'writer' not found"),  # Ollama
        (404, "The model `writer` does not exist."),  # vLLM, OpenAI
    ],
)
def test_a_model_that_does_not_exist_is_named_at_once(folder, status, said):  # noqa: F811
    with Server(fault=lambda _: f"{status}!{said}") as server:
        with pytest.raises(UserError, match="no model 'writer' there"):
            run(server, generate__concurrency=1)
        assert server.calls.total() == 1


def test_what_was_learnt_is_said_once_and_not_asked_again(folder):  # noqa: F811
    progress = Lines()
    with Server(fault=lambda call: "400:seed" if "seed" in call.body else None) as server:
        run(server, progress)
        run(server, progress, data="again")
        assert sum("seed" in body for body in server.bodies) == 1
    assert len(progress.lines) == 1


def test_forms_of_a_request():
    schema = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {}, "strict": True}}
    body = {"messages": [], "n": 3, "max_tokens": 5, "response_format": schema, "seed": 1}
    assert transform(body, {}) == body
    assert transform(body, {"n": 1})["n"] == 1
    assert "n" not in transform(body, {"n": 2})
    renamed = transform(body, {OUTPUT_LIMIT: 1})
    assert (renamed["max_completion_tokens"], "max_tokens" in renamed) == (5, False)
    assert "max_tokens" not in transform(body, {OUTPUT_LIMIT: 2})
    down = [transform(body, {"response_format": form}).get("response_format") for form in range(len(FORMATS))]
    assert down[0] == schema
    assert down[1] == {"type": "json_schema", "json_schema": {"name": "verdict", "schema": {}}}
    assert down[2:] == [{"type": "json_object"}, None]
    talk = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    assert transform({"messages": talk}, {SYSTEM: 1})["messages"] == [{"role": "user", "content": "a\n\nb"}, talk[2]]
    assert json.dumps(body) == json.dumps(transform(body, {}))


@pytest.mark.parametrize(
    ("refusal", "about"),
    [
        (Rejected(400, "nope", param="response_format.json_schema.strict"), True),
        (Rejected(422, "guided decoding is not supported"), True),
        (Rejected(400, "'max_tokens' is too large: 2048. The maximum context length is 1024."), False),
        (Rejected(400, "messages: too sad", param="messages"), False),
        (Rejected(400, "no", code="content_filter"), False),
        (Rejected(404, "The model `x` does not exist.", param="model"), False),
        (Rejected(400, "service_tier flex is not available"), False),
        (Rejected(413, "response_format"), False),
        (Rejected(0, "max_tokens"), False),
    ],
)
def test_which_refusals_are_about_fields(refusal, about):
    body = {"messages": [], "max_tokens": 1, "response_format": {}, "service_tier": "flex"}
    assert is_about_fields(refusal, body) is about


def test_a_user_leaves_fields_out_and_adds_others(folder):  # noqa: F811
    extra = {"top_k": 20, "stop": ["\n\n"], "temperature": 0.3}
    with Server(fault=lambda call: "400:temperature") as server:
        run(server, limit=1, generate__top_p="none", generate__seed="none", generate__max_tokens="none",
            generate__extra_body=json.dumps(extra))  # fmt: skip
        for sent in server.bodies:
            assert {name: sent[name] for name in extra} == extra  # never left out, refused or not
            assert not {"top_p", "seed", "max_tokens", "max_completion_tokens"} & set(sent)
        server.fault = None
        run(server, limit=1, generate__top_p="none", generate__extra_body=json.dumps(extra), data="again")
    (row,) = rows(folder, "again").values()
    assert row.sampling["extra_body"] == extra
    assert row.sampling["top_p"] is None


@pytest.mark.parametrize(("choices", "sent"), [("none", {None}), ("1", {1}), ("2", {1, 2}), ("9", {3})])
def test_a_request_asks_for_as_many_choices_as_the_user_says(folder, choices, sent):  # noqa: F811
    with Server() as server:
        run(server, data="plain")
    with Server() as server:
        assert run(server, generate__choices=choices).completions == 36
        assert {body.get("n") for body in server.bodies} == sent
    assert texts(folder) == texts(folder, "plain")


def test_system_prompts_go_without_their_role_where_the_user_says_so(folder):  # noqa: F811
    prompt = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Tell me of rain."}]
    write_prompts(folder / "data/val.jsonl", [{"prompt": prompt}])
    with Server(fault=lambda call: "400:no system role" if is_system(call) else None) as server:
        progress = Lines()
        run(server, progress, generate__system_role="none")
        (sent,) = server.bodies
    assert sent["messages"] == [{"role": "user", "content": "Rhyme.\n\nTell me of rain."}]
    assert progress.lines == []
    (row,) = rows(folder).values()
    assert row.sampling["system_role"] is None and "refused" not in row.sampling
    assert row.prompt[0]["role"] == "system"


def test_a_judge_s_reply_may_be_without_a_limit(tmp_path):
    settings = resolve({"judge.max_tokens": "none"}, environment={}).config.judge
    body = request("m", "", ["A", "B"], settings.max_tokens, settings)
    assert not {"max_tokens", "max_completion_tokens"} & set(body)
    price = Price(1.0, 1.0, 1.0)
    assert Budget(None).worst(body, 100, price) == 0
    with pytest.raises(UserError, match="nothing limits the output"):
        Budget(1.0).worst(body, 100, price)


@pytest.mark.parametrize(("form", "sent"), [("json_object", {"type": "json_object"}), ("none", None)])
def test_the_form_of_verdicts_is_the_user_s(tmp_path, form, sent):
    settings = resolve({"judge.response_format": form}, environment={}).config.judge
    assert request("m", "", ["A", "B"], 9, settings).get("response_format") == sent


def test_an_engine_in_this_process_needs_every_value(folder):  # noqa: F811
    with pytest.raises(UserError, match="temperature: none"):
        sampling(GenerateSection(temperature=None))


def test_the_command_takes_none_and_json(folder):  # noqa: F811
    with Server() as server:
        flags = ["--temperature", "none", "--top-p", "0.5", "--extra-body", '{"min_p": 0.1}', "--limit", "1"]
        process = command(server, *flags)
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        (sent,) = server.bodies
    assert (sent["top_p"], sent["min_p"], "temperature" in sent) == (0.5, 0.1, False)
    process = command(server, "--extra-body", "{")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "generate.extra_body" in errors
