"""Runs in which a guard acts, and runs of every preset, on a tiny model."""

import json
import os
import shutil
import signal

import pytest
from training import AtStep, Lines, config_of, metrics, pair, read_rows, write_rows

from dpo_cli.config import resolve as configuration
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train

PRESETS = ["l4", "l4-qlora", "rank1", "lora16", "full", "conservative"]


def events(folder):
    return [(row["event"], row.get("action")) for row in read_rows(folder / "runs/dpo/events.jsonl")]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(start, tmp_path, preset):
    if preset == "l4-qlora":
        pytest.importorskip("bitsandbytes")
    small = {
        "data": start / "data", "runs": tmp_path / "runs", "model.base": start / "base",
        "model.dpo_adapter": tmp_path / "out", "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1, "train.max_steps": 2, "train.kl_prompts": 1, "train.kl_tokens": 4,
        "train.max_length": 256, "train.warmup_steps": 0,
    }  # fmt: skip
    if preset in ("l4", "l4-qlora", "full", "conservative"):
        small["model.adapter"] = start / "sft"
    sets = [f"{key}={value}" for key, value in small.items()]
    result = train.run(configuration.resolve(sets=sets, preset=preset, environment={}).config, Silent())
    assert result.step_zero.ok and result.step == 2
    made = {file.name for file in (tmp_path / "out").iterdir()}
    if preset == "full":
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= made
        return
    assert made == {"adapter_config.json", "adapter_model.safetensors"}
    wanted = {"rank1": 1, "lora16": 16}.get(preset, 4)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == wanted


def test_over_the_kl_limit_the_actions_follow_each_other_and_a_good_checkpoint_is_published(start, tmp_path):
    sets = ("gate.kl_limit=0.02", "train.learning_rate=0.03", "train.eval_steps=1", "train.save_steps=1",
            "train.warmup_ratio=0.5", "train.max_steps=30")  # fmt: skip
    config = config_of(start, tmp_path, *sets)
    result = train.run(config, Silent())
    acted = [action for name, action in events(tmp_path) if name == "kl_limit"]
    assert acted == ["halve_lr", "raise_beta", "rollback", "stop"][: len(acted)] and "rollback" in acted
    assert result.gates["kl_nats_per_token"].ok and result.gates["kl_nats_per_token"].value <= 0.02
    rows = [row for row in metrics(tmp_path / "runs/dpo") if "eval_loss" in row]
    good = [row for row in rows if row["eval_kl_nats_per_token"] <= 0.02]
    best = max(good, key=lambda row: (row["eval_rewards/margins"] / row["eval_beta"], row["step"]))
    assert result.best_checkpoint == f"checkpoint-{best['step']}"
    if acted[-1] == "stop":
        assert result.ended == "kl_limit"
        assert train.run(config, AtStep(1, lambda: pytest.fail("it trains on"))).finished_before


def test_a_loss_that_is_no_number_ends_the_run_and_names_what_to_change(start, tmp_path):
    config = config_of(start, tmp_path, "train.learning_rate=1e30", "train.max_steps=4")
    with pytest.raises(UserError, match="not a number") as stopped:
        train.run(config, Silent())
    assert "learning_rate" in stopped.value.hint
    assert [action for name, action in events(tmp_path) if name == "nan"] == ["rollback", "stop"]


def test_out_of_memory_halves_the_forward_and_keeps_the_step(start, tmp_path, monkeypatch):
    import torch

    from dpo_cli.training import dpo

    whole = config_of(start, tmp_path / "whole", "train.max_steps=5", "train.save_steps=2")
    train.run(whole, Silent())
    loss_of = dpo.DpoTrainer._compute_loss

    def lacking(self, model, inputs, return_outputs):
        if self.state.global_step == 3 and model.training and self.args.per_device_train_batch_size == 2:
            raise torch.OutOfMemoryError("out of memory")
        return loss_of(self, model, inputs, return_outputs)

    monkeypatch.setattr(dpo.DpoTrainer, "_compute_loss", lacking)
    config = config_of(start, tmp_path, "train.max_steps=5", "train.save_steps=2")
    progress = Lines()
    train.run(config, progress)
    assert ("out_of_memory", "smaller_batch") in events(tmp_path)
    assert any("rows a forward 1, forwards a step 4" in line for line in progress.lines)
    before, after = (metrics(folder / "runs/dpo") for folder in (tmp_path / "whole", tmp_path))
    assert [row["step"] for row in after] == [row["step"] for row in before]
    for one, other in zip(before, after, strict=True):
        key = "eval_loss" if "eval_loss" in one else "loss"
        assert abs(one[key] - other[key]) < 1e-4


def test_where_the_batch_must_stay_a_lack_of_memory_ends_the_run(start, tmp_path, monkeypatch):
    import torch

    from dpo_cli.training import dpo

    def lacking(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(dpo.DpoTrainer, "_compute_loss", lacking)
    with pytest.raises(UserError, match="memory does not suffice for a forward") as stopped:
        train.run(config_of(start, tmp_path, "gate.smaller_batch=false"), Silent())
    assert "per_device_train_batch_size" in stopped.value.hint
    assert events(tmp_path)[-1] == ("refused", None)


def test_the_curriculum_begins_with_the_largest_gap_and_resumes_exactly(start, tmp_path):
    from dpo_cli.training.dpo import CurriculumSampler
    from dpo_cli.training.inputs import read_inputs

    rows = [pair(number) | {"score_gap": float(number % 5)} for number in range(12)]
    data = write_rows(tmp_path / "data/train.jsonl", rows).parent
    sets = ("train.curriculum=true", "train.max_steps=6", "train.save_steps=4", f"data={data}")
    config = config_of(start, tmp_path / "whole", *sets)
    gaps = [row.gap for row in read_inputs(config, "dpo", None, None).rows]
    assert gaps == sorted(gaps, reverse=True)
    sampler = CurriculumSampler(12, 42)
    assert list(sampler) == list(range(12))
    sampler.set_epoch(1)
    assert sorted(sampler) == list(range(12)) and list(sampler) != list(range(12))
    train.run(config, Silent())
    config = config_of(start, tmp_path, *sets)
    with pytest.raises(UserError, match="SIGTERM"):
        train.run(config, AtStep(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train.run(config, Silent())
    assert metrics(tmp_path / "runs/dpo") == metrics(tmp_path / "whole/runs/dpo")
    write_rows(data / "train.jsonl", [pair(1)])
    with pytest.raises(UserError, match="score_gap"):
        train.run(config_of(start, tmp_path / "other", *sets), Silent())


@pytest.mark.parametrize("place", ["held-out rows", "sampling for KL"])
def test_a_signal_in_an_evaluation_saves_the_step_and_the_evaluation_is_made_up_for(
    start, tmp_path, monkeypatch, place
):
    import torch

    from dpo_cli.training import kl, loop

    sets = ("train.eval_steps=4", "train.save_steps=4")
    train.run(config_of(start, tmp_path / "whole", *sets), Silent())
    predict, sample = loop.RunCallback.on_prediction_step, kl.SampledKl._sample

    def terminated(self, args, state, control, **rest):
        os.kill(os.getpid(), signal.SIGTERM)
        return predict(self, args, state, control, **rest)

    def terminated_before(self, model, read):
        os.kill(os.getpid(), signal.SIGTERM)
        return sample(self, model, read)

    config = config_of(start, tmp_path, *sets)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="step 4 is saved"):
        if place == "held-out rows":
            patch.setattr(loop.RunCallback, "on_prediction_step", terminated)
        else:
            patch.setattr(kl.SampledKl, "_sample", terminated_before)
            patch.setattr(kl.SampledKl, "_nats", lambda *_: pytest.fail("it goes on measuring"))
        train.run(config, Silent())
    states = [
        torch.load(folder / "runs/dpo/checkpoints/checkpoint-4/rng_state.pth", weights_only=False)["cpu"]
        for folder in (tmp_path, tmp_path / "whole")
    ]
    assert torch.equal(*states), "sampling has a random state of its own"
    assert train.run(config, Silent()).resumed_from == 4
    assert metrics(tmp_path / "runs/dpo") == metrics(tmp_path / "whole/runs/dpo")
    shutil.rmtree(tmp_path / "whole")


def test_what_the_kl_guard_halves_and_doubles_is_in_force_at_the_next_step(start, tmp_path):
    sets = ("gate.kl_limit=1e-9", 'gate.kl_actions=["halve_lr", "raise_beta", "halve_lr"]',
            "train.lr_scheduler_type=constant", "train.warmup_steps=0", "train.eval_steps=2", "train.save_steps=2",
            "train.logging_steps=1")  # fmt: skip
    result = train.run(config_of(start, tmp_path, *sets), Silent())
    rows = metrics(tmp_path / "runs/dpo")
    rates = {row["step"]: row["learning_rate"] for row in rows if "learning_rate" in row}
    assert {step: rates[step] for step in (2, 3, 5, 7)} == {2: 1e-2, 3: 5e-3, 5: 5e-3, 7: 2.5e-3}
    assert [row["eval_beta"] for row in rows if "eval_beta" in row] == [0.1, 0.1, 0.2, 0.2]
    assert [action for name, action in events(tmp_path) if name == "kl_limit"] == [
        "halve_lr", "raise_beta", "halve_lr", "stop",
    ]  # fmt: skip
    assert result.ended == "kl_limit" and "no checkpoint is within the KL limit" in result.reasons[-1]


@pytest.mark.parametrize("most", [10_000, 60_000], ids=["the adapter", "the optimizer"])
def test_a_checkpoint_that_can_not_be_written_leaves_the_one_before_and_the_same_command_goes_on(start, tmp_path, most):
    """The system refuses files beyond a size from step 4 on, as a full disk does."""
    import resource

    from dpo_cli.errors import Exit

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    config = config_of(start, tmp_path, "train.save_total_limit=2")
    try:
        with pytest.raises(UserError, match=r"checkpoint-6 can't be saved: .*; checkpoint-3 is whole") as refused:
            train.run(config, AtStep(4, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refused.value.code == Exit.FAILED and "the same command goes on from step 3" in refused.value.hint
    assert [path.name for path in (tmp_path / "runs/dpo/checkpoints").iterdir()] == ["checkpoint-3"]
    assert train.run(config, Silent()).resumed_from == 3
    train.run(config_of(start, tmp_path / "whole"), Silent())
    assert metrics(tmp_path / "runs/dpo") == metrics(tmp_path / "whole/runs/dpo")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_reference_is_computed_keeps_what_there_is_of_it(start, tmp_path, monkeypatch, number):
    from dpo_cli.errors import Exit
    from dpo_cli.training.forward import reference_cache

    monkeypatch.setattr(reference_cache, "TOKENS", 200)  # a group is a pair or two
    config, calls = config_of(start, tmp_path, "train.keep_reference=true", "train.max_steps=2"), []
    compute = reference_cache._compute

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return compute(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "_compute", interrupted)
        with pytest.raises((UserError, KeyboardInterrupt), match="before the first step; the reference of") as stopped:
            train.run(config, Silent())
    assert len(calls) == 3
    if number == signal.SIGTERM:
        assert stopped.value.code == Exit.PREEMPTED and "the same command goes on" in stopped.value.hint
    progress = Lines()
    train.run(config, progress)
    known = next(line for line in progress.lines if "pairs are known" in line).rpartition("; ")[2]
    assert known.split()[0] != "0" and f"reference of {known.removesuffix(' pairs are known')}" in str(stopped.value)
    train.run(config_of(start, tmp_path / "whole", "train.keep_reference=true", "train.max_steps=2"), Silent())
    assert metrics(tmp_path / "runs/dpo") == metrics(tmp_path / "whole/runs/dpo")


@pytest.mark.parametrize("phase", ["encode_rows", "load_network"])
def test_sigterm_before_there_is_a_trainer_ends_the_run_at_once(start, tmp_path, monkeypatch, phase):
    from dpo_cli.errors import Exit
    from dpo_cli.training import encoded_rows, trainer

    module = {"encode_rows": encoded_rows, "load_network": trainer}[phase]

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it went on")

    config = config_of(start, tmp_path, "train.max_steps=1")
    with monkeypatch.context() as patch:
        patch.setattr(module, phase, interrupted)
        with pytest.raises(UserError, match="stopped by SIGTERM before the first step") as stopped:
            train.run(config, Silent())
    assert stopped.value.code == Exit.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert train.run(config, Silent()).step == 1
