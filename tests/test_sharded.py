"""All weights under FSDP2 in two processes on a CPU: a packed step, and a whole run with accelerate's sharding."""

import math
import os

import pytest
from adapters import base_model, save_adapter
from training import config_of, metrics, pair, read_rows, settings, write_rows

from dpo_cli.progress import Silent
from dpo_cli.stages.train import run

SAME = ("loss", "grad_norm", "kl", "rewards/margins", "eval_loss", "eval_rewards/margins", "eval_pairs_correct",
        "eval_kl_nats_per_token")  # fmt: skip


def _sharded(rank, folder, port):
    """Loss and gradient of a packed step of all weights, whole and under FSDP2."""
    import torch
    from packing import PAIRS, Packed, configuration, make
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dpo_cli.training.forward import packed

    torch.set_num_threads(1)
    trainer = make(Packed, folder / str(rank), configuration("Llama"), lora=False)
    assert packed.enable(trainer) is None
    batch = trainer.data_collator(PAIRS)
    losses = [trainer.compute_loss(trainer.model, dict(batch))]
    losses[0].backward()
    whole = {name: value.grad.clone() for name, value in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for model in (trainer.model, trainer.ref_model):
        for part in (*model.model.layers, model):
            fully_shard(part, mesh=mesh)
    losses.append(trainer.compute_loss(trainer.model, dict(batch)))
    losses[1].backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for name, value in trainer.model.named_parameters():
        assert (value.grad.full_tensor() - whole[name]).norm() <= 1e-5 * whole[name].norm(), name
    distributed.destroy_process_group()


def _run_sharded(rank, config, pause_at, port):
    """A run in one of two processes, with accelerate's sharding."""
    from accelerate import state

    state.AcceleratorState._reset_state(reset_partial_state=True)  # this process's parent was alone
    made = state.AcceleratorState.__init__

    def make(self, *args, fsdp_plugin=None, **kwargs):
        """accelerate shards on GPUs alone; all that it lacks on a CPU is to say so."""
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = state.DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = make
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    run(config, Silent(), name="two", pause_at=pause_at)


def _in_two_processes(function, *arguments):
    import socket

    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(function, (*arguments, port), nprocs=2, start_method="fork")


def test_packed_steps_of_all_weights_are_the_same_sharded(tmp_path):
    """FSDP2 as torch has it."""
    _in_two_processes(_sharded, tmp_path)


def test_a_run_of_all_weights_that_accelerate_shards_is_that_of_one_process(tmp_path):
    """Paused and resumed: its losses, held-out metrics with KL, and the model that is published."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    save_adapter(tmp_path / "sft", base_model(tmp_path / "base"))
    write_rows(tmp_path / "data" / "train.jsonl", [pair(number) for number in range(24)])
    write_rows(tmp_path / "data" / "val.jsonl", [pair(number) for number in range(24, 28)])
    few = ("train.full=true", "train.learning_rate=1e-3", "train.max_steps=4", "train.logging_steps=1",
           "train.eval_steps=2", "train.save_steps=2")  # fmt: skip
    one, two = (
        settings(tmp_path, tmp_path / "base", f"model.dpo_adapter={tmp_path / n}", *few) for n in ("one", "two")
    )
    run(one, Silent(), name="one")
    _in_two_processes(_run_sharded, two, 3)
    checkpoint = tmp_path / "runs/two/checkpoints/checkpoint-3"
    assert (checkpoint / "pytorch_model_fsdp.bin").exists(), "nothing was sharded"
    _in_two_processes(_run_sharded, two, None)
    rows, others = (metrics(tmp_path / "runs" / name) for name in ("one", "two"))
    for row, other in zip(rows, others, strict=True):
        wanted = {name: pytest.approx(row[name], rel=1e-4, abs=2e-5) for name in SAME if name in row}
        assert wanted.keys() and {name: other.get(name) for name in wanted} == wanted, row["step"]
    weights, sharded = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert weights.keys() == sharded.keys()
    assert max((weights[name] - sharded[name]).abs().max().item() for name in weights) < 1e-5


def test_sharded_in_bfloat16_policy_and_reference_agree_at_step_zero(start, tmp_path):
    config = config_of(start, tmp_path, "train.full=true", "train.bf16=true")
    _in_two_processes(_run_sharded, config, 1)
    (found,) = [row for row in read_rows(tmp_path / "runs/two/events.jsonl") if row["event"] == "step_zero"]
    assert found["ok"] and found["loss"] == pytest.approx(math.log(2), abs=1e-4) and found["margin"] < 1e-3
