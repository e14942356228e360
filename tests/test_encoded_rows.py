"""Encoded rows in their file: the same tokens as the tokenizer gives, made once, and never believed when damaged."""

import os
import re
import signal
import time

import pytest
from adapters import base_model
from datasets import Dataset
from training import Lines, exit_code_of, kill_this_process, pair

from dpo_cli.config.settings import ModelSection
from dpo_cli.data import files
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.training import encoded_rows
from dpo_cli.training.encode import IGNORED, Encoder
from dpo_cli.training.encoded_rows import content_key, encode_rows, prune
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


# What nobody uses any more

MONTH = 31 * 86_400


def age(folder):
    """As if nobody had touched the files of a folder for a month."""
    for file in folder.iterdir():
        os.utime(file, (time.time() - MONTH, time.time() - MONTH))


def in_use(folder):
    return sorted(file.name[:8] for file in folder.glob("[!.]*.arrow"))


def test_what_was_not_used_for_a_month_is_removed_and_said(base, tmp_path):
    old = encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent()).rows
    del old
    (tmp_path / "half.arrow").write_bytes(b"of a killed run")
    (tmp_path / "alone.json").write_text("{}")
    (tmp_path / ".gone.arrow.0a1b2c3d.new").write_bytes(b"of a killed run as well")
    stale = {file.name for file in tmp_path.iterdir() if file.name != ".lock"}
    age(tmp_path)
    kept = encode_rows(encoder(base), PAIRS[20:40], tmp_path, base, Silent()).rows
    del kept
    said = Lines()
    prune(tmp_path, said)
    assert len(stale) == 5 and not stale & {file.name for file in tmp_path.iterdir()}
    assert len(in_use(tmp_path)) == 1
    [line] = said.lines
    assert re.fullmatch(r".*: removed the encoded rows of 3 data sets, 0 MB, which no run has used for 30 days", line)
    prune(tmp_path, said)
    assert len(said.lines) == 1


def test_what_is_in_use_stays_however_old_and_to_use_it_makes_it_young(base, tmp_path):
    rows = encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent()).rows
    age(tmp_path)
    prune(tmp_path, Silent())
    assert len(in_use(tmp_path)) == 1
    del rows
    encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent())
    prune(tmp_path, Silent())
    assert len(in_use(tmp_path)) == 1
    age(tmp_path)
    with encoded_rows._one_at_a_time(tmp_path):  # somebody encodes
        prune(tmp_path, Silent())
    assert len(in_use(tmp_path)) == 1
    prune(tmp_path, Silent())
    assert in_use(tmp_path) == []


@pytest.mark.parametrize("shared", [True, False])
def test_runs_that_start_at_once_lose_nothing(base, tmp_path, monkeypatch, counted, shared):
    """One of them comes in between the other's opening of a file and its lock on it."""
    expected = held(encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent()).rows)
    age(tmp_path)
    counted.clear()
    lock, between = files.lock, []

    def slow(handle, path, wait, shared=False):
        if path.suffix == ".arrow" and shared == slow.of and not between:
            between.append(path)
            if shared:  # it is being opened for use
                prune(tmp_path, Silent())
            else:  # it is being removed
                assert encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent()).rows
        return lock(handle, path, wait, shared)

    slow.of = shared
    monkeypatch.setattr(files, "lock", slow)
    said = Lines()
    if shared:
        found = encode_rows(encoder(base), PAIRS[:20], tmp_path, base, said)
        assert between and held(found.rows) == expected and len(counted) == 20
    else:
        prune(tmp_path, said)
        assert between and len(in_use(tmp_path)) == 1 and not counted
    assert said.lines == []


def test_texts_are_their_owners_and_the_lock_is_anybodys(base, tmp_path):
    assert encode_rows(encoder(base), PAIRS[:20], tmp_path, base, Silent()).rows
    modes = {file.suffix or file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
    assert modes == {".arrow": 0o600, ".json": 0o644, ".lock": 0o644}
    (tmp_path / ".lock").chmod(0o444)  # another user's, as far as one can tell
    assert encode_rows(encoder(base), PAIRS[20:40], tmp_path, base, Silent()).rows


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
