"""`pair` and `inspect pairs --lint` as they are typed."""

import json
from pathlib import Path

import msgspec
import pytest
from test_lint import pair as preference
from test_lint import scene, sound
from test_rollouts import row as rollout
from test_rollouts import write as write_rollouts
from typer.testing import CliRunner

from dpo_cli.cli import app
from dpo_cli.data.jsonl import write_rows


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*arguments, code=0):
    done = CliRunner().invoke(app, [*map(str, arguments), "--data", "data", "--quiet"])
    assert done.exit_code == code, done.output
    return done


def answer(*arguments, code=0):
    return json.loads(call(*arguments, "--json", code=code).stdout)


def rows(side, folder="data"):
    return [json.loads(line) for line in Path(folder, f"{side}.jsonl").read_text("utf-8").splitlines()]


REWARDED = [rollout(f"p{i}", f"{text} {i}", reward) for i in range(30)
            for text, reward in (("a", 0.9), ("b", 0.5), ("c", 0.65))]  # fmt: skip


def test_rollouts_with_the_guides_gap_and_statistics(tmp_path):
    file = write_rollouts(tmp_path / "r.jsonl", [*REWARDED, rollout("q", "d", 0.6), rollout("q", "e", 0.5)])
    result = answer("pair", "--rollouts", file, "--strategy", "same-prompt")
    assert result["train"] + result["val"] == 30 == len(rows("train")) + len(rows("val"))
    assert (result["rollouts"]["rollouts"], result["rollouts"]["prompts"]) == (92, 31)
    assert result["rollouts"]["average_gap"] == pytest.approx(0.4)
    assert answer("pair", "--rollouts", file) == result, "best-worst is the guide's same-prompt"
    assert answer("pair", "--rollouts", file, "--min-gap", "0.05")["rollouts"]["pairs"] == 31
    shown = call("pair", "--rollouts", file, "--dry-run").stdout
    assert "92 rollouts of 31 prompts" in shown and "gap 0.400" in shown


def test_stratified_rollouts_take_rewards_as_they_stand(tmp_path):
    file = write_rollouts(tmp_path / "r.jsonl", REWARDED)
    done = call("pair", "--rollouts", file, "--strategy", "stratified", code=2)
    assert "no pair comes out of 90 rollouts of 30 prompts" in done.stderr
    assert "rewards go from 0.5 to 0.9" in done.stderr
    result = answer(
        "pair", "--rollouts", file, "--strategy", "stratified", "--low", "0.5", "--max-pairs-per-prompt", "2"
    )
    assert result["train"] + result["val"] == 60
    assert {(row["chosen_score"], row["rejected_score"]) for row in rows("train")} == {(0.9, 0.5)}
    call("pair", "--rollouts", file, "--strategy", "all", code=2)


def test_import_says_what_it_read(tmp_path):
    (tmp_path / "t.csv").write_text("prompt,good,bad\nWhy?,Because it rained.,No.\n")
    assert answer("pair", "--import", "t.csv")["format"] == "prompt-good-bad"
    assert "prompt-good-bad" in call("pair", "--import", "t.csv", "--margin-column").stdout
    assert "margin" not in [*rows("train"), *rows("val")][0], "there is no score"
    call("pair", "--import", "t.csv", "--to", "trl", code=2)


def test_export_of_what_is_there(tmp_path):
    file = write_rollouts(tmp_path / "r.jsonl", REWARDED)
    call("pair", "--to", "trl", code=2)
    call("pair", "--rollouts", file, "--margin-column")
    assert answer("pair", "--to", "trl", "--dry-run")["files"] == []
    result = answer("pair", "--to", "trl")
    assert result["files"] == ["data/trl/train.jsonl", "data/trl/val.jsonl"]
    exported = rows("train", "data/trl")
    assert len(exported) == result["train"]
    assert set(exported[0]) == {"prompt", "chosen", "rejected", "margin"}
    assert exported[0]["margin"] == pytest.approx(0.4)
    before = rows("train")
    call("pair", "--to", "trl", "--out", "data/.", code=2)
    assert rows("train") == before
    shown = call("pair", "--to", "nemo-rl", "--out", "elsewhere", "--set", "model.adapter=none").stdout
    assert "one GPU" in shown and "examples/run_dpo.py" in shown
    assert (tmp_path / "elsewhere" / "nemo_rl.yaml").exists()


def test_margins_survive_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    call("pair", "--rollouts", write_rollouts(tmp_path / "r.jsonl", REWARDED), "--margin-column")
    call("pair", "--to", "parquet")
    assert parquet.read_table("data/parquet/train.parquet")["margin"].to_pylist() == pytest.approx(
        [0.4] * len(rows("train"))
    )


def faulty():
    good = [sound(seed) for seed in range(12)]
    return [*good, preference(scene(900), scene(901), "  "), good[0]], good[1:3]


def test_lint_names_rows_and_exits_with_three(tmp_path):
    assert "nothing-dpo judge" in call("inspect", "pairs", "--lint", code=2).stderr
    train, val = faulty()
    write_rows(tmp_path / "data/train.jsonl", train)
    write_rows(tmp_path / "data/val.jsonl", val)
    result = answer("inspect", "pairs", "--lint", code=3)
    findings = {finding["rule"]: finding for finding in result["lint"]["findings"]}
    assert {"empty-side", "duplicate", "leakage"} <= set(findings)
    assert findings["empty-side"]["rows"] == [{"id": train[12].id, "where": "data/train.jsonl:13"}]
    assert result["lint"]["errors"] == result["errors_left"] > 0
    shown = call("inspect", "pairs", "--lint", code=3).stdout
    assert "empty-side" in shown and "train.jsonl:13" in " ".join(shown.split()) and train[12].id[:8] in shown


def test_the_fixed_copy_lints_clean(tmp_path):
    train, val = faulty()
    write_rows(tmp_path / "data/train.jsonl", train)
    write_rows(tmp_path / "data/val.jsonl", val)
    call("inspect", "pairs", "--fix", "data", code=2)
    result = answer("inspect", "pairs", "--fix", "clean")
    assert result["lint"]["errors"] > 0 == result["errors_left"]
    assert result["fixed"]["train"] + result["fixed"]["val"] == 12
    assert [json.loads(msgspec.json.encode(row)) for row in train] == rows("train"), "the data is as it was"
    done = CliRunner().invoke(app, ["inspect", "pairs", "--lint", "--data", "clean", "--json"])
    assert (done.exit_code, json.loads(done.stdout)["lint"]["errors"]) == (0, 0)
    assert "estimated" in result["lint"]["tokens"]


def test_lint_counts_tokens_with_the_base_models_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"?": 0}, merges=[], unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained("base")  # a character is a token
    write_rows(tmp_path / "data/train.jsonl", [sound(1)])
    limit = "train.max_length=120"
    result = answer("inspect", "pairs", "--lint", "--set", limit, "--set", "model.base=base", code=3)
    assert result["lint"]["tokens"] == "tokenizer"
    assert [finding["rule"] for finding in result["lint"]["findings"]] == ["length"]
    message = result["lint"]["findings"][0]["message"]
    longest = max(len(side[0]["content"]) for side in (sound(1).chosen, sound(1).rejected))
    assert message.startswith(f"{longest + len('Go on with the scene.')} tokens")
