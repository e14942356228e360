"""Encoded rows in their file: the same tokens as the tokenizer gives, made once, and never believed when damaged."""

import signal

import pytest
from adapters import base_model
from datasets import Dataset
from training import Lines, exit_code_of, kill_this_process, pair

from dpo_cli.config.settings import ModelSection
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.training import encoded_rows
from dpo_cli.training.encode import IGNORED, Encoder
from dpo_cli.training.encoded_rows import content_key, encode_rows
from dpo_cli.training.inputs import TrainingRow
from dpo_cli.training.trainer import load_encoder

PAIRS = [
    TrainingRow(row["prompt"], [row["chosen"], row["rejected"]], 2.0, 0.5 + number % 2, (7.0, 5.0), where=f"f:{number}")
    for number, row in enumerate(map(pair, range(700)))
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_model(tmp_path_factory.mktemp("encoded") / "base")


def encoder(base, max_length=256, **settings):
    return load_encoder(base, ModelSection(**settings), max_length)


@pytest.fixture
def counted(monkeypatch):
    """The rows that an encoder was asked for."""
    asked, encode = [], Encoder.encode

    def count(self, rows):
        asked.extend(rows)
        return encode(self, rows)

    monkeypatch.setattr(Encoder, "encode", count)
    return asked


def whole(made, messages, answer_next=False):
    """The tokenizer's own ids of a conversation, in one call."""
    ids = made.tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, tokenize=True)
    return ids["input_ids"] if hasattr(ids, "keys") else ids


def held(rows):
    return [(row.prompt, row.completions, row.gap, row.weight, row.scores) for row in rows]


def test_pairs_are_the_tokenizers_own_tokens_and_a_second_run_reads_them(base, tmp_path, counted):
    made = encoder(base)
    found = encode_rows(made, PAIRS, tmp_path, base, Silent())
    for row, encoded in zip(PAIRS, found.rows, strict=True):
        assert encoded.prompt == whole(made, row.prompt, True)
        assert [encoded.prompt + one for one in encoded.completions] == [
            whole(made, row.prompt + one) for one in row.completions
        ]
        assert (encoded.gap, encoded.weight, encoded.scores) == (row.gap, row.weight, row.scores)
    assert [(one.prompt, one.completions) for one in found.rows.lengths()] == [
        (len(row.prompt), list(map(len, row.completions))) for row in found.rows
    ]
    counted.clear()
    moved = [row._replace(where="elsewhere:1") for row in PAIRS]
    again = encode_rows(encoder(base), moved, tmp_path, base, Silent())
    assert not counted and held(again.rows) == held(found.rows)
    [file] = tmp_path.glob("*.arrow")
    assert Dataset.from_file(str(file))[-1]["chosen_ids"] == found.rows[-1].completions[0]  # a foreign reader


def test_demonstrations_ignore_the_prompt(base, tmp_path):
    rows = [row._replace(completions=row.completions[:1]) for row in PAIRS[:300]]
    made = encoder(base)
    found = encode_rows(made, rows, tmp_path, base, Silent())
    for row, encoded, example in zip(rows, found.rows, encoded_rows.columns(found.rows).to_pylist(), strict=True):
        prompt, ids = whole(made, row.prompt, True), whole(made, row.prompt + row.completions[0])
        assert example == {"input_ids": ids, "labels": [IGNORED] * len(prompt) + ids[len(prompt) :]}
        assert encoded.prompt == prompt and encoded.completions == [ids[len(prompt) :]]


@pytest.mark.parametrize("damage", ["truncated", "a bit", "swapped", "no note", "half a note", "gone", "empty"])
def test_a_damaged_file_is_made_again_with_a_line(base, tmp_path, counted, damage):
    found = held(encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent()).rows)
    [file] = tmp_path.glob("*.arrow")
    note, content = file.with_suffix(".json"), file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-200])
    elif damage == "a bit":
        at = len(content) // 2
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage == "swapped":
        other = encode_rows(encoder(base), PAIRS[20:40], tmp_path / "other", base, Silent())
        assert other.rows
        for theirs in (tmp_path / "other").glob("[!.]*"):
            theirs.replace(file.with_suffix(theirs.suffix))
    elif damage == "no note":
        note.unlink()
    elif damage == "half a note":
        note.write_bytes(note.read_bytes()[:30])
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"")
    counted.clear()
    said = Lines()
    assert held(encode_rows(encoder(base), PAIRS[:20], tmp_path, base, said).rows) == found and len(counted) == 20
    assert [str(file) in line and "damaged" in line for line in said.lines] == [True] * (damage != "no note")
    assert held(encode_rows(encoder(base), PAIRS[:20], tmp_path, base, said).rows) == found and len(counted) == 20


def test_whatever_changes_the_tokens_changes_the_key(base, tmp_path):
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    key = content_key(encoder(base), PAIRS, base)
    assert content_key(encoder(other), PAIRS, other) == key
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    template = tmp_path / "t.jinja"
    template.write_text(encoder(base).tokenizer.chat_template + " ")
    dated = encoder(base)
    dated.tokenizer.chat_template += "{% if false %}{{ strftime_now('%d') }}{% endif %}"
    keys = [
        key,
        content_key(encoder(other), PAIRS, other),
        content_key(encoder(base, 255), PAIRS, base),
        content_key(encoder(base, chat_template_kwargs={"a": 1}), PAIRS, base),
        content_key(encoder(base, thinking="strip"), PAIRS, base),
        content_key(encoder(base, chat_template=str(template)), PAIRS, base),
        content_key(dated, PAIRS, base),
        content_key(encoder(base), PAIRS[1:], base),
        content_key(encoder(base), [PAIRS[0]._replace(tools=[{"type": "function"}]), *PAIRS[1:]], base),
        content_key(encoder(base), [PAIRS[0]._replace(weight=3.0), *PAIRS[1:]], base),
    ]
    assert len(set(keys)) == len(keys)
    assert "now" in dated.settings() and dated.settings()["now"] is not None


def test_killed_in_the_middle_it_leaves_nothing_that_is_believed(base, tmp_path, counted):
    def killed():
        encode, calls = Encoder.encode, []

        def stop(self, rows):
            if calls:
                kill_this_process()
            calls.append(rows)
            return encode(self, rows)

        Encoder.encode = stop
        encode_rows(encoder(base), PAIRS, tmp_path, base, Silent())

    assert exit_code_of(killed) == -signal.SIGKILL
    assert not list(tmp_path.glob("*.arrow")) and list(tmp_path.glob(".*.new"))
    found = encode_rows(encoder(base), PAIRS, tmp_path, base, Silent())
    assert len(found.rows) == len(counted) == len(PAIRS)
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.name != ".lock") == [".arrow", ".json"]


def test_an_error_leaves_no_file(base, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match="refuses this conversation"):
        encode_rows(encoder(base, chat_template=str(template)), PAIRS, tmp_path / "files", base, Silent())
    assert [file.name for file in (tmp_path / "files").iterdir()] == [".lock"]


def test_a_tokenizer_that_reads_on_over_its_added_tokens_is_asked_for_whole_texts(base):
    made = encoder(base)
    tokenize = made._tokenize

    def by_length(texts, fast=False):
        """An answer ends with a token for the length of the whole text."""
        return [
            ids if text.endswith("assistant\n") else [*ids, len(text)]
            for ids, text in zip(tokenize(texts, fast), texts, strict=True)
        ]

    made._tokenize = by_length
    row = PAIRS[0]
    turns = [turn for turn in made._turns(encoded_rows.exchange(row)) if turn]
    assert [ids for turn in turns for ids in made._joined_ids(turns)[turn]] == by_length(
        [text for turn in turns for text in (turn.prompt, turn.prompt + turn.completion)]
    )
    assert not made._divides
