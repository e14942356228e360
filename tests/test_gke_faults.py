"""GKE and money: quotas, rights, caps, and what can't run there. The real client; the API server is our own."""

import threading
import time

import pytest
from kube_server import Life
from rich.console import Console
from test_gke import NAME, bucket, cluster, outcome, results, run, settings, storage, told  # noqa: F401
from training import Lines

from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import launch, registry
from dpo_cli.jobs.backends import gke
from dpo_cli.jobs.backends._gke_cluster import refusal
from dpo_cli.progress import Silent
from dpo_cli.view import jobs as jobs_view

QUOTA = 'pods "x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: '
NEVER = QUOTA + "requests.nvidia.com/gpu=0, limited: requests.nvidia.com/gpu=0"
LATER = QUOTA + "requests.nvidia.com/gpu=4, limited: requests.nvidia.com/gpu=4"


def test_a_quota_that_is_too_small_ends_the_wait_with_what_mends_it(cluster, bucket):  # noqa: F811
    cluster.refused[NAME].append(NEVER)
    with pytest.raises(UserError, match="exceeded quota: gpus") as raised:
        run()
    assert raised.value.code == Exit.FAILED and "kubectl edit resourcequota gpus -n default" in raised.value.hint
    assert "jobs cancel" in raised.value.hint
    [launched] = launch.listed(settings())
    assert launched.status.state == "pending" and "exceeded quota: gpus" in launched.status.reason


def test_a_quota_that_others_use_is_waited_for(cluster, bucket):  # noqa: F811
    cluster.refused[NAME].append(LATER)
    cluster.lives = [Life(outcome())]
    results(bucket)

    class Gives(Lines):
        def log(self, text):
            super().log(text)
            if "exceeded quota" in text:
                cluster.refused[NAME].clear()  # somebody else's job has ended

    done = run(progress=(progress := Gives()))
    assert done.status.exit_code == Exit.OK and any("waiting: " in line and "gpus" in line for line in progress.lines)


@pytest.mark.parametrize(
    ("message", "mend"),
    [
        (NEVER, "kubectl edit resourcequota gpus"),
        (LATER, None),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest": …', "kubectl describe job x -n team"),
        ("exceeded quota: m, requested: memory=24Gi, used: memory=1Gi, limited: memory=16Gi", "resourcequota m"),
        ("exceeded quota: m, requested: cpu=500m, used: cpu=4, limited: cpu=4", None),
    ],
)
def test_what_passes_by_itself_is_told_from_what_does_not(message, mend):
    found = refusal(message, "x", "team")
    assert found.mend is None if mend is None else mend in found.mend


def test_who_may_delete_jobs_and_not_list_pods_can_cancel(cluster, bucket):  # noqa: F811
    cluster.lives = [Life(hold=threading.Event())]
    launch.submit("gke", launch.spec("gke", settings(), "train"), settings(), Silent())
    cluster.forbidden = {"pods"}
    launch.cancel(registry.get("gke", settings()), settings())
    [(query, _)] = cluster.calls("DELETE", NAME)
    assert query.get("propagationPolicy") == "Foreground"


def test_the_cap_ends_the_pod_and_not_the_wait_for_a_node(cluster, bucket):  # noqa: F811
    config = settings()
    config.plan.max_usd, config.plan.gke_usd_per_hour = 1.42, 0.71
    spec = launch.spec("gke", config, "train")
    assert spec.seconds == pytest.approx(7200)
    shown = gke.render(spec, config)
    assert f"activeDeadlineSeconds: {7200 + 1800}" in shown and "activeDeadlineSeconds: 259200" in shown
    said = launch.expected("gke", spec, config)
    assert "cap 2 hours, $1.42" in said


def test_no_price_no_cap_in_dollars(cluster, bucket):  # noqa: F811
    config = settings()
    config.plan.max_usd, config.plan.gke_usd_per_hour = 1.0, 0.0
    with pytest.raises(UserError, match="needs a price"):
        launch.spec("gke", config, "train")


@pytest.mark.parametrize("backend", ["modal", "gke"])
@pytest.mark.parametrize(
    ("command", "changes", "word"),
    [
        ("generate", {"generate.url": "http://localhost:8000/v1"}, "this machine"),
        ("generate", {"generate.url": "http://127.0.0.1:8000/v1"}, "this machine"),
        ("generate", {"generate.engine": "transformers"}, "no card"),
        ("judge", {"judge.url": "http://[::1]:8000/v1"}, "this machine"),
        ("judge", {"judge.judge": "reward-model"}, "reward-model"),
        ("judge", {"judge.judge": "function"}, "function"),
    ],
)
def test_what_cannot_run_there_is_refused_here(cluster, backend, command, changes, word):  # noqa: F811
    config = settings()
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(UserError, match=word):
        launch.spec(backend, config, command)


def test_a_private_address_is_refused_on_modal_alone(cluster):  # noqa: F811
    config = settings()
    config.generate.url = "http://10.0.0.7:8000/v1"
    with pytest.raises(UserError, match="private network"):
        launch.spec("modal", config, "generate")
    assert launch.spec("gke", config, "generate").command == "generate"


def test_a_secret_without_its_key_is_patched_and_not_created(cluster, bucket):  # noqa: F811
    cluster.secrets["hf-secret"] = {"OTHER"}
    with pytest.raises(UserError, match="no key HF_TOKEN") as raised:
        run()
    assert raised.value.hint.startswith("kubectl patch secret hf-secret") and "create" not in raised.value.hint


def test_only_files_at_the_top_of_the_folder_are_sent(cluster, bucket):  # noqa: F811
    config = settings()
    before = launch.spec("gke", config, "train")
    from pathlib import Path

    (Path(config.data) / "old").mkdir()
    (Path(config.data) / "old" / "val.jsonl").write_text("{}")
    after = launch.spec("gke", config, "train")
    assert after.hash == before.hash and not any("old" in upload.there for upload in after.uploads)


def test_the_list_of_jobs_shows_step_cost_and_the_way_to_the_cap(cluster, bucket):  # noqa: F811
    config = settings()
    config.plan.max_hours, config.plan.gke_usd_per_hour = 2.0, 3600.0
    held = threading.Event()
    cluster.lives = [Life(told(begin=("train", 57, 0)), told(update=(12, {})), hold=held)]
    launch.submit("gke", launch.spec("gke", config, "train"), config, Silent())
    until = time.monotonic() + 20
    while (one := launch.listed(config)[0]).step is None and time.monotonic() < until:
        time.sleep(0.1)
    assert one.step == 12 and one.status.state == "running"
    assert 0 < one.usd < 60 and 1.98 < one.hours_left < 2.0, "a dollar a second"
    console = Console(record=True, width=140)
    jobs_view.jobs(console, [one])
    assert "12" in (shown := console.export_text()) and "2.0 h" in shown and "$" in shown
    held.set()


def test_the_driver_that_cuda_needs_is_said_before_and_can_be_asked_for(cluster, bucket):  # noqa: F811
    cluster.lives = [Life(outcome())]
    results(bucket)
    run(progress=(progress := Lines()))
    assert any("CUDA 13, which needs driver 580" in line for line in progress.lines)
    config = settings()
    config.gke.gpu_driver = "latest"
    shown = gke.render(launch.spec("gke", config, "train"), config)
    assert "cloud.google.com/gke-gpu-driver-version: latest" in shown


def test_what_needs_no_card_runs_on_the_light_image(cluster, bucket):  # noqa: F811
    config = settings()
    config.gke.stage_image = "registry/light@sha256:" + "1" * 64
    for command, word in (("generate", "registry/light@"), ("train", str(config.gke.image))):
        assert word in gke.render(launch.spec("gke", config, command), config)
