"""Jobs on this machine: detached, found again, attached to, cancelled; and what comes home from elsewhere."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from adapters import base_model, save_adapter
from training import Lines, read_rows, settings, write_data, write_rows

from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import launch, registry, worker
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs.backends import local
from dpo_cli.jobs.registry import Job
from dpo_cli.progress import Silent


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A tiny base, an SFT adapter and pairs; and the settings."""
    monkeypatch.chdir(tmp_path)
    base = base_model(tmp_path / "base")
    save_adapter(tmp_path / "sft", base)
    write_data(tmp_path)
    return tmp_path, settings(tmp_path, base, "train.save_steps=1", "train.eval_steps=1")


def test_a_detached_run_is_found_again_and_ends_as_it_would_here(work):
    folder, config = work
    spec = launch.spec("local", config, "train")
    first = launch.run("local", spec, config, Silent(), detach=True)
    assert first.detached and first.status.state == "running"
    progress = Lines()
    assert launch.submit("local", spec, config, progress).handle == first.job.handle
    assert "attaching to it" in progress.lines[0]
    config.train.beta = 0.3
    with pytest.raises(UserError, match=r"config\.train\.beta was 0\.1, now 0\.3"):
        launch.submit("local", launch.spec("local", config, "train"), config, Silent())

    launched = launch.attach(registry.get("local", config), config, progress)
    report = json.loads((folder / "runs/dpo/report.json").read_text())
    assert (launched.status.state, launched.status.exit_code) == ("succeeded", Exit.OK)
    assert launched.result["policy_sha256"] == report["policy_sha256"]
    assert any("held-out loss" in line for line in progress.lines)
    again = launch.run("local", launch.spec("local", config, "train", name="dpo"), config, Silent())
    assert again.status.exit_code == Exit.USAGE and "train.beta was 0.1, now 0.3" in again.status.reason
    assert "--fresh" in again.hint


def test_cancel_saves_a_checkpoint_and_the_next_submission_goes_on(work):
    folder, config = work
    spec = launch.spec("local", config, "train")
    started = launch.submit("local", spec, config, Silent())
    for line in local.logs(started, config, follow=True):
        if '"saved"' in line:
            launch.cancel(started, config)
            break
    launched = launch.attach(started, config, Silent())
    assert (launched.status.state, launched.status.exit_code) == ("cancelled", Exit.PREEMPTED)
    launched = launch.run("local", spec, config, Silent())
    assert launched.status.exit_code == Exit.OK and launched.result["resumed_from"] >= 1
    assert [row["step"] for row in read_rows(folder / "runs/dpo/metrics.jsonl") if "eval_loss" in row] == [*range(1, 9)]


def test_a_process_that_was_killed_is_known_as_dead_though_nobody_waited_for_it(work):
    _, config = work
    started = launch.submit("local", launch.spec("local", config, "train"), config, Silent())
    os.kill(int(started.handle["pid"]), signal.SIGKILL)
    while local.status(started, config).state == "running":
        time.sleep(0.01)
    assert local.status(started, config).exit_code == Exit.FAILED
    assert [one.status.state for one in launch.listed(config)] == ["failed"]


def test_a_card_that_is_not_here_and_more_machines_are_refused(work):
    _, config = work
    for given, word in (({"gpu": "Z9"}, "Z9 here"), ({"nodes": 2}, "one machine")):
        with pytest.raises(UserError, match=word):
            launch.submit("local", launch.spec("local", config, "train", **given), config, Silent())


def test_a_second_attempt_of_a_fresh_start_does_not_start_over_again(work):
    folder, config = work
    fresh = jobs_spec.make(config, "train", volume=None, fresh=True)
    assert worker.outcome(fresh, Silent()).result["resumed_from"] is None
    (folder / "runs/dpo/report.json").unlink()  # as if it had been preempted before its end
    assert worker.outcome(fresh, Silent()).result["resumed_from"] == 8
    another = jobs_spec.make(config, "train", volume=None, fresh=True)
    assert worker.outcome(another, Silent()).result["resumed_from"] is None


class Elsewhere:
    """A backend whose job has ended, and whose files are a folder."""

    VOLUME = "/vol"

    def __init__(self, files):
        self.files = files

    def fetch(self, job, config, into, progress):
        for name, text in self.files.items():
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            (into / name).write_text(text)


def test_results_replace_what_is_here_but_rows_made_here_meanwhile_stay(work, monkeypatch):
    folder, config = work
    config.data, config.runs, config.model.dpo_adapter = "data", "runs", "out"
    data = folder / "data"
    rows = [{"id": "1", "completions": ["old"]}, {"id": "2", "completions": ["paid"]}]
    write_rows(data / "completions.jsonl", rows)
    there = {"data/completions.jsonl": '{"id": "1", "completions": ["new", "newer"]}\n'}
    backend = Elsewhere(there)
    spec = jobs_spec.make(config, "generate")
    launch.bring_home(backend, Job(id="x", backend="x", spec=spec), config, Silent())
    rows = {row["id"]: row["completions"] for row in read_rows(data / "completions.jsonl")}
    assert rows == {"1": ["new", "newer"], "2": ["paid"]}

    Path("out").mkdir()
    Path("out/left.txt").write_text("of an older adapter")
    (folder / "runs/dpo/checkpoints").mkdir(parents=True)
    there.clear()
    there["out/adapter_config.json"] = '{"base_model_name_or_path": "/vol/uploads/1/base", "r": 4}'
    there["runs/dpo/report.json"] = "{}"
    launched = launch.bring_home(
        backend, Job(id="x", backend="x", spec=jobs_spec.make(config, "train")), config, Silent()
    )
    assert launched == ["runs/dpo", "out"]
    assert json.loads(Path("out/adapter_config.json").read_text())["base_model_name_or_path"] == config.model.base
    assert not Path("out/left.txt").exists() and (folder / "runs/dpo/checkpoints").exists()
    assert not list((folder / "runs").glob(".fetch-*"))
