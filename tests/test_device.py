"""A run that was asked to train on a card, or whose base is large, does not train on a CPU without a word."""

import pytest
from training import config_of

from dpo_cli.errors import Exit, UserError
from dpo_cli.models.base_model import Base
from dpo_cli.models.weights import Tensor
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.training.device_check import check_device


@pytest.fixture(autouse=True)
def no_card(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_card_that_was_asked_for_must_be_there_before_anything_is_trained(start, tmp_path):
    import torch

    config = config_of(start, tmp_path, "train.allow_cpu=false", "train.max_steps=1")
    with pytest.raises(UserError, match="a L4 was asked for, and there is no GPU that torch can use") as refused:
        train.run(config, Silent(), card="L4")
    assert refused.value.code == Exit.USAGE and torch.__version__ in str(refused.value)
    assert "driver" in str(refused.value) and "--allow-cpu" in refused.value.hint
    assert not (tmp_path / "runs").exists()
    config.train.allow_cpu = True
    assert train.run(config, Silent(), card="L4").step == 1


def test_a_large_base_is_not_trained_on_a_cpu_unless_allowed(tmp_path):
    def base(rows):
        return Base(folder=tmp_path, config={}, shapes={"w": Tensor("BF16", [rows, 1000], (0, 0))}, quantised=None)

    check_device(base(1000), None, False, "small")
    check_device(base(3_000_000), None, True, "large")
    with pytest.raises(UserError, match=r"large has 3\.0 billion parameters"):
        check_device(base(3_000_000), None, False, "large")
