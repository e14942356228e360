"""The container's real command under a kubelet: trained on, preempted, taken over, brought home."""

import json
from pathlib import Path

import kube_server
import pytest
from adapters import base_model, save_adapter
from gke_jobs import GKE, bucket_server
from gke_jobs import settings as gke_settings
from kube_server import Life
from openai_server import Server
from training import Lines, metrics, settings, write_data, write_rows

from dpo_cli.adapter import check_adapter
from dpo_cli.errors import Exit
from dpo_cli.jobs import launch
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs.backends import gke


@pytest.fixture
def bucket(monkeypatch):
    with bucket_server() as make:
        yield make(monkeypatch)


@pytest.fixture
def cluster(tmp_path, monkeypatch, bucket):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gke, "POLL_SECONDS", 0.05)
    with kube_server.serve(tmp_path) as (cluster, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield cluster


class Mounted(Life):
    """A pod that runs the real command on what is in the bucket, and writes to it."""

    def __init__(self, bucket, vol):
        super().__init__(vol=vol)
        self.bucket = bucket

    def mount(self):
        self.bucket.to(self.vol)

    def unmount(self):
        self.bucket.come(self.vol)


def test_a_preempted_run_goes_on_in_the_next_pod_and_its_adapter_comes_home(tmp_path, cluster, bucket):
    base = base_model(tmp_path / "base")
    save_adapter(tmp_path / "sft", base)
    write_data(tmp_path)
    config = settings(tmp_path, base, *GKE, "train.max_steps=10", "train.save_steps=1000", "train.eval_steps=1000")
    lives = [Mounted(bucket, tmp_path / "first"), Mounted(bucket, tmp_path / "second")]
    cluster.lives = list(lives)

    class Preempted(Lines):
        def update(self, done, **counters):
            if "loss" in counters:
                lives[0].preempt.set()

    progress = Preempted()
    done = launch.run("gke", launch.spec("gke", config, "train"), config, progress)
    assert done.status.exit_code in (Exit.OK, Exit.GATE), (done.status, progress.lines)
    first, second = (pod.document for pod in cluster.pods_of("nothing-dpo-train-dpo"))
    assert first["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == Exit.PREEMPTED
    assert 0 < done.result["resumed_from"] < 10
    assert any("was preempted" in line for line in progress.lines)
    # What came home is whole, and as it would be if it had run here.
    assert [row["step"] for row in metrics(tmp_path / "runs/dpo") if "loss" in row] == [1, *range(2, 11, 2)]
    assert check_adapter(tmp_path / "out", str(base)).sha256 == done.result["policy_sha256"]
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (tmp_path / "runs/dpo/checkpoints").exists()
    assert second["metadata"]["name"] != first["metadata"]["name"]


def test_sampling_that_is_preempted_ends_in_time_and_pays_for_nothing_twice(tmp_path, cluster, bucket):
    prompts = [{"prompt": [{"role": "user", "content": f"[MABEL] Number {number}."}]} for number in range(40)]
    write_rows(tmp_path / "data" / "val.jsonl", prompts)
    lives = [Mounted(bucket, tmp_path / "first"), Mounted(bucket, tmp_path / "second")]
    cluster.lives = list(lives)
    with Server(latency=0.3) as server:
        config = gke_settings(f"generate.url={server.url}", "generate.concurrency=4", "generate.n=1")

        class Preempted(Lines):
            def update(self, done, **counters):
                if "completions" in counters and done >= 4:
                    lives[0].preempt.set()

        progress = Preempted()
        done = launch.run("gke", jobs_spec.make(config, "generate"), config, progress)
        assert done.status.exit_code == Exit.OK, (done.status, progress.lines)
    first, _ = (pod.document for pod in cluster.pods_of("nothing-dpo-generate-generate"))
    assert first["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == Exit.PREEMPTED
    assert len(Path("data/dpo/completions.jsonl").read_text().splitlines()) == 40
    assert sum(server.paid.values()) <= 40 + 4  # those that were in flight are paid twice
