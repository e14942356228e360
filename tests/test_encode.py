"""What the model is trained on, token by token, and what of a long prompt is given up."""

import pytest
from adapters import base_model

from dpo_cli.errors import UserError
from dpo_cli.training.encode import IDENTICAL, NOT_A_PREFIX, TOO_LONG, Encoder

SYSTEM = {"role": "system", "content": "Each line is [NAME] text."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base_model(tmp_path_factory.mktemp("base")))


def encoder(tokenizer, max_length=4096, **variables):
    return Encoder(tokenizer, {tokenizer.eos_token_id}, max_length, variables)


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return [{"role": "assistant", "content": text}]


def length(tokenizer, prompt, *completions):
    [row] = encoder(tokenizer).encode([(prompt, list(completions))]).rows
    return len(row.prompt) + max(map(len, row.completions))


def shortened(tokenizer, prompt, completions, max_length):
    """Text of the prompt that is left."""
    encoded = encoder(tokenizer, max_length).encode([(prompt, completions)])
    assert (encoded.shortened, encoded.refused) == (1, {})
    assert len(encoded.rows[0].prompt) + max(map(len, encoded.rows[0].completions)) <= max_length
    assert [tokenizer.decode(ids) for ids in encoded.rows[0].completions] == [
        completion[0]["content"] + "<|end|>" for completion in completions
    ]
    return tokenizer.decode(encoded.rows[0].prompt)


def rendered(*messages):
    return (
        "<|begin|>" + "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>" for m in messages) + "<|start|>assistant\n"
    )


def test_a_completion_begins_after_the_generation_prompt_and_ends_with_the_stop_token(tokenizer):
    [row] = (
        encoder(tokenizer).encode([([SYSTEM, user("[MABEL] Rain?")], [answer("[OTIS] A year."), answer("No.")])]).rows
    )
    assert tokenizer.decode(row.prompt) == rendered(SYSTEM, user("[MABEL] Rain?"))
    assert [tokenizer.decode(ids) for ids in row.completions] == ["[OTIS] A year.<|end|>", "No.<|end|>"]
    assert row.prompt.count(tokenizer.bos_token_id) == 1


def test_the_oldest_turns_go_first_and_a_conversation_goes_on_from_a_user(tokenizer):
    turns = [
        user("first question"),
        *answer("first answer"),
        user("second question"),
        *answer("second answer"),
        user("third"),
    ]
    completions = [answer("yes"), answer("no, never")]
    fits_two = length(tokenizer, [SYSTEM, *turns[2:]], *completions)
    assert shortened(tokenizer, [SYSTEM, *turns], completions, fits_two) == rendered(SYSTEM, *turns[2:])
    assert shortened(tokenizer, [SYSTEM, *turns], completions, fits_two - 1) == rendered(SYSTEM, turns[4])


def test_of_the_last_turn_the_oldest_lines_go_then_characters(tokenizer):
    scene = "[MABEL] one\n[OTIS] two\n[MABEL] three and four"
    completions = [answer("[OTIS] five"), answer("six")]
    for kept in ("[OTIS] two\n[MABEL] three and four", "[MABEL] three and four"):
        limit = length(tokenizer, [SYSTEM, user(kept)], *completions)
        assert shortened(tokenizer, [SYSTEM, user(scene)], completions, limit) == rendered(SYSTEM, user(kept))
    text = shortened(tokenizer, [SYSTEM, user(scene)], completions, limit - 2)
    assert text.startswith(rendered(SYSTEM).removesuffix("<|start|>assistant\n")) and "[MABEL] three" not in text
    assert "four<|end|>" in text


def test_what_does_not_fit_or_does_not_differ_is_refused_and_counted(tokenizer):
    rows = [
        ([SYSTEM, user("hi")], [answer("word " * 200), answer("b")]),
        ([SYSTEM, user("hi")], [answer("the same"), answer("the same")]),
        ([SYSTEM, user("hi")], [answer("a"), answer("b")]),
    ]
    encoded = encoder(tokenizer, 100).encode(rows)
    assert encoded.refused == {TOO_LONG: 1, IDENTICAL: 1}
    assert len(encoded.rows) == 1


def template(tokenizer, text):
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = text
    return other


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda text: text.replace("<|end|>", "<|start|>"), "never learn to stop"),
        (lambda text: "{{ bos_token }}" + text, "BOS twice"),
        (lambda text: None, "no chat template"),
    ],
)
def test_templates_that_would_train_nonsense_are_refused(tokenizer, change, fault):
    broken = template(tokenizer, change(tokenizer.chat_template))
    with pytest.raises(UserError, match=fault):
        encoder(broken).encode([([user("hi")], [answer("a"), answer("b")])])


def test_a_newline_after_the_stop_token_is_no_fault(tokenizer):
    chatml = template(tokenizer, tokenizer.chat_template.replace("'<|end|>'", "'<|end|>\n'"))
    [row] = encoder(chatml).encode([([user("hi")], [answer("a"), answer("b")])]).rows
    assert chatml.decode(row.completions[0]) == "a<|end|>\n"


def test_a_prompt_that_reads_otherwise_before_a_completion_is_refused(tokenizer):
    other = template(tokenizer, "{% if add_generation_prompt %}ask {% endif %}" + tokenizer.chat_template)
    assert encoder(other).encode([([user("hi")], [answer("a"), answer("b")])]).refused == {NOT_A_PREFIX: 1}


def test_template_variables_reach_the_template(tokenizer):
    dated = template(tokenizer, tokenizer.chat_template.replace("{{ bos_token }}", "{{ bos_token + date_string }}"))
    [row] = encoder(dated, date_string="26 Jul 2024").encode([([user("hi")], [answer("a"), answer("b")])]).rows
    assert dated.decode(row.prompt).startswith("<|begin|>26 Jul 2024<|start|>user")
