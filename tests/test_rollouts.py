"""Scored rollouts to pairs, by the definitions of the NeMo Gym guide."""

import json
from collections import Counter

import pytest

from dpo_cli.errors import UserError
from dpo_cli.stages.pair.rollouts import Rollout, pair_rollouts, read_rollout, same_prompt, stratified

GUIDE = {"min_gap": 0.2, "high": 0.7, "low": 0.4, "max_pairs": 100, "seed": 1}


def row(prompt, text, reward):
    return {
        "responses_create_params": {"input": [{"role": "user", "content": prompt}]},
        "output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}]}],
        "reward": reward,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rollout(prompt, text, reward):
    return Rollout([{"role": "user", "content": prompt}], [{"role": "assistant", "content": text}], reward)


def texts(pairs):
    return [(pair.prompt[-1]["content"], pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs]


def test_best_against_worst_of_each_prompt_with_the_guides_statistics(tmp_path):
    rows = [row("p", "b", 0.5), row("p", "a", 1.0), row("p", "c", 0.1), row("q", "d", 0.6), row("q", "e", 0.5),
            row("r", "f", 0.8), row("s", "g", 0.7), row("s", "h", 0.5)]  # fmt: skip
    pairs, statistics = pair_rollouts(write(tmp_path / "r.jsonl", rows), "same-prompt", **GUIDE)
    assert texts(pairs) == [("p", "a", "c"), ("s", "g", "h")]  # 0.7 - 0.5 is 0.19999999999999996
    assert (pairs[0].chosen_score, pairs[0].rejected_score, pairs[0].score_gap) == (1.0, 0.1, 0.9)
    assert (statistics.rollouts, statistics.prompts, statistics.pairs) == (8, 4, 2)
    assert statistics.average_gap == pytest.approx((0.9 + 0.2) / 2)
    assert statistics.average_chosen_reward == pytest.approx((1.0 + 0.7) / 2)
    assert statistics.average_rejected_reward == pytest.approx((0.1 + 0.5) / 2)


def test_neither_a_tie_nor_the_same_text_is_a_pair():
    rollouts = [rollout("p", "a", 0.5), rollout("p", "b", 0.5), rollout("q", "same", 0.9), rollout("q", "same ", 0.1)]
    assert same_prompt(rollouts, min_gap=0.0) == []
    assert stratified(rollouts[:2], **{**GUIDE, "min_gap": 0.0, "high": 0.5, "low": 0.5}) == []


def test_stratified_is_every_high_against_every_low_one():
    rollouts = [rollout("p", "a", 0.7), rollout("q", "b", 0.9), rollout("q", "c", 0.4), rollout("r", "d", 0.2),
                rollout("p", "middling", 0.69), rollout("p", "middling too", 0.41)]  # fmt: skip
    pairs = stratified(rollouts, **GUIDE)
    assert texts(pairs)[0] == ("q", "b", "c")  # the same prompt comes first
    assert sorted(texts(pairs)) == [("p", "a", "c"), ("p", "a", "d"), ("q", "b", "c"), ("q", "b", "d")]


def test_stratified_thresholds_that_overlap_still_keep_the_gap():
    rollouts = [rollout("p", "a", 0.5), rollout("p", "b", 0.6), rollout("p", "c", 0.3)]
    assert texts(stratified(rollouts, **{**GUIDE, "high": 0.4, "low": 0.6})) == [("p", "a", "c"), ("p", "b", "c")]


def test_stratified_is_bounded_even_and_repeatable():
    rollouts = [rollout(f"p{i}", f"good {i}", 0.9) for i in range(2000)]
    rollouts += [rollout(f"p{i}", f"bad {i}", 0.1) for i in range(1000, 3000)]
    settings = {**GUIDE, "max_pairs": 3000}
    pairs = stratified(rollouts, **settings)
    assert len(pairs) == 3000 == len({pair.id for pair in pairs})
    own = [pair for pair in pairs if pair.chosen[0]["content"][5:] == pair.rejected[0]["content"][4:]]
    assert len(own) == 1000, "all pairs of one prompt, then others"
    assert max(Counter(pair.chosen[0]["content"] for pair in pairs).values()) < 12
    assert pairs == stratified(rollouts, **settings)
    assert pairs != stratified(rollouts, **{**settings, "seed": 2})


def test_stratified_takes_from_one_prompt_no_more_than_asked():
    rollouts = [rollout("p", f"good {i}", 0.9) for i in range(3000)]
    rollouts += [rollout("p", f"bad {i}", 0.1) for i in range(3000)]
    assert len(stratified(rollouts, **GUIDE)) == 100


def test_the_whole_conversation_is_the_prompt():
    conversation = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
        {"type": "reasoning", "summary": []},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "function_call_output", "call_id": "1", "output": "x"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hello."}]},
        {"role": "user", "content": "Bye"},
    ]
    read = read_rollout({**row("", "See you.", 1), "responses_create_params": {"input": conversation}})
    assert read.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "f", "arguments": {}}, "id": "1"}]},
        {"role": "tool", "content": "x", "tool_call_id": "1"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]  # fmt: skip


def test_the_answer_is_the_last_message_and_its_end_is_known():
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hmm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
        {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"},
        {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "It is "}, {"type": "output_text", "text": "red."}]},
    ]  # fmt: skip
    parameters = {"input": "What?", "instructions": "Look first."}
    response = {"output": output, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    read = read_rollout({"responses_create_params": parameters, "response": response, "reward": 1})
    assert (read.answer[0]["content"], read.finish_reason) == ("It is red.", "length")
    assert [message["content"] for message in read.prompt] == ["Look first.", "What?"]
    assert read_rollout({**row("p", "a", 1)}).finish_reason is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"output": []}, "no message in the output"),
        ({"output": [{"type": "message", "content": " "}]}, "no message in the output"),
        (
            {"responses_create_params": {"input": [{"role": "assistant", "content": "x"}]}},
            "the prompt does not end with a user message",
        ),
    ],
)
def test_what_can_be_no_side_is_counted(tmp_path, change, reason):
    rows = [row("p", "a", 1.0), row("p", "b", 0.0), {**row("p", "c", 0.5), **change}]
    _, statistics = pair_rollouts(write(tmp_path / "r.jsonl", rows), "same-prompt", **GUIDE)
    assert statistics.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"reward": "0.5"}, '"reward" is not a number'),
        ({"output": "text"}, "that is a list"),
        ({"responses_create_params": {}}, "responses_create_params"),
        ({"responses_create_params": {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}}, "only text"),
        ({"responses_create_params": {"input": [{"role": "tool", "content": "x"}]}}, "role is 'tool'"),
    ],
)
def test_what_is_no_rollout_is_named(tmp_path, change, what):
    path = write(tmp_path / "r.jsonl", [row("p", "a", 1.0), {**row("p", "b", 0.0), **change}])
    with pytest.raises(UserError) as error:
        pair_rollouts(path, "same-prompt", **GUIDE)
    assert error.value.where == f"{path}:2" and what in error.value.message


@pytest.mark.parametrize(
    ("rows", "strategy", "hint"),
    [
        ([row("p", "a", 0.5), row("p", "b", 0.4)], "same-prompt", "lower --min-gap (now 0.2)"),
        ([row("p", "a", 0.9), row("q", "b", 0.1)], "same-prompt", "--strategy stratified"),
        ([row("p", "a", 0.6), row("q", "b", 0.5)], "stratified", "--high 0.7, --low 0.4"),
        ([row("p", "a", 0.6), row("q", "b", 0.5)], "stratified", "rewards go from 0.5 to 0.6, median 0.55"),
        ([], "same-prompt", "holds rollouts"),
    ],
)
def test_the_guides_advice_when_no_pair_comes_out(tmp_path, rows, strategy, hint):
    with pytest.raises(UserError) as error:
        pair_rollouts(write(tmp_path / "r.jsonl", rows), strategy, **GUIDE)
    assert hint in error.value.hint


def test_another_strategy_is_refused(tmp_path):
    with pytest.raises(UserError, match="'all' does not pair rollouts"):
        pair_rollouts(tmp_path / "r.jsonl", "all", **GUIDE)
