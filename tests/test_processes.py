"""Several processes on a CPU (gloo), started by torchrun as on several GPUs: the same numbers as one process."""

import os
from types import SimpleNamespace

import pytest
from adapters import base_model, save_adapter
from training import AtStep, Lines, exit_code_of, kill_this_process, metrics, pair, read_rows, settings, write_rows

from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import launch, worker
from dpo_cli.jobs.backends import local
from dpo_cli.jobs.progress_lines import Outcome
from dpo_cli.progress import Silent
from dpo_cli.stages.train import run
from dpo_cli.training import distributed, run_identity

SAME = (
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "eval_loss",
    "eval_rewards/margins",
    "eval_pairs_correct",
    "kl",
)
# Where a log spans a move, its other metrics are means over forwards, which are fewer in each of two processes.
OF_STEPS = ("loss", "learning_rate", "eval_loss", "eval_rewards/margins", "eval_pairs_correct")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Inputs that divide evenly, so that both see the same batches; and what one process makes of them."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    save_adapter(folder / "sft", base_model(folder / "base"))
    write_rows(folder / "data" / "train.jsonl", [pair(number) for number in range(24)])
    write_rows(folder / "data" / "val.jsonl", [pair(number) for number in range(24, 28)])
    run(settings(folder, folder / "base", f"model.dpo_adapter={folder / 'one'}"), Silent(), name="one")
    return folder


def two(folder, *sets):
    """The settings of one process: the rows of a step are shared, not multiplied."""
    return settings(folder, folder / "base", *sets)


def same(folder, one, other, keys=SAME):
    """Compare two runs' numbers; sums are made in another order."""
    rows, others = metrics(folder / "runs" / one), metrics(folder / "runs" / other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, another in zip(rows, others, strict=True):
        assert {key for key in keys if key in row} == {key for key in keys if key in another}
        for key in set(keys) & row.keys():
            assert row[key] == pytest.approx(another[key], abs=2e-5), (row["step"], key)


def test_two_processes_have_the_losses_of_one_which_goes_on_after_a_signal(start):
    config = two(start, f"model.dpo_adapter={start / 'two'}")
    spec = launch.spec("local", config, "train", name="two", gpus=2)
    started = launch.submit("local", spec, config, Silent())
    for line in local.logs(started, config, follow=True):
        if '"saved"' in line:
            launch.cancel(started, config)
            break
    stopped = launch.attach(started, config, Silent())
    assert (stopped.status.state, stopped.status.exit_code) == ("cancelled", Exit.PREEMPTED)
    ended = run(config, Silent(), name="two")  # in one process
    assert (ended.resumed_from >= 3, ended.step) == (True, 8)
    same(start, "one", "two", OF_STEPS)
    events = [row["event"] for row in read_rows(start / "runs" / "two" / "events.jsonl")]
    assert events.count("step_zero") == 1 and events.count("stopped") == 1
    again = launch.run("local", spec, config, Silent())
    assert again.result and again.result["finished_before"], again  # and none of them waits for the other


def test_a_run_of_one_process_that_was_killed_goes_on_in_two_with_the_same_steps(start):
    config = two(start, f"model.dpo_adapter={start / 'moved'}")
    assert exit_code_of(lambda: run(config, AtStep(4, kill_this_process), name="moved")) < 0
    ended = launch.run("local", launch.spec("local", config, "train", name="moved", gpus=2), config, Silent())
    assert (ended.result["resumed_from"], ended.result["step"]) == (3, 8), ended
    same(start, "one", "moved", OF_STEPS)


@pytest.mark.parametrize(
    ("name", "setting", "said"),
    [
        ("each", "train.batch_per_gpu=true", "processes was 1, now 2"),
        ("all", "train.full=true", "sharded was None, now"),
    ],
)
def test_where_the_steps_are_of_so_many_processes_another_number_is_refused(start, monkeypatch, name, setting, said):
    config = two(start, f"model.dpo_adapter={start / name}", setting)
    run(config, Silent(), name=name, pause_at=1)
    shards = distributed.shards
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(run_identity, "distributed", SimpleNamespace(count=lambda: 2, shards=shards))
    with pytest.raises(UserError, match=f"started with other settings: {said}"):
        run(config, Silent(), name=name)


@pytest.mark.parametrize(
    ("name", "sets"), [("divided", "train.tokens_per_batch=150"), ("kept", "train.keep_reference=true")]
)
def test_packed_steps_by_tokens_and_a_kept_reference_come_to_the_same(start, name, sets):
    config = two(start, f"model.dpo_adapter={start / name}", sets)
    ended = launch.run("local", launch.spec("local", config, "train", name=name, gpus=2), config, said := Lines())
    assert ended.status.state == "succeeded", ended
    assert not any("TRL's own" in line for line in said.lines)
    assert any("reference: kept" in line for line in said.lines)
    assert sum("step 8: held-out loss" in line for line in said.lines) == 1, "the first process alone tells"
    same(start, "one", name, SAME if name == "kept" else set(SAME) - {"kl"})  # a mean over other batches' tokens


def test_sft_in_two_processes_has_the_losses_of_one(start):
    rows = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in map(pair, range(24))]
    data = write_rows(start / "demonstrations" / "train.jsonl", rows).parent
    write_rows(data / "val.jsonl", rows[:4])
    config = two(start, f"model.adapter={start / 'fresh'}")
    run(config, Silent(), stage="sft", name="sft-one", data=data)
    config = two(start, f"model.adapter={start / 'other'}")
    spec = launch.spec("local", config, "train", name="sft-two", stage="sft", data=data, gpus=2)
    ended = launch.run("local", spec, config, said := Lines())
    assert ended.status.state == "succeeded", ended
    assert not any("TRL's own" in line for line in said.lines)
    same(start, "sft-one", "sft-two")


LACKING = """
import os
if os.environ.get("RANK") == "1":  # a card that takes one pair a forward
    import torch
    from dpo_cli.training.forward import packed
    step = packed.PackedSteps.training_step
    def lacking(self, model, inputs, *rest):
        if len(inputs["input_ids"]) > 2 and self.state.global_step > 3:
            raise torch.OutOfMemoryError("out of memory")
        return step(self, model, inputs, *rest)
    packed.PackedSteps.training_step = lacking
"""


def test_where_one_process_lacks_memory_all_go_on_with_a_smaller_batch(start, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    config = two(start, f"model.dpo_adapter={start / 'lacking'}")
    ended = launch.run("local", launch.spec("local", config, "train", name="lacking", gpus=2), config, said := Lines())
    assert ended.status.state == "succeeded", ended
    assert sum("out_of_memory (rows a forward 1, forwards a step 4)" in line for line in said.lines) == 1, said.lines
    events = [row["event"] for row in read_rows(start / "runs" / "lacking" / "events.jsonl")]
    assert events.count("out_of_memory") == 1
    # A log's other metrics are means over forwards, of which the steps before have fewer.
    same(start, "one", "lacking", ("loss", "eval_loss", "eval_rewards/margins", "eval_pairs_correct"))


def test_bad_input_is_the_same_line_and_code_as_in_one_process(start):
    config = two(start, f"data={start / 'none'}")
    ended = launch.run("local", launch.spec("local", config, "train", name="bad", gpus=2), config, Silent())
    assert (ended.status.state, ended.status.exit_code) == ("failed", Exit.USAGE)
    assert "no such file or folder" in ended.status.reason and ended.hint


LATE = """
import os
if os.environ.get("RANK") == "0":
    import time
    from dpo_cli.stages import train
    train.run = lambda *_, **__: time.sleep(60)
"""


def test_bad_input_is_told_though_torchrun_ends_the_first_process_before_it_sees_it(start, tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    config = two(start, f"data={start / 'none'}")
    ended = launch.run("local", launch.spec("local", config, "train", name="late", gpus=2), config, Silent())
    assert (ended.status.state, ended.status.exit_code) == ("failed", Exit.USAGE)
    assert "no such file or folder" in ended.status.reason and ended.hint


@pytest.mark.parametrize(("codes", "code"), [
    ([Exit.PREEMPTED, Exit.USAGE], Exit.USAGE),  # torchrun stopped the first one, since another had ended
    ([Exit.USAGE, Exit.PREEMPTED], Exit.USAGE),
    ([Exit.PREEMPTED], Exit.PREEMPTED),
    ([Exit.GATE], Exit.GATE),
])  # fmt: skip
def test_of_several_ends_the_one_that_led_to_the_others_counts_and_is_told_alone(
    codes, code, monkeypatch, capsys, start
):
    ended = [(f"process {number}\n", Outcome(exit_code=one)) for number, one in enumerate(codes)]
    monkeypatch.setattr(worker, "_torchrun_once", lambda *_: (ended, 1))
    assert worker._in_processes(launch.spec("local", two(start), "train", name="ends", gpus=2), None).exit_code == code
    assert capsys.readouterr().out == f"process {codes.index(code)}\n"


def test_all_weights_in_several_processes_are_sharded_and_an_adapter_is_not(start, monkeypatch, tmp_path):
    """What is asked of accelerate; `test_sharded.py` has what comes of it."""
    from transformers import TrainingArguments

    from dpo_cli.training.arguments import fully_sharded

    config = two(start, "train.full=true")
    assert fully_sharded(config.train) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fully_sharded(config.sft) == fully_sharded(two(start).train) == {}
    asked = fully_sharded(config.train)
    monkeypatch.delenv("WORLD_SIZE")
    asked = TrainingArguments(tmp_path, use_cpu=True, report_to="none", **asked).fsdp_plugin_args
    assert (asked["fsdp_version"], asked["state_dict_type"]) == (2, "FULL_STATE_DICT")
