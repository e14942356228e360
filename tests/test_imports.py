"""`pair --import` as it is typed: what is left out is said, several files add up, and the split stays one."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpo_cli.cli import app
from dpo_cli.data import spool
from dpo_cli.data.records import prompt_id, split_side

PAIR = {"prompt": "Which tide?", "chosen": "The spring tide.", "rejected": "No idea."}
OTHER = {"prompt": "And which wind?", "chosen": "The west wind.", "rejected": "No idea."}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*arguments, code=0):
    done = CliRunner().invoke(app, [*map(str, arguments), "--quiet"])
    assert done.exit_code == code, done.output
    return done


def answer(*arguments):
    return json.loads(call(*arguments, "--json").stdout)


def write(name, *rows):
    Path(name).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return name


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_bad_rows_stop_it_or_are_left_out_with_line_and_reason():
    file = write("a.jsonl", PAIR, {**OTHER, "rejected": None}, "{torn", OTHER)
    stopped = call("pair", "--import", file, code=2)
    assert 'a.jsonl:2: no "rejected"' in stopped.stderr and "1 more bad rows" in stopped.stderr
    assert "--skip-bad" in stopped.stderr and not Path("data/dpo/train.jsonl").exists()
    result = answer("pair", "--import", file, "--skip-bad", "--val-share", 0)
    assert result["train"] == 2 and sum(result["bad_rows"].values()) == 2
    rejected = lines(result["rejected_path"])
    assert [(row["file"], row["line"]) for row in rejected] == [("a.jsonl", 2), ("a.jsonl", 3)]
    assert rejected[0]["row"] == {**OTHER, "rejected": None} and rejected[1]["row"] == "{torn"
    shown = call("pair", "--import", file, "--skip-bad").stdout
    assert "bad rows left out" in shown and "rejected-rows.jsonl" in shown
    answer("pair", "--import", write("b.jsonl", PAIR), "--skip-bad")
    assert not Path("data/dpo/rejected-rows.jsonl").exists()


def test_several_imports_add_up():
    table = Path("b.csv")
    table.write_text(
        "question;good;bad\nAnd which wind?;The west wind.;No idea.\nWhich tide?;The spring tide.;No idea.\n"
    )
    result = answer("pair", "--import", write("a.jsonl", PAIR), "--import", table, "--val-share", 0)
    assert result["train"] == 2 and result["skipped"] == {"a copy of another pair": 1}
    assert result["format"] == "prompt-good-bad, trl-plain"


def test_columns_that_are_left_out_are_said_with_a_count_and_others_given_their_place():
    file = write("a.jsonl", {**PAIR, "rationale": "x", "source": "y"}, {**OTHER, "rationale": ""})
    assert answer("pair", "--import", file)["dropped"] == {"rationale": 1}
    shown = call("pair", "--import", file)
    assert "columns left out" in shown.stdout and "rationale (1 row" in shown.stdout
    file = write("b.jsonl", {"q": "Which?", "lore": "Of tides.", "a": "Spring.", "b": "No."})
    assert "a.jsonl" not in call("pair", "--import", file, code=2).stderr
    answer("pair", "--import", file, "--columns", "prompt=q,system=lore,chosen=a,rejected=b", "--val-share", 0)
    [row] = lines("data/dpo/train.jsonl")
    assert [message["content"] for message in row["prompt"]] == ["Of tides.", "Which?"]
    assert "ROLE=COLUMN" in call("pair", "--import", file, "--columns", "q", code=2).stderr


def test_the_first_pair_is_shown_as_it_was_read_and_as_it_is_exported():
    shown = call("pair", "--import", write("a.jsonl", PAIR), "--val-share", 0).stdout
    assert "the first pair" in shown and "The spring tide." in shown
    shown = call("pair", "--to", "openai").stdout
    assert '"preferred_output"' in shown and "The spring tide." in shown


def test_labels_and_ratings_make_pairs_by_the_strategy():
    file = write("a.jsonl", {"prompt": "Which?", "generations": ["a", "b", "c"], "ratings": [1, 3, 2]})
    [row] = (answer("pair", "--import", file, "--val-share", 0), lines("data/dpo/train.jsonl"))[1]
    assert (row["chosen"][0]["content"], row["rejected"][0]["content"], row["score_gap"]) == ("b", "a", 2.0)
    assert answer("pair", "--import", file, "--strategy", "all")["train"] == 3
    kto = [{"prompt": "Which?", "completion": text, "label": text in "ab"} for text in "abcd"]
    result = answer("pair", "--import", write("k.jsonl", *kto), "--val-share", 0)
    assert result["train"] == 1 and result["skipped"] == {"an answer beyond the pair of its prompt (--strategy all)": 2}
    assert answer("pair", "--import", "k.jsonl", "--strategy", "all", "--val-share", 0)["train"] == 4


@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_answers_to_a_prompt_are_taken_together_from_wherever_they_stand(monkeypatch, in_memory):
    """They are put aside, in a temporary file where they are many."""
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    one, two, three = ("Which tide?", "Which wind?", "Which moon?")
    file = write(
        "a.jsonl",
        {"prompt": two, "responses": ["x", "y"], "scores": [1, 9]},
        {"prompt": one, "completion": "a", "label": True},
        {"prompt": three, "completion": "alone", "label": True},
        {"prompt": two, "responses": ["z", "y"], "scores": [5, 0]},
        {"prompt": one, "completion": "b", "label": False},
    )

    def pairs(strategy):
        found = answer("pair", "--import", file, "--strategy", strategy, "--val-share", 0)
        said = [tuple(row[side][0]["content"] for side in ("prompt", "chosen", "rejected")) for row in
                lines("data/dpo/train.jsonl")]  # fmt: skip
        return said, found["skipped"]

    alone = {"all answers to its prompt are labelled good": 1}
    assert pairs("auto") == ([(two, "y", "x"), (one, "a", "b")], alone)
    assert pairs("adjacent") == ([(two, "y", "z"), (two, "z", "x"), (one, "a", "b")], alone)
    # From 0 to 9: at least 6.3 against at most 3.6. The second "y" says what the only high answer says.
    assert sorted(pairs("stratified")[0]) == [(two, "y", bad) for bad in ("a", "alone", "b", "x")]


def test_imported_pairs_are_split_by_their_prompts_ids():
    """As pairs of judgments are, so that a prompt is on the same side whichever way its pairs came."""
    rows = [{**PAIR, "prompt": f"Which tide, {number}?"} for number in range(200)]
    call("pair", "--import", write("a.jsonl", *rows), "--val-share", 0.5)
    for side in ("train", "val"):
        ids = [prompt_id(row["prompt"]) for row in lines(f"data/dpo/{side}.jsonl")]
        assert any(key.startswith("0") for key in ids)
        assert all(split_side(key, 42, 0.5) == (side == "val") for key in ids)


def test_generate_says_what_it_left_out():
    file = write("p.jsonl", {"prompt": "a", "note": "x"}, {"prompt": 3})
    assert "p.jsonl:2" in call("generate", "--prompts", file, "--url", "http://x/v1", "--dry-run", code=2).stderr
    command = ("generate", "--prompts", file, "--url", "http://x/v1", "--dry-run", "--skip-bad")
    left = answer(*command)["left_out"]
    assert left[0] == "columns left out: note (1 row)" and left[1].startswith("bad rows left out: ")
    assert not Path("data/dpo/rejected-rows.jsonl").exists(), "a dry run writes nothing"


def test_train_refuses_a_split_that_shares_prompts():
    Path("data/dpo").mkdir(parents=True)
    write("data/dpo/train.jsonl", PAIR, OTHER)
    write("data/dpo/val.jsonl", {**PAIR, "chosen": "Neap."})
    stopped = call("train", code=2).stderr
    assert "1 of 1 held-out prompts are in train.jsonl as well" in stopped and "inspect pairs --fix" in stopped
