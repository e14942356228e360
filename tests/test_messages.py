"""Messages with tool calls, reasoning and tools: read from every form that the field has, and never lost on the way."""

import json
from collections import Counter

import pytest

from dpo_cli.data.messages import message_key, prompt_id, read_messages, read_tools, said, wire
from dpo_cli.data.records import Completions, completions_id

CALL = {"type": "function", "function": {"name": "tide", "arguments": {"port": "Bremen"}}, "id": "c1"}
USER = {"role": "user", "content": "High tide?"}


def test_ids_of_plain_prompts_are_those_of_the_first_version():
    assert prompt_id([USER]) == "e378f718bd3418b0"
    assert prompt_id([{"role": "system", "content": "é"}, USER]) == prompt_id(
        [{"role": "system", "content": "é"}, {**USER, "name": "bob"}]
    )
    assert completions_id(["a", "b"]) == completions_id(["a", "b"], [None, None])


def test_what_differs_in_a_tool_result_a_call_or_the_tools_is_another_prompt():
    talk = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    other = [USER, {"role": "assistant", "content": "", "tool_calls": [{**CALL, "function": {"name": "wind"}}]}]
    ids = {
        prompt_id(talk), prompt_id(other), prompt_id(talk, [{"type": "function"}]),
        prompt_id([*talk, {"role": "tool", "content": "4 m"}]), prompt_id([*talk, {"role": "tool", "content": "9 m"}]),
    }  # fmt: skip
    assert len(ids) == 5
    assert message_key(talk[1]) == message_key({**talk[1], "tool_calls": [{**CALL, "id": "another"}]})


@pytest.mark.parametrize(
    "row",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "tide", "arguments": '{"port":"Bremen"}'}}]},
        {"role": "assistant", "content": [], "tool_calls": {"id": "c1", **CALL["function"]}},
    ],
)
def test_one_call_in_all_its_forms(row):
    assert read_messages([row], "prompt") == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]


def test_sharegpt_and_old_openai_calls():
    text = json.dumps(CALL["function"])
    bare = {key: value for key, value in CALL.items() if key != "id"}
    expected = [{"role": "assistant", "content": "", "tool_calls": [bare]}, {"role": "tool", "content": "4 m"}]
    rows = [{"from": "function_call", "value": text}, {"from": "observation", "value": "4 m"}]
    assert read_messages(rows, "conversations") == expected
    old = {"role": "assistant", "content": None, "function_call": {"name": "tide", "arguments": '{"port": "Bremen"}'}}
    assert read_messages([old], "prompt") == expected[:1]


def test_arguments_that_are_no_json_stay_as_the_model_wrote_them():
    call = {"function": {"name": "tide", "arguments": '{"port": Bremen'}}
    [message] = read_messages([{"role": "assistant", "tool_calls": [call]}], "chosen")
    assert message["tool_calls"][0]["function"]["arguments"] == '{"port": Bremen'
    assert wire([message])[0]["tool_calls"][0]["function"]["arguments"] == '{"port": Bremen'


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name_here(key):
    [message] = read_messages([{"role": "assistant", "content": "4 m", key: "Spring tide."}], "chosen")
    assert message == {"role": "assistant", "content": "4 m", "reasoning_content": "Spring tide."}
    assert said(message) == "<think>\nSpring tide.\n</think>\n4 m"


def test_parts_of_text_are_joined_and_others_refused_by_name():
    parts = [{"type": "text", "text": "High "}, {"type": "text", "text": "tide?"}]
    assert read_messages([{"role": "user", "content": parts}], "prompt") == [USER]
    image = [*parts, {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]
    with pytest.raises(ValueError, match="image_url; only text"):
        read_messages([{"role": "user", "content": image}], "prompt")
    with pytest.raises(ValueError, match="with images"):
        read_messages([{**USER, "images": ["a.png"]}], "prompt")


@pytest.mark.parametrize("text", [json.dumps([USER]), repr([USER]), json.dumps(USER)])
def test_a_cell_of_messages_is_messages(text):
    assert read_messages(text, "prompt") == [USER]


def test_a_text_that_is_no_list_of_messages_is_a_text():
    for text in ('[{"a": 1}]', "{roles: role}", '{"role": "x"}', "[1, 2]", "[{'role' is a key"):
        if text.startswith("[{'role'"):
            with pytest.raises(ValueError, match="not JSON"):
                read_messages(text, "prompt")
        else:
            assert read_messages(text, "prompt") == [{"role": "user", "content": text}]


def test_what_is_not_read_is_counted():
    dropped: Counter[str] = Counter()
    read_messages([{**USER, "weight": 0, "note": None, "tags": []}], "prompt", dropped=dropped)
    assert dropped == {"prompt[].weight": 1}


def test_the_wire_wants_texts_and_ids():
    talk = [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": CALL["function"]}]}]
    sent = wire([*talk, {"role": "tool", "content": "4 m"}])
    [call] = sent[1]["tool_calls"]
    assert call["function"]["arguments"] == '{"port":"Bremen"}' and call["type"] == "function"
    assert sent[2]["tool_call_id"] == call["id"]
    assert wire([USER]) == [USER]


def test_tools_in_their_forms():
    tool = {"type": "function", "function": {"name": "tide"}}
    assert read_tools(json.dumps([tool])) == read_tools([tool]) == read_tools([json.dumps(tool)]) == [tool]
    assert read_tools([]) is read_tools("") is read_tools(None) is None
    with pytest.raises(ValueError, match="not JSON"):
        read_tools("tide()")


def test_answers_of_completions():
    row = Completions(
        id="x", prompt=[USER], completions=["4 m", ""], finish_reasons=["stop", "tool_calls"], model="m", sampling={},
        messages=[None, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
    )  # fmt: skip
    assert row.answers == [{"role": "assistant", "content": "4 m"}, row.messages[1]]
