"""Libraries that a run does not need are not imported, and those that it needs are."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
from training import settings

from dpo_cli import errors
from dpo_cli.training.leave_out import leave_out

OPTIONAL = ("bitsandbytes", "wandb")


@pytest.fixture
def one_command(monkeypatch):
    monkeypatch.setattr(errors, "one_command", True)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    loaded = {name: sys.modules.pop(name) for name in OPTIONAL if name in sys.modules}
    yield
    for name in OPTIONAL:
        sys.modules.pop(name, None)
    sys.modules.update(loaded)


@pytest.mark.parametrize(
    ("sets", "quantised", "key", "left_out"),
    [
        ([], False, None, ["bitsandbytes", "wandb"]),
        (["train.load_in_4bit=true"], False, None, ["wandb"]),
        ([], True, None, ["wandb"]),
        (["train.report_to=wandb"], False, None, ["bitsandbytes"]),
        ([], False, "key", ["bitsandbytes"]),
    ],
)
def test_what_is_needed_stays(one_command, tmp_path, monkeypatch, sets, quantised, key, left_out):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {}} if quantised else {}))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert leave_out(settings(tmp_path, base, *sets), "dpo") == left_out
    assert [name for name in OPTIONAL if sys.modules.get(name, 1) is None] == left_out
    assert all(find_spec(name) is None for name in left_out)


def test_a_process_that_goes_on_afterwards_keeps_all(tmp_path):
    assert leave_out(settings(tmp_path, tmp_path / "base"), "dpo") == []


def test_the_trainers_import_without_them():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('bitsandbytes', 'wandb'))\n"
        "from dpo_cli.training import dpo, sft\n"
        "from peft.import_utils import is_bnb_available\n"
        "assert not is_bnb_available()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
