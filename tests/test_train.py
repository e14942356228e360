"""Runs: resuming, refusing, finishing; what is left in the run folder and what is published."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from adapters import base_model, save_adapter
from training import (
    AtStep,
    Lines,
    exit_code_of,
    kill_this_process,
    metrics,
    pair,
    read_rows,
    settings,
    write_data,
    write_rows,
)  # fmt: skip

from dpo_cli.data.files import sha256
from dpo_cli.data.records import split_side
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.training import outcome


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Base, SFT adapter, pairs, and an uninterrupted run over them."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    base = base_model(folder / "base")
    save_adapter(folder / "sft", base)
    write_data(folder)
    before = {file.name: file.read_bytes() for file in (folder / "sft").iterdir()}
    result = train.run(settings(folder, base), Silent())
    assert {file.name: file.read_bytes() for file in (folder / "sft").iterdir()} == before
    return folder, result


@pytest.fixture
def work(start, tmp_path):
    """The same inputs, before any run; and the settings."""
    folder, _ = start
    for name in ("base", "sft", "data"):
        shutil.copytree(folder / name, tmp_path / name)
    return tmp_path, settings(tmp_path, tmp_path / "base")


def same_as_uninterrupted(start, folder):
    whole, _ = start
    assert metrics(folder / "runs" / "dpo") == metrics(whole / "runs" / "dpo")
    weights = Path("out", "adapter_model.safetensors")
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


def test_an_uninterrupted_run_explains_itself(start):
    folder, result = start
    run = folder / "runs" / "dpo"
    rows = read_rows(run / "metrics.jsonl")
    assert rows[0]["step"] == 1 and abs(rows[0]["loss"] - 0.693147) < 1e-5 and rows[0]["rewards/margins"] == 0
    assert [(row["step"], "eval_loss" in row) for row in rows] == [
        (1, False), (2, False), (3, True), (4, False), (6, False), (6, True), (8, False), (8, True),
    ]  # fmt: skip
    report = json.loads((run / "report.json").read_text())
    assert report["step_zero"]["ok"] and report["step_zero"]["margin"] == 0
    assert report["best_checkpoint"] in {file.name for file in (run / "checkpoints").iterdir()}
    assert report["verdict"] == result.verdict
    assert report["gates"]["held_out_margin"]["value"] == max(row.get("eval_rewards/margins", -1) for row in rows)
    config = json.loads((run / "config.json").read_text())
    assert config["policy_sha256"] == config["reference_sha256"] == report["reference_sha256"]
    assert report["policy_sha256"] != report["reference_sha256"]
    assert config["versions"]["trl"] and config["config"]["train"]["learning_rate"] == 1e-2


def test_the_adapter_is_published_alone_and_has_moved(start):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder, _ = start
    assert sorted(file.name for file in (folder / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    trained, before = (load_file(folder / name / "adapter_model.safetensors") for name in ("out", "sft"))
    assert trained.keys() == before.keys()
    assert any(not torch.equal(trained[name], before[name]) for name in trained)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "out")
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].base_model_name_or_path == str(folder / "base")
    for checkpoint in (folder / "runs" / "dpo" / "checkpoints").iterdir():
        assert not (checkpoint / "ref").exists()


def test_killed_between_two_logs_it_goes_on_as_if_nothing_had_happened(start, work):
    folder, config = work
    assert exit_code_of(lambda: train.run(config, AtStep(5, kill_this_process))) == -signal.SIGKILL
    result = train.run(config, Silent())
    assert result.resumed_from == 3
    same_as_uninterrupted(start, folder)


def test_killed_while_it_saves_it_goes_on_from_the_checkpoint_before(start, work, monkeypatch):
    from dpo_cli.training import run_folder, trainer

    folder, config = work
    mark_complete = run_folder.mark_complete

    def killed(checkpoint):
        if checkpoint.name == "checkpoint-6":
            (checkpoint / "optimizer.pt").write_bytes(b"torn")
            kill_this_process()
        mark_complete(checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "mark_complete", killed)
        assert exit_code_of(lambda: train.run(config, Silent())) == -signal.SIGKILL
    assert (folder / "runs" / "dpo" / "checkpoints" / "checkpoint-6").exists()
    progress = Lines()
    assert train.run(config, progress).resumed_from == 3
    assert "checkpoint-6 was cut short and is dropped" in progress.lines
    same_as_uninterrupted(start, folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_from_it(start, work, number):
    folder, config = work
    with pytest.raises((UserError, KeyboardInterrupt)) as stopped:
        train.run(config, AtStep(4, lambda: os.kill(os.getpid(), number)))
    if number == signal.SIGTERM:
        assert stopped.value.code == Exit.PREEMPTED
    else:
        assert stopped.type is KeyboardInterrupt
    assert train.run(config, Silent()).resumed_from in (4, 5)
    same_as_uninterrupted(start, folder)


def test_a_finished_run_does_nothing_and_puts_a_missing_adapter_back(start):
    folder, first = start
    before = (folder / "runs" / "dpo" / "metrics.jsonl").stat()
    shutil.rmtree(folder / "out")
    result = train.run(settings(folder, folder / "base"), AtStep(1, lambda: pytest.fail("it trains again")))
    assert result.finished_before and (result.verdict, result.policy_sha256) == (first.verdict, first.policy_sha256)
    assert (folder / "out" / "adapter_model.safetensors").exists()
    assert (folder / "runs" / "dpo" / "metrics.jsonl").stat() == before


def test_killed_while_it_publishes_it_publishes_again(work, monkeypatch):
    folder, config = work
    config.train.max_steps = 1
    shutil.copytree(folder / "sft", folder / "out")  # an older result, to be replaced
    with monkeypatch.context() as patch:
        patch.setattr(
            outcome, "sha256", lambda path: kill_this_process() if "checkpoints" in str(path) else sha256(path)
        )
        assert exit_code_of(lambda: train.run(config, Silent())) == -signal.SIGKILL
    (folder / ".out.new").mkdir()
    result = train.run(config, AtStep(1, lambda: pytest.fail("it trains again")))
    assert not result.finished_before and sha256(folder / "out" / "adapter_model.safetensors") == result.policy_sha256
    assert sorted(file.name for file in folder.glob(".out*")) == []


def test_a_run_of_this_name_with_other_settings_or_inputs_is_refused_by_key(start):
    folder, _ = start
    base = folder / "base"
    with pytest.raises(UserError, match=r"train\.beta was 0\.1, now 0\.2"):
        train.run(settings(folder, base, "train.beta=0.2"), Silent())
    save_adapter(folder / "other", base, seed=7)
    with pytest.raises(UserError, match=r"model\.adapter_sha256"):
        train.run(settings(folder, base, f"model.adapter={folder / 'other'}"), Silent())
    data = write_rows(folder / "more" / "train.jsonl", [pair(number) for number in range(9)]).parent
    with pytest.raises(UserError, match=r"data\.sha256\.train\.jsonl") as refused:
        train.run(settings(folder, base), Silent(), data=data)
    assert "--fresh" in refused.value.hint and refused.value.code == Exit.USAGE


def test_fresh_starts_over(work):
    folder, config = work
    config.train.max_steps, config.train.warmup_steps = 1, 0
    first = train.run(config, Silent())
    config.train.learning_rate = 0.0
    second = train.run(config, Silent(), fresh=True)
    assert not second.finished_before and second.policy_sha256 != first.policy_sha256
    assert len([row for row in read_rows(folder / "runs/dpo/events.jsonl") if row["event"] == "step_zero"]) == 1


def test_without_an_sft_adapter_it_says_how_to_make_one(work):
    folder, config = work
    config.model.adapter = str(folder / "nothing")
    with pytest.raises(UserError, match="no SFT adapter") as refused:
        train.run(config, Silent())
    assert "train --stage sft" in refused.value.hint and refused.value.code == Exit.USAGE
    assert not (folder / "runs").exists()


def test_the_sft_adapter_and_foreign_folders_are_never_overwritten(work):
    folder, config = work
    for place in (folder / "sft", folder / "sft" / "inner", folder):
        config.model.dpo_adapter = str(place)
        with pytest.raises(UserError, match="overwrite the SFT adapter"):
            train.run(config, Silent())
    config.model.dpo_adapter = str(folder / "data")
    with pytest.raises(UserError, match="no adapter; it would be overwritten"):
        train.run(config, Silent())
    assert (folder / "data" / "train.jsonl").exists()


def test_a_bad_line_is_named(work):
    folder, config = work
    with (folder / "data" / "train.jsonl").open("a") as file:
        file.write('{"prompt": "hi", "chosen": "yes"}\n')
    with pytest.raises(UserError, match=r'train\.jsonl:23: no "rejected"'):
        train.run(config, Silent())


def test_one_file_is_split_by_prompt(work):
    folder, config = work
    config.pair.val_share = 0.4
    rows = [pair(number // 2) for number in range(40)]  # every prompt twice
    result = train.run(config, Silent(), data=write_rows(folder / "all.jsonl", rows), dry_run=True)
    assert result.rows + result.held_out == 40 and result.rows % 2 == result.held_out % 2 == 0
    assert 0 < result.held_out < result.rows
    assert not (folder / "runs").exists()


def test_the_split_depends_on_the_prompt_alone():
    sides = [split_side(str(number), 42, 0.1) for number in range(2000)]
    assert 150 < sum(sides) < 250
    assert not any(split_side(str(number), 42, 0.0) for number in range(50))
    assert sides != [split_side(str(number), 43, 0.1) for number in range(2000)]


def test_sft_makes_the_adapter_that_dpo_starts_from(work):
    folder, config = work
    shutil.rmtree(folder / "sft")
    rows = [{"prompt": pair(number)["prompt"], "completion": pair(number)["chosen"]} for number in range(24)]
    data = write_rows(folder / "demonstrations.jsonl", rows)
    result = train.run(config, Silent(), stage="sft", name="sft", data=data)
    assert (result.verdict, result.step_zero, result.reference_sha256) == ("pass", None, None)
    assert json.loads((folder / "sft" / "adapter_config.json").read_text())["r"] == 4
    config.train.max_steps = 1
    assert train.run(config, Silent()).step_zero.ok
    with pytest.raises(UserError, match="there is an SFT adapter already"):
        train.run(config, Silent(), stage="sft", name="again", data=data)


def test_the_bar_has_the_steps_of_the_rows_that_are_trained_on(tmp_path, start):
    """Half of the rows are refused, as they are too long; what is waited for before has a line of its own."""
    folder, _ = start
    rows = [pair(number) for number in range(16)]
    for row in rows[::2]:
        row["chosen"][0]["content"] *= 60
    write_rows(tmp_path / "data" / "train.jsonl", rows)
    begun = []

    class Begun(Silent):
        def begin(self, stage, total, done=0):
            begun.append((stage, total, done))

    sets = ("train.max_steps=-1", "train.num_train_epochs=1", f"data={tmp_path / 'data'}", f"runs={tmp_path / 'runs'}",
            f"model.dpo_adapter={tmp_path / 'out'}")  # fmt: skip
    config = settings(folder, folder / "base", *sets)
    assert train.run(config, Begun(), pause_at=1).step == 1
    assert train.run(config, Begun()).step == 2
    assert begun == [("load the model", None, 0), ("train", 2, 0), ("load the model", None, 0), ("train", 2, 1)]
