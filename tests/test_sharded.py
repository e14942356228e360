"""A packed step of all weights under FSDP2 in two processes on a CPU: the loss and gradient of the whole model."""

import os

import pytest


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


def test_packed_steps_of_all_weights_are_the_same_sharded(tmp_path):
    """FSDP2 as torch has it; accelerate, which asks for it on GPUs alone, is not tried here."""
    import socket

    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_sharded, (tmp_path, port), nprocs=2, start_method="fork")
