"""Trackers, each really run on a tiny model without a network: what arrives in the tracker's own files."""

import json
import socket
import sqlite3
import sys

import pytest
from training import Lines, settings

from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.training import trackers

BLOCK = 32768
WANTED = {
    "train/loss", "train/kl", "train/rewards/margins", "train/logps/chosen", "train/learning_rate", "eval/loss",
    "eval/rewards/accuracies", "eval/kl_nats_per_token", "eval/kl_nats_per_sequence",
}  # fmt: skip


@pytest.fixture
def config_of(start, tmp_path, monkeypatch):
    """Settings of a short run with a tracker; nothing is reached but this machine."""
    connect = socket.socket.connect

    def local(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost"), f"network: {address}"
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local)

    def make(tracker, *sets):
        places = (f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}", "train.max_steps=3")
        return settings(start, start / "base", *places, f"train.report_to={tracker}", *sets)

    return make


def test_tensorboard_has_the_curves(config_of, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    progress = Lines()
    result = train.run(config_of("tensorboard"), progress)
    folder = tmp_path / "runs" / "dpo" / "tensorboard"
    assert f"tensorboard: tensorboard --logdir {folder}" in progress.lines
    read = EventAccumulator(str(folder))
    read.Reload()
    assert set(read.Tags()["scalars"]) >= WANTED
    [kl] = read.Scalars("eval/kl_nats_per_token")
    assert kl.step == 3 and kl.value == pytest.approx(result.metrics["eval_kl_nats_per_token"])


def test_trackio_has_the_curves_of_every_run_and_keeps_off_stdout(config_of, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")

    for name, module in list(sys.modules.items()):  # they have all taken the folder over by name
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    progress = Lines()
    result = train.run(config_of("trackio"), progress)
    train.run(config_of("trackio", "train.beta=0.2", f"model.dpo_adapter={tmp_path / 'out2'}"), Silent(), name="other")
    assert capsys.readouterr().out == "" and any("trackio show" in line for line in progress.lines)
    with sqlite3.connect(tmp_path / "trackio" / "nothing-dpo.db") as database:
        rows = [(run, json.loads(row)) for run, row in database.execute("select run_name, metrics from metrics")]
    assert {run for run, _ in rows} == {"dpo", "other"}
    mine = {key: value for run, row in rows if run == "dpo" for key, value in row.items()}
    assert mine.keys() >= WANTED
    assert mine["eval/kl_nats_per_token"] == pytest.approx(result.metrics["eval_kl_nats_per_token"])


def history(file):
    """Last value of each metric in wandb's own file: a header of 7 bytes, then a log of records as in LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, values = file.read_bytes(), 7, b"", {}
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(whole)
            values |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            whole = b""
    return values


def test_wandb_offline_has_the_curves_of_every_run(config_of, tmp_path, monkeypatch, capfd):
    pytest.importorskip("wandb").teardown()
    for name, value in {"WANDB_MODE": "offline", "WANDB_CACHE_DIR": tmp_path, "WANDB_CONFIG_DIR": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    progress = Lines()
    result = train.run(config_of("wandb"), progress)
    train.run(config_of("wandb", "train.beta=0.2", f"model.dpo_adapter={tmp_path / 'out2'}"), Silent(), name="other")
    assert capfd.readouterr().out == "" and any(line.startswith("wandb: ") for line in progress.lines)
    for name in ("dpo", "other"):
        [file] = (tmp_path / "runs" / name / "wandb").glob("offline-run-*/run-*.wandb")
        found = history(file)
        assert found.keys() >= WANTED
        if name == "dpo":
            assert found["eval/kl_nats_per_token"] == pytest.approx(result.metrics["eval_kl_nats_per_token"])


def test_a_wandb_that_can_not_be_reached_does_not_stop_training_and_has_its_curves_offline(
    config_of, tmp_path, monkeypatch, capfd
):
    """Nothing listens on the port of its server."""
    pytest.importorskip("wandb").teardown()  # it has read another test's environment
    settings_of_wandb = {
        "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_CACHE_DIR": tmp_path,
        "WANDB_CONFIG_DIR": tmp_path,
    }  # fmt: skip
    for name, value in settings_of_wandb.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(trackers, "REACH_SECONDS", 1.0)
    progress = Lines()
    result = train.run(config_of("wandb"), progress)
    assert result.step == 3 and capfd.readouterr().out == ""
    [said] = [line for line in progress.lines if line.startswith("wandb: can't be reached")]
    [file] = (tmp_path / "runs/dpo/wandb").glob("offline-run-*/run-*.wandb")
    assert f"wandb sync {file.parent} sends it later" in said
    assert history(file)["eval/kl_nats_per_token"] == pytest.approx(result.metrics["eval_kl_nats_per_token"])


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_an_absent_tracker_is_one_line(config_of, monkeypatch, name):
    monkeypatch.setattr("dpo_cli.training.trackers.find_spec", lambda module: None)
    with pytest.raises(UserError, match=f"{name} is not installed") as refused:
        train.run(config_of(name), Silent())
    assert refused.value.hint == f"pip install {name}" and refused.value.code == Exit.USAGE
