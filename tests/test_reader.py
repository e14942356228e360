"""The one opener: the same rows from every kind of file, and a line number for each that can't be read."""

import bz2
import gzip
import json
import lzma

import pytest

from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config, PairSection
from dpo_cli.data.bad_rows import BadRows
from dpo_cli.data.columns import read_mapping
from dpo_cli.data.formats.prompts import PromptFile, read_demonstration, read_prompt
from dpo_cli.data.reader import parse_rows, read_text
from dpo_cli.errors import UserError
from dpo_cli.stages.evaluate.quiz import read_questions
from dpo_cli.stages.pair import imports
from dpo_cli.training.inputs import read_inputs

ROWS = [{"prompt": "Which tide? é", "note": "a"}, {"prompt": "And\nwhich wind?", "note": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = 'prompt{0}note\r\n"Which tide? é"{0}a\r\n"And\nwhich wind?"{0}b\r\n'


def read(path):
    return [row for _, row in parse_rows(path, dict)]


def put(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", LINES.replace("\n", "\r\n")),
        ("rows.jsonl", "\ufeff\n" + LINES.replace("\n", "\n\n")),
        ("rows.txt", LINES.encode("utf-16")),
        ("rows.jsonl", LINES.encode("utf-16") + "\ufeff\n".encode("utf-16-le")),  # as `echo >>` of a shell leaves it
        ("rows.jsonl", "\ufeff".encode("utf-32-be") + LINES.encode("utf-32-be")),
        ("rows.json", json.dumps(ROWS)),
        ("rows.jsonl", json.dumps(ROWS, indent=2)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.json", json.dumps({"data": ROWS}, indent=2)),
        ("rows.json", "\n".join(json.dumps(row, indent=2) for row in ROWS)),
        ("rows.json", json.dumps({"rows": [{"row_idx": 0, "row": row, "truncated_cells": []} for row in ROWS]})),
        ("rows.csv", TABLE.format(",")),
        ("rows.csv", "\ufeff" + TABLE.format(";")),
        ("rows.tsv", TABLE.format("\t")),
        ("rows.txt", TABLE.format("|").encode("utf-16")),
        ("rows.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("rows.gz", gzip.compress(TABLE.format(",").encode(), mtime=0)),
        ("rows", bz2.compress(LINES.encode())),
        ("rows.xz", lzma.compress(json.dumps(ROWS).encode())),
    ],
)
def test_one_set_of_rows_in_all_its_files(tmp_path, name, content):
    assert read(put(tmp_path / name, content)) == ROWS


def test_zstd_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    packed = pyarrow.compress(LINES.encode(), codec="zstd", asbytes=True)
    assert read(put(tmp_path / "rows.zst", packed)) == ROWS
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == ROWS
    assert read(put(tmp_path / "p.gz", gzip.compress((tmp_path / "rows.parquet").read_bytes()))) == ROWS
    for make, name in ((pyarrow.ipc.new_file, "a.arrow"), (pyarrow.ipc.new_stream, "b.arrow")):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as file, make(file, table.schema) as writer:
            writer.write_table(table)
        assert read(tmp_path / name) == ROWS


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("dpo_cli.errors.find_spec", lambda name: None)
    for content in (b"PAR1....PAR1", b"\x28\xb5\x2f\xfd...."):
        with pytest.raises(UserError, match="needs the extra 'train'"):
            read(put(tmp_path / "rows", content))


def test_keys_that_only_other_rows_have_are_left_out_again(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {"prompt": [{"role": "user", "content": "a", "name": "bob"}]},
        {"prompt": [{"role": "user", "content": "b"}]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == rows


def test_folders(tmp_path):
    for index, row in enumerate(ROWS):
        put(tmp_path / f"train-0000{index}-of-00002.jsonl", json.dumps(row) + "\n")
    put(tmp_path / "README.md", "A dataset.")
    put(tmp_path / "dataset_infos.json", "{}")
    assert read(tmp_path) == ROWS
    put(tmp_path / "test-00000-of-00001.jsonl", LINES)
    with pytest.raises(UserError, match="splits test, train"):
        read(tmp_path)
    with pytest.raises(UserError, match="no data files"):
        read((tmp_path / "empty").mkdir() or tmp_path / "empty")


def test_what_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == ROWS
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict") == ROWS
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="splits train, test") as raised:
        read(tmp_path / "two")
    assert "two/train" in raised.value.hint
    assert read(tmp_path / "two" / "train") == ROWS


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (GOOD.encode() + b'{"prompt": "\xe9"}\n', 2, "not UTF-8 text: byte 0xe9"),
        (GOOD + '{"prompt": ' + "[" * 3000 + "]" * 3000 + "}\n", 2, "nested too deeply"),
        (GOOD + '{"n": ' + "9" * 6000 + "}\n", 2, "more digits than can be read"),
        (GOOD + '\n{"prompt": "\\ud800"}\n', 3, "lone surrogate \\\\ud800"),
        (GOOD.encode() + b'{"prompt": "a\x00"}\n', 2, "NUL bytes"),
        (GOOD + "{'prompt': 'a'}\n", 2, "not a JSON object"),
        (GOOD + "[1]\n", 2, "not a JSON object but a list"),
        ("[" + GOOD + "," + GOOD + ', {"prompt": ]', 3, "not JSON"),
        ("[" + GOOD + "," + GOOD, 3, "the array breaks off"),
        ("[" + GOOD + ", 3]", 2, "not a JSON object but a number"),
        ("prompt,note\na,b\nc\n", 3, "1 columns, not 2"),
        (b"prompt,note\na,b\n\xe9,b\n", 3, "not UTF-8 text"),
        ((GOOD + '{"prompt": "').encode("utf-16") + b"\x00\xd8", 2, "not UTF-16-LE text"),
    ],
)
def test_what_can_not_be_read_is_named_by_line(tmp_path, content, line, what):
    path = put(tmp_path / "rows", content)
    with pytest.raises(UserError, match=what) as raised:
        read(path)
    assert raised.value.where == f"{path}:{line}"
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(LINES.encode(), mtime=0)[:-12], "breaks off"),
        (b"PAR1 and no parquet", "not a whole parquet file"),
        (b"PK\x03\x04....", "a zip archive"),
        ("Which tide?\nAnd which wind?\n", "neither JSON nor a table"),
        (json.dumps({"prompt": {"0": "a"}, "note": {"0": "b"}}), "an object of columns"),
    ],
)
def test_what_no_row_can_be_read_of_is_named(tmp_path, content, what):
    with pytest.raises(UserError, match=what) as raised:
        read(put(tmp_path / "rows", content))
    assert str(tmp_path / "rows") in raised.value.where and raised.value.hint


def test_nan_is_not_known_or_a_fault_where_a_number_is_meant(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = put(tmp_path / "rows", json.dumps({**row, "perplexity": float("nan")}))
    assert imports.read([path], PairSection(), 0.0).formats == {"trl-plain": 1}
    put(path, json.dumps({**row, "chosen_score": float("nan")}))
    with pytest.raises(UserError, match="is nan, not a number; null says"):
        imports.read([path], PairSection(), 0.0)


def test_bad_rows_are_counted_or_left_out(tmp_path):
    path = put(tmp_path / "rows", GOOD + '{"prompt": 3}\n' + "{torn\n" + GOOD + '{"prompt": 4}\n')
    with pytest.raises(UserError, match="2 more bad rows, of 2 kinds") as raised:
        list(PromptFile(path))
    assert raised.value.where == f"{path}:2" and "--skip-bad" in raised.value.hint
    file = PromptFile(path, skip_bad=True)
    assert len(list(file)) == 2
    assert "bad rows left out: " in file.notes(tmp_path / "data")[0]
    written = [json.loads(line) for line in (tmp_path / "data" / "rejected-rows.jsonl").read_text().splitlines()]
    assert [(row["line"], row["row"]) for row in written] == [(2, {"prompt": 3}), (3, "{torn"), (5, {"prompt": 4})]
    assert all(row["file"] == str(path) and row["reason"] for row in written)
    BadRows().write(tmp_path / "data")
    assert not (tmp_path / "data" / "rejected-rows.jsonl").exists(), "it would be of another file"


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "a", "system": "s"}, [("system", "s"), ("user", "a")]),
        ({"instruction": "a", "input": "b", "output": "c"}, [("user", "a\nb")]),
        ({"instruction": "a", "input": ""}, [("user", "a")]),
        ({"question": "a", "answer": "b"}, [("user", "a")]),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [("user", "a")]),
        ({"conversation": [{"human": "a", "assistant": "b"}]}, [("user", "a")]),
        ({"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
          "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}, [("user", "a")]),
        ({"query": "b", "history": '[["a", "c"]]'}, [("user", "a"), ("assistant", "c"), ("user", "b")]),
        ({"prompt": '[{"role": "user", "content": "a"}]'}, [("user", "a")]),
        ({"prompt": "a", "system_prompt": None, "id": 3, "source": "x", "chosen_rating": 3.5}, [("user", "a")]),
    ],
)  # fmt: skip
def test_prompts_under_their_many_names(row, prompt):
    read = read_prompt(row)
    assert [(message["role"], message["content"]) for message in read.messages] == prompt


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "images": ["a.png"]}, 'the row has "images"; only text'),
        ({"prompt": "a", "audio": {"path": "a.wav"}}, 'the row has "audio"'),
        ({"question": "a", "Context": "b"}, 'the column "Context" has no place here; --columns ROLE=Context'),
        ({"prompt": "a", "input": "b"}, 'the column "input" has no place'),
        ({"prompt": "a", "history": "x"}, '"history" is not a list'),
        ({"prompt": "a", "system": {"a": 1}}, '"system" is not a text'),
        (
            {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "system": "t"},
            "else than",
        ),
    ],
)
def test_content_that_has_no_place_is_refused_by_name(row, what):
    with pytest.raises(ValueError, match=what.replace("(", r"\(")):
        read_prompt(row)


TWICE = '{"prompt": "a", "note": "x", "prompt": "b"}'


@pytest.mark.parametrize("form", ["{0}\n{1}\n{0}\n", "[{0},\n{1},\n{0}]", '{{"data": [{0},\n{1},\n{0}]}}'])
def test_a_key_that_stands_twice_with_different_values_is_refused_by_name(tmp_path, form):
    good = '{"prompt": "c", "source": {"a": 1, "a": 1}, "source": {"a": 1}}'  # nothing is lost
    path = put(tmp_path / "rows", form.format(good, TWICE))
    with pytest.raises(UserError, match='the key "prompt" stands twice') as caught:
        list(PromptFile(path))
    assert caught.value.where == f"{path}:2"
    assert [prompt.messages[0]["content"] for prompt in PromptFile(path, skip_bad=True)] == ["c", "c"]
    nested = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    with pytest.raises(UserError, match='the key "content" stands twice'):
        list(PromptFile(put(tmp_path / "nested", form.format(good, nested))))


def test_where_one_of_the_first_rows_has_a_key_twice_all_are_looked_at(tmp_path):
    rows = [f'{{"prompt": "{number}"}}' for number in range(300)]
    path = put(tmp_path / "rows.jsonl", "\n".join([*rows[:63], TWICE, *rows[64:], TWICE]))
    file = PromptFile(path, skip_bad=True)
    assert len(list(file)) == 299 and [row.line for row in file.bad.rows] == [64, 301]
    late = PromptFile(put(tmp_path / "late.jsonl", "\n".join([*rows, TWICE])))
    assert len(list(late)) == 301, "as far down as that is not looked, since it would cost a fifth of reading"


def test_an_array_of_texts_is_prompts_and_what_else_stands_in_it_is_told_with_its_line(tmp_path):
    path = put(tmp_path / "p.json", '[\n "Write a scene. é",\n {"prompt": "Two."},\n "[bracketed]"\n]')
    assert [prompt.messages[0]["content"] for prompt in PromptFile(path)] == ["Write a scene. é", "Two.", "[bracketed]"]
    path = put(tmp_path / "bad.json", '["a",\n "",\n 3,\n "\\ud800", ["b"]]')
    file = PromptFile(path, skip_bad=True)
    assert [prompt.messages for prompt in file] == [[{"role": "user", "content": "a"}]]
    assert [(row.line, row.reason.partition(":")[0]) for row in file.bad.rows] == [
        (2, "the prompt has no text"), (3, "not a JSON object but a number"), (4, "half of a character"),
        (4, "not a JSON object but a list"),
    ]  # fmt: skip
    pairs = put(tmp_path / "pairs.json", '["a"]')  # nowhere else is a text a row
    with pytest.raises(UserError, match="not a JSON object but a text"):
        list(parse_rows(pairs, lambda row: row))


def request(number, **body):
    """A line for the Batch API, as OpenAI's guide to it has them."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Hello {number}"}]
    whole = {"model": "gpt-4o-mini", "messages": messages, "max_tokens": 1000, **body}
    return {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/chat/completions", "body": whole}


def test_requests_for_a_batch_are_prompts_and_what_else_they_ask_for_is_said_once(tmp_path):
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    rows = [
        request(1), request(2, temperature=0.5, tools=[tool], stop=[]),
        {"custom_id": "3", "url": "/v1/completions", "body": {"model": "m", "prompt": "Once"}},
    ]  # fmt: skip
    file = PromptFile(put(tmp_path / "b.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    found = list(file)
    assert [prompt.messages[-1]["content"] for prompt in found] == ["Hello 1", "Hello 2", "Once"]
    assert found[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert [prompt.tools for prompt in found] == [None, [tool], None]
    [note] = file.notes(None)
    assert note == "columns left out: body.model (3 rows), body.max_tokens (2 rows), body.temperature (1 row)"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"custom_id": "1", "url": "/v1/embeddings", "body": {"input": "a", "model": "m"}}, '"body" has no "messages"'),
        (request(1, context="b"), 'the column "context" has no place here'),
        (request(1) | {"persona": "b"}, 'the column "persona" has no place here'),
        (request(1, messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "only text can be read"),
        ({"body": {"messages": [{"role": "user", "content": "a"}]}}, 'no "prompt" and no "messages"; the row has body'),
    ],
)
def test_a_request_that_is_no_prompt_is_refused_by_name(row, what):
    with pytest.raises(ValueError, match=what):
        read_prompt(row)


def test_columns_give_others_their_place():
    row = {"frage": "a", "context": "b", "persona": "s", "note": "n"}
    read = read_prompt(row, read_mapping("prompt=frage,input=context,system=persona,ignore=note"))
    assert [message["content"] for message in read.messages] == ["s", "a\nb"]
    with pytest.raises(UserError, match="'x=y' is no ROLE=COLUMN"):
        read_mapping("prompt=a,x=y")


def test_demonstrations():
    assert read_demonstration({"instruction": "a", "input": "b", "output": "c"})[1] == [
        {"role": "assistant", "content": "c"}
    ]
    thinking = read_demonstration({"prompt": "a", "completion": "b", "reasoning_content": "r"})[1]
    assert thinking == [{"role": "assistant", "content": "b", "reasoning_content": "r"}]
    with pytest.raises(ValueError, match='no "completion"'):
        read_demonstration({"messages": [{"role": "user", "content": "a"}]})


def test_quizzes_are_read_as_well(tmp_path):
    path = put(tmp_path / "quiz.csv", 'question;answers\nWhich tide?;"[""Spring"", ""Neap""]"\n')
    [question] = read_questions(path).values()
    assert question.answers == ["Spring", "Neap"]
    put(path, json.dumps([{"question": "Which?", "answers": {"text": ["Spring"], "answer_start": [3]}}]))
    [question] = read_questions(path).values()
    assert question.answers == ["Spring"]


def test_texts_in_any_encoding(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        assert read_text(put(tmp_path / "a.toml", "name = 'é'\n".encode(encoding))) == "name = 'é'\n"


def test_columns_of_training_rows_are_mapped_and_what_is_left_out_is_counted(tmp_path):

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"ask": "One?", "reply": "Two.", "critique": "short"}) + "\n")
    given = {"sft.columns": "prompt=ask,completion=reply", "pair.val_share": 0.0}
    inputs = read_inputs(resolve(flags=given, environment={}).config, "sft", file, None)
    assert inputs.rows[0].completions == [[{"role": "assistant", "content": "Two."}]]
    assert inputs.dropped == {"critique": 1}
    with pytest.raises(UserError, match=r'rows.jsonl:1: no "prompt".* the row has ask, critique, reply') as refused:
        read_inputs(Config(), "sft", file, None)
    assert "--columns prompt=NAME" in (refused.value.hint or "")
