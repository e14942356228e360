"""Templates that open thinking or leave it out, tools in training, and conversations that a template refuses."""

import pytest
from adapters import base_model

from dpo_cli.errors import UserError
from dpo_cli.training.encode import DROPPED, EMPTY, Encoder, Exchange

TURN = "{{ '<|start|>' + message['role'] + '\n' + c + '<|end|>' }}"
CUT = "{% if message['role'] == 'assistant' and '</think>' in c %}{% set c = c.split('</think>')[-1] %}{% endif %}"
TEMPLATES = {
    # DeepSeek-R1-Distill's: the generation prompt ends in <think>, history is cut after </think>.
    "opens": "{% for message in messages %}{% set c = message['content'] %}" + CUT + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n<think>\n' }}{% endif %}",
    "cuts": "{% for message in messages %}{% set c = message['content'] %}" + CUT + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
    "tools": "{% if tools %}{{ '<|start|>system\n' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for message in messages %}{% set c = message['content'] %}{% if message.tool_calls %}"
    "{% set c = c + (message.tool_calls | tojson) %}{% endif %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
    "no system": "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% set c = message['content'] %}" + TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
    "first line": "{% for message in messages %}{% set c = message['content'].split('\n')[0] %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}",
}  # fmt: skip
USER = {"role": "user", "content": "hi"}


def reply(text, **more):
    return [{"role": "assistant", "content": text, **more}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("thinking") / "base")


def encoder(base, template, thinking=None):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATES[template]
    return Encoder(tokenizer, {tokenizer.eos_token_id}, 500, {}, thinking)


def texts(made, rows):
    [row] = made.encode(rows).rows
    return made.tokenizer.decode(row.prompt), [made.tokenizer.decode(side) for side in row.completions]


def row(*texts, **more):
    return Exchange([USER], [reply(text) for text in texts], where="train.jsonl:7", **more)


@pytest.mark.parametrize(
    ("template", "answer", "words"),
    [
        ("opens", "yes", "writes <think> into the generation prompt and takes thinking out of answers"),
        ("opens", "<think>\nlever\n</think>\n\nyes", "writes <think> into the generation prompt"),
        ("cuts", "<think>\nlever\n</think>\n\nyes", "the chat template takes thinking out of answers"),
        ("cuts", "lever\n</think>\n\nyes", "the chat template takes thinking out of answers"),
    ],
)
def test_a_template_that_opens_or_cuts_thinking_is_named_with_what_to_set(base, template, answer, words):
    with pytest.raises(UserError, match=words) as refused:
        encoder(base, template).encode([row(answer, answer + "!")])
    assert refused.value.where == "train.jsonl:7"
    assert "model.thinking=keep" in refused.value.hint and "model.chat_template=FILE" in refused.value.hint


@pytest.mark.parametrize(
    ("thinking", "prompt", "completion"),
    [
        ("keep", "assistant\n<think>\n", "lever\n</think>\n\nyes<|end|>"),
        ("empty", "assistant\n<think>\n", "\n</think>\n\nyes<|end|>"),
        ("strip", "assistant\n", "yes<|end|>"),
    ],
)
@pytest.mark.parametrize("form", ["tags", "tail", "reasoning_content"])
def test_thinking_is_kept_stripped_or_empty_as_set(base, thinking, prompt, completion, form):
    answers = {
        "tags": reply("<think>\nlever\n</think>\n\nyes"),
        "tail": reply("lever\n</think>\n\nyes"),
        "reasoning_content": reply("yes", reasoning_content="lever"),
    }
    pair = Exchange([USER], [answers[form], reply("<think>\nno\n</think>\n\nnever")])
    asked, (chosen, _) = texts(encoder(base, "opens", thinking), [pair])
    assert asked.endswith(prompt) and chosen == completion


def test_what_a_template_leaves_in_needs_no_setting(base):
    _, sides = texts(encoder(base, "tools"), [row("<think>\na\n</think>\n\nb", "c")])
    assert sides == ["<think>\na\n</think>\n\nb<|end|>", "c<|end|>"]


def test_tools_and_tool_calls_are_rendered_by_the_models_own_template(base):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    pair = Exchange([USER], [reply("", tool_calls=[call]), reply("Rainy.")], tools)
    prompt, sides = texts(encoder(base, "tools"), [pair])
    assert '"name": "weather"' in prompt
    assert '"city": "Rome"' in sides[0] and sides[1] == "Rainy.<|end|>"


def test_a_conversation_that_the_template_refuses_is_named_by_line(base):
    refused = Exchange(
        [{"role": "system", "content": "Be brief."}, USER], [reply("a"), reply("b")], where="val.jsonl:3"
    )
    with pytest.raises(UserError, match="System role not supported") as caught:
        encoder(base, "no system").encode([refused])
    assert caught.value.where == "val.jsonl:3" and "model.chat_template" in caught.value.hint


def test_text_that_the_template_leaves_out_and_empty_chosen_sides_are_counted(base):
    rows = [row("one\ntwo", "three"), row("", "three"), row("four", "five")]
    found = encoder(base, "first line").encode(rows)
    assert found.refused == {DROPPED: 1, EMPTY: 1} and found.kept == [2]
