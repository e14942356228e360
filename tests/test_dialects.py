"""Every dialect is read as its tool means it; what is exported in one is read back as it was."""

import json

import pytest
from dialects import ASKED, BAD, CALLING, DIALECTS, FIRST, GOOD, RESULT, SYSTEM, TOOL

from dpo_cli.config.settings import Config, PairSection
from dpo_cli.data.formats.export import TARGETS, export
from dpo_cli.data.jsonl import read_rows
from dpo_cli.data.records import Preference, preference_id
from dpo_cli.errors import UserError
from dpo_cli.stages.pair import imports, run


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(*paths, **settings):
    return imports.read(paths, PairSection(**settings), 0.0)


def said(pair):
    known = None if pair.chosen_score is None else (pair.chosen_score, pair.rejected_score)
    return {
        "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "tools": pair.tools, "scores": known,
    }  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_a_dialect_is_read_as_its_tool_means_it(tmp_path, name):
    rows, expected = DIALECTS[name]
    found = read(write(tmp_path / "rows.jsonl", rows))
    assert [said(pair) for pair in found.pairs] == expected
    assert found.formats == {name: len(rows)}
    if name == "distilabel":
        assert found.dropped == {"generations[] without a score": 1}
    elif name == "kto":
        assert found.unpaired == {"all answers to its prompt are labelled good": 1}
    else:
        assert not found.dropped and not found.unpaired


# target -> how it names itself when it is read back
READ_BACK = {
    "trl": "trl-conversational", "parquet": "trl-conversational", "nemo-rl": "nemo-rl",
    "llama-factory": "llama-factory-sharegpt", "axolotl": "axolotl-chat-template", "ms-swift": "ms-swift",
    "openai": "openai",
}  # fmt: skip


def pair(prompt, good, bad, tools=None):
    return Preference(id=preference_id(prompt, good, bad, tools), prompt=prompt, chosen=good, rejected=bad, tools=tools)


TALK = pair([SYSTEM, *FIRST, ASKED], [GOOD], [BAD])
TOOLS = pair([ASKED, CALLING, RESULT], [GOOD], [BAD], [TOOL])
CALLS = pair([ASKED], [CALLING], [BAD], [TOOL])
THINKS = pair([ASKED], [{**GOOD, "reasoning_content": "Moon."}], [BAD])
TURNS = pair([ASKED], [CALLING, RESULT, GOOD], [BAD])
KINDS = {"conversation": TALK, "tools": TOOLS, "tool calls": CALLS, "reasoning": THINKS, "several messages": TURNS}
# What a target's own format has no place for: refused by name. Reasoning that goes into the text comes back as text.
REFUSED = {
    ("nemo-rl", "tools"), ("nemo-rl", "tool calls"), ("llama-factory", "several messages"), ("axolotl", "tools"),
    ("axolotl", "tool calls"), ("axolotl", "several messages"), ("openai", "reasoning"), ("openai", "several messages"),
}  # fmt: skip
AS_TEXT = {(target, "reasoning") for target in ("llama-factory", "axolotl", "ms-swift")}


def without_call_ids(side):
    def plain(message):
        calls = [{key: call[key] for key in ("type", "function")} for call in message.get("tool_calls", [])]
        kept = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        return kept | ({"tool_calls": calls} if calls else {})

    return [plain(message) for message in side]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_exported_is_read_back_equal(tmp_path, target, kind):
    if target == "parquet":
        pytest.importorskip("pyarrow")
    config = Config()
    config.model.adapter = None
    row = KINDS[kind]
    if (target, kind) in REFUSED:
        with pytest.raises(UserError, match=f"which {target} has no place for"):
            export([row], [], tmp_path, target, config)
        assert list(tmp_path.iterdir()) == []
        return
    files = export([row], [TALK] if kind == "conversation" else [], tmp_path, target, config)
    found = read(files[0])
    assert found.formats == {READ_BACK[target]: 1} and not found.dropped
    [back] = found.pairs
    if (target, kind) in AS_TEXT:
        assert back.chosen == [{**GOOD, "content": f"<think>\nMoon.\n</think>\n\n{GOOD['content']}"}]
    elif target == "openai":  # endpoints want ids
        assert [*map(without_call_ids, (back.prompt, back.chosen, back.rejected))] == [
            row.prompt, row.chosen, row.rejected,
        ]  # fmt: skip
        assert back.tools == row.tools
    else:
        assert back == row


def test_the_table_of_dialects(tmp_path, capsys):
    """Prints what is read, by whom it is written, and what comes back."""
    own = {name: target for target, name in READ_BACK.items() if target != "parquet"}
    config = Config()
    config.model.adapter = None
    lines = [f"{'dialect':26} imported  exported in    round trip"]
    for name, (rows, expected) in DIALECTS.items():
        found = read(write(tmp_path / "rows.jsonl", rows)).pairs
        assert len(found) == len(expected)
        target = own.get(name, "trl")
        files = export(found, [], tmp_path / name, target, config)
        back = read(files[0]).pairs
        texts = [[(*map(without_call_ids, (row.prompt, row.chosen, row.rejected)), row.tools) for row in them]
                 for them in (found, back)]  # fmt: skip
        assert texts[0] == texts[1]
        lines.append(f"{name:26} {len(found):>2} pairs  {target:13}  {len(back)} of {len(found)} equal")
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def imported(tmp_path, *rows, **settings):
    config = Config(data=str(tmp_path / "data"), pair=PairSection(val_share=0.0, **settings))
    result = run.run_import([write(tmp_path / "rows.jsonl", rows)], config)
    return result, [pair for _, pair in read_rows(tmp_path / "data" / "train.jsonl", Preference)]


@pytest.mark.parametrize("verdict", [{"winner": "tie (bothbad)"}, {"overall_preference": 0}])
def test_a_tie_of_two_answers_is_no_pair(tmp_path, verdict):
    rows = [{"prompt": text, "response_a": "Yes.", "response_b": "No."} for text in ("One?", "Two?")]
    result, pairs = imported(tmp_path, {**rows[0], **verdict}, {**rows[1], "winner": "B"})
    assert [pair.chosen[0]["content"] for pair in pairs] == ["No."] and sum(result.skipped.values()) == 1


def test_two_comparisons_of_one_prompt_are_not_mixed(tmp_path):
    rows = [{"prompt": "One?", "response_a": a, "response_b": b, "winner": "a"} for a, b in (("A", "B"), ("C", "D"))]
    _, pairs = imported(tmp_path, *rows, max_pairs_per_prompt=4)
    assert [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs] == [("A", "B"), ("C", "D")]


def test_a_winner_that_names_neither_answer_is_refused(tmp_path):
    rows = [{"prompt": "One?", "response_a": "Yes.", "response_b": "No.", "winner": 1}]
    with pytest.raises(UserError, match='"winner" is 1: neither response_a nor response_b nor a tie'):
        read(write(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize("weights", ["none", "prompt"])
def test_a_row_keeps_its_own_weight_unless_weights_are_asked_for(tmp_path, weights):
    _, (pair,) = imported(
        tmp_path, {"prompt": "One?", "chosen": "Yes.", "rejected": "No.", "weight": 0.25}, weights=weights
    )
    assert pair.weight == {"none": 0.25, "prompt": 1.0}[weights]
