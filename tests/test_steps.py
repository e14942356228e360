"""Whole runs with packed forwards: equal to TRL's, bit-exact when resumed, divided by tokens, one reference for all."""

import functools
import os
import signal

import pytest
from training import AtStep, Lines, config_of, exit_code_of, kill_this_process, metrics, read_rows

from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.workflows import sweep


def run(start, folder, *sets, progress=None):
    """(metrics.jsonl, what was said)."""
    progress = progress or Lines()
    train.run(config_of(start, folder, *sets), progress)
    return metrics(folder / "runs/dpo"), progress.lines


@pytest.fixture(scope="module")
def trls(start, tmp_path_factory):
    """What a run with these settings comes to with TRL's own forward."""
    from dpo_cli.training.forward import packed

    @functools.cache
    def rows_of(*sets):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packed, "unsupported", lambda model, longest: "it is asked for")
            rows, said = run(start, tmp_path_factory.mktemp("trl"), *sets)
        assert "forward: TRL's own, padded, since it is asked for" in said
        return rows

    return rows_of


WHOLE = (
    "train.per_device_train_batch_size=4",
    "train.per_device_eval_batch_size=4",
    "train.gradient_accumulation_steps=1",
)


@pytest.mark.parametrize(
    ("sets", "choice", "as_trl"),
    [
        ((), "reference: kept for train (1.45 passes) and eval (3 passes); 0 of 27 pairs are known", ()),
        (("train.keep_reference=false",), "reference: live, as set", ()),
        (("train.gradient_checkpointing=true",), "reference: kept", ()),
        (("train.tokens_per_batch=150",), "reference: kept", WHOLE),
    ],
    ids=["kept", "live", "checkpointing", "tokens"],
)
def test_a_run_comes_to_what_trl_comes_to(start, trls, tmp_path, sets, choice, as_trl):
    rows, said = run(start, tmp_path, *sets)
    assert any(line.startswith(choice) for line in said) and not any("TRL's own" in line for line in said)
    for ours, theirs in zip(rows, trls(*as_trl), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert abs(ours[name] - value) <= 2e-5 * max(1, abs(value)), (theirs["step"], name)


@pytest.mark.parametrize("sets", [("train.tokens_per_batch=150",), ("train.keep_reference=false",)], ids=str)
def test_a_run_that_was_killed_or_stopped_goes_on_exactly(start, tmp_path, sets):
    whole, _ = run(start, tmp_path / "whole", *sets)
    config = config_of(start, tmp_path, *sets)
    assert exit_code_of(lambda: train.run(config, AtStep(5, kill_this_process))) == -signal.SIGKILL
    with pytest.raises(UserError, match="SIGTERM"):
        train.run(config, AtStep(6, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train.run(config, Silent())
    same_run(tmp_path, whole)


def same_run(folder, whole):
    """The run in a folder has the numbers and the weights of the one in `whole` below it."""
    assert metrics(folder / "runs/dpo") == whole
    weights = [(one / "out/adapter_model.safetensors").read_bytes() for one in (folder, folder / "whole")]
    assert weights[0] == weights[1]


def test_a_run_in_bfloat16_that_was_stopped_goes_on_exactly(start, tmp_path):
    # Not killed: that takes a fork, after which torch's threads can't convert weights.
    whole, _ = run(start, tmp_path / "whole", "train.bf16=true")
    config = config_of(start, tmp_path, "train.bf16=true")
    with pytest.raises(UserError, match="SIGTERM"):
        train.run(config, AtStep(5, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train.run(config, Silent())
    same_run(tmp_path, whole)


def test_killed_while_the_reference_computes_it_comes_to_the_same_values(start, tmp_path, monkeypatch):
    from dpo_cli.data import jsonl
    from dpo_cli.training.forward import reference_cache

    monkeypatch.setattr(reference_cache, "TOKENS", 300)
    whole, _ = run(start, tmp_path / "whole")
    append, kept = jsonl.Journal.append, []

    def killed(journal, row):
        append(journal, row)
        kept.append(journal.path.parent.name == ".reference")
        if sum(kept) == 23:
            kill_this_process()

    with monkeypatch.context() as patch:
        patch.setattr(jsonl.Journal, "append", killed)
        assert exit_code_of(lambda: train.run(config_of(start, tmp_path), Silent())) == -signal.SIGKILL
    rows, said = run(start, tmp_path)
    assert any("11 of 27 pairs are known" in line for line in said)
    assert rows == whole


def test_out_of_memory_lowers_the_tokens_and_keeps_the_step(start, tmp_path, monkeypatch):
    import torch

    from dpo_cli.training import dpo

    sets = ("train.max_steps=5", "train.save_steps=2", "train.tokens_per_batch=400")
    whole, _ = run(start, tmp_path / "whole", *sets)
    loss_of, most = dpo.DpoTrainer._compute_loss, []

    def lacking(self, model, inputs, return_outputs):
        tokens = len(inputs["packing"]["tokens"])
        if self.state.global_step >= 3 and model.training:
            if tokens > 150:
                raise torch.OutOfMemoryError("out of memory")
            most.append(tokens)
        return loss_of(self, model, inputs, return_outputs)

    monkeypatch.setattr(dpo.DpoTrainer, "_compute_loss", lacking)
    rows, said = run(start, tmp_path, *sets)
    lowered = [line for line in said if "smaller_batch" in line]
    assert len(lowered) == 2 and "(tokens a forward 200)" in lowered[0] and 75 < max(most) <= 150
    for before, after in zip(whole, rows, strict=True):
        assert all(abs(after[name] - value) <= 1e-4 * max(1, abs(value)) for name, value in before.items())


def test_memory_that_lacks_for_the_largest_pair_ends_the_run(start, tmp_path, monkeypatch):
    import torch

    from dpo_cli.training import dpo

    def lacking(*_):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(dpo.DpoTrainer, "_compute_loss", lacking)
    with pytest.raises(UserError, match="not suffice for one row"):
        run(start, tmp_path, "train.tokens_per_batch=400")


def test_a_model_that_can_not_be_packed_trains_and_says_why(start, tmp_path):
    import json
    import shutil

    shutil.copytree(start / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    sets = [f"model.base={tmp_path / 'base'}", "model.adapter=none", "train.max_steps=1"]
    _, said = run(start, tmp_path, *sets)
    assert any("forward: TRL's own, padded, since attention slides over 16 tokens" in line for line in said)
    assert "reference: live, as the forward is TRL's" in said


@pytest.mark.parametrize("setting", ["beta=0.1,0.3", "r=2,4"])
def test_the_runs_of_a_sweep_share_one_pass_of_the_reference(start, tmp_path, monkeypatch, setting):
    from dpo_cli.training.forward import log_probs, packed

    sets = ["train.max_steps=2", "train.kl_prompts=0", "train.eval_steps=2"]
    sets += ["model.adapter=none"] if setting.startswith("r") else []
    score, runs = log_probs.score, []

    def counted(hidden, *arguments, metrics, squares):
        if not metrics:
            runs[-1].append(len(hidden))
        return score(hidden, *arguments, metrics=metrics, squares=squares)

    class Runs(Silent):
        def begin(self, stage, total, done=0):
            if stage == "load the model":
                runs.append([])

    monkeypatch.setattr(packed, "score", counted)
    sweep.run(config_of(start, tmp_path, *sets), Runs(), setting, "s")
    first, second = runs
    assert sum(first) > 27 * 10
    assert len(second) == 2 and sum(second) < 100  # one known pair, and step zero
    [file] = (tmp_path / "runs/.reference").glob("*.jsonl")
    assert len(read_rows(file)) == 2 * 27
