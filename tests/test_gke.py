"""Submit, attach, cancel: the real clients of Kubernetes and Cloud Storage against servers in this process."""

import threading
import time
from pathlib import Path

import kube_server
import msgspec
import pytest
from gke_jobs import bucket_server, settings
from kube_server import Life
from training import Lines

from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import launch
from dpo_cli.jobs import registry as jobs
from dpo_cli.jobs.backends import gke
from dpo_cli.jobs.backends._gke_cluster import Cluster
from dpo_cli.jobs.progress_lines import PREFIX, Line, Outcome
from dpo_cli.training.run_history import Trained

NAME = "nothing-dpo-train-dpo"
PAIR = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'


@pytest.fixture(scope="module")
def storage():
    with bucket_server() as make:
        yield make


@pytest.fixture
def bucket(storage, monkeypatch):
    return storage(monkeypatch)


@pytest.fixture
def cluster(tmp_path, monkeypatch, bucket):
    """A cluster, a bucket, and a working folder with pairs and an adapter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gke, "POLL_SECONDS", 0.02)
    for path, text in {
        "data/dpo/train.jsonl": PAIR, "data/dpo/val.jsonl": PAIR, "adapters/nothing-gpt/adapter_model.safetensors": "w",
        "adapters/nothing-gpt/adapter_config.json": "{}",
    }.items():  # fmt: skip
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    with kube_server.serve(tmp_path) as (cluster, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        yield cluster


def told(**fields):
    """A line as the entry prints it."""
    return PREFIX + msgspec.json.encode(Line(**fields)).decode()


def outcome(code=0, **fields):
    result = Trained(
        stage="dpo", run="/vol/runs/dpo", adapter="/vol/adapters/nothing-gpt-dpo", rows=1, held_out=1, steps=1
    )
    return told(outcome=Outcome(exit_code=code, result=msgspec.to_builtins(result), **fields))


def run(config=None, command="train", progress=None, detach=False, **given):
    config = config or settings()
    spec = launch.spec("gke", config, command, **given)
    return launch.run("gke", spec, config, progress or Lines(), detach=detach)


def results(bucket):
    """What a run leaves in the bucket."""
    bucket.write("adapters/nothing-gpt-dpo/adapter_model.safetensors", "trained")
    bucket.write("adapters/nothing-gpt-dpo/adapter_config.json", '{"base_model_name_or_path": "there"}')
    bucket.write("runs/dpo/report.json", "{}")
    bucket.write("runs/dpo/checkpoints/checkpoint-1/optimizer.pt", "big")


def test_a_run_is_submitted_followed_and_brought_home(cluster, bucket):
    cluster.lives = [Life(told(begin=("train", 1, 0)), told(log="step 1"), outcome())]
    results(bucket)
    progress = Lines()
    done = run(progress=progress)
    assert (done.status.state, done.status.exit_code) == ("succeeded", Exit.OK)
    assert "step 1" in progress.lines
    assert done.result["adapter"] == "adapters/nothing-gpt-dpo"
    assert Path("adapters/nothing-gpt-dpo/adapter_model.safetensors").read_text() == "trained"
    assert Path("runs/dpo/report.json").exists() and not Path("runs/dpo/checkpoints").exists()
    inputs = [name for name in bucket.names() if name.startswith("uploads/") and "COMPLETE" not in name]
    assert {name.partition("/")[2].partition("/")[2] for name in inputs} == {
        "dpo/train.jsonl", "dpo/val.jsonl", "nothing-gpt/adapter_config.json", "nothing-gpt/adapter_model.safetensors",
    }  # fmt: skip
    posts = [query for query, _ in cluster.calls("POST", "/jobs")]
    assert [query.get("dryRun") for query in posts] == ["All", None]  # checked before anything is uploaded
    assert all(query["fieldValidation"] == "Strict" for query in posts)


def test_preemption_is_said_and_the_next_pod_followed(cluster, bucket):
    lives = [Life(told(log=f"step {step}"), end="preempted") for step in range(4)]  # more than backoffLimit
    cluster.lives = [*lives, Life(told(log="step 4"), outcome())]
    results(bucket)
    progress = Lines()
    done = run(progress=progress)
    assert done.status.exit_code == Exit.OK
    steps = [line for line in progress.lines if line.startswith("step")]
    assert steps == [f"step {step}" for step in range(5)]
    first, second = (pod.name for pod in cluster.pods_of(NAME)[:2])
    at = progress.lines.index("step 0")
    assert progress.lines[at + 1 : at + 3] == [
        f"{first} was preempted (exit code 143); the next one goes on from the last checkpoint", f"{second} takes over",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "end, pods, state",
    [
        (0, 1, "succeeded"),
        (1, 1, "failed"),  # it saved nothing: the next one would not either
        (2, 1, "failed"),
        (3, 1, "succeeded"),
        (4, 1, "succeeded"),
        (137, 3, "failed"),
    ],
)
def test_exit_codes_mean_the_same_and_only_what_may_mend_is_tried_again(cluster, bucket, end, pods, state):
    cluster.lives = [Life(outcome(end), end=end) for _ in range(4)]
    results(bucket)
    done = run()
    assert (done.status.state, done.status.exit_code) == (state, Exit.FAILED if end == 137 else end)
    assert len(cluster.pods_of(NAME)) == pods
    assert bool(done.fetched) == (state == "succeeded")


@pytest.mark.parametrize("end", [75, 143])
def test_what_saved_before_it_failed_and_a_node_that_was_told_to_go_do_not_count(cluster, bucket, end):
    """Of several nodes, those that lose another end with 143 and no disruption of their own."""
    cluster.lives = [*(Life(told(log="saved"), end=end) for _ in range(5)), Life(outcome())]
    results(bucket)
    assert run().status.exit_code == Exit.OK
    assert len(cluster.pods_of(NAME)) == 6


@pytest.mark.parametrize(
    "life, code, reason",
    [
        (Life(end=137, reason="OOMKilled"), Exit.FAILED, "raise gke.memory"),
        (Life(end=139), Exit.FAILED, "exit code 139"),
        (Life(wait_for_data=124), Exit.USAGE, "did not appear in the bucket"),
    ],
)
def test_why_it_failed_is_said(cluster, life, code, reason):
    cluster.lives = [life] * 3
    done = run()
    assert done.status.exit_code == code
    assert reason in str(done.status.reason)


WAITS = {
    "no node yet: 0/3 nodes are available": Life(pending="0/3 nodes are available"),
    "no node yet: none; TriggeredScaleUp: 0->1": Life(pending="none", events=[("TriggeredScaleUp", "0->1")]),
    "ImagePullBackOff: manifest unknown": Life(waiting=("ImagePullBackOff", "manifest unknown")),
    'CreateContainerConfigError: secret "hf-secret" not found': Life(
        waiting=("CreateContainerConfigError", 'secret "hf-secret" not found')
    ),
    "for the container to start; FailedMount: PermissionDenied": Life(
        waiting=("ContainerCreating", ""), events=[("FailedMount", "PermissionDenied")]
    ),
}


@pytest.mark.parametrize("reason", WAITS)
def test_why_a_pod_waits_is_said_once_while_it_does(cluster, bucket, reason):
    life = WAITS[reason]
    cluster.lives = [life]
    results(bucket)

    class Waiting(Lines):
        def log(self, text):
            super().log(text)
            if reason in text:
                assert reason in str(gke.status(jobs.get("gke", config), config).reason)
                threading.Timer(0.3, life.schedule.set).start()

    config, progress = settings(), Waiting()
    assert run(config, progress=progress).status.exit_code == Exit.OK
    assert progress.lines.count(f"waiting: {reason}") == 1


class Interrupted(Lines):
    """Ctrl-C once something is said."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def log(self, text):
        super().log(text)
        if text == self.text:
            raise KeyboardInterrupt


def test_ctrl_c_detaches_and_attach_comes_back(cluster, bucket):
    hold = threading.Event()
    cluster.lives = [Life(told(log="step 1"), outcome(), hold=hold)]
    results(bucket)
    left = run(progress=Interrupted("step 1"))
    assert not left.status.ended and not left.fetched
    assert not cluster.calls("DELETE") and len(cluster.pods_of(NAME)) == 1
    again = Lines()
    threading.Timer(0.2, hold.set).start()
    done = launch.attach(jobs.get("gke", settings()), settings(), again)
    assert "step 1" in again.lines and done.status.exit_code == Exit.OK and done.fetched


def test_cancel_deletes_in_the_foreground_and_the_pods_end(cluster):
    cluster.lives = [Life(hold=threading.Event())]
    config = settings()
    job = run(config, detach=True).job
    _until(lambda: gke.status(job, config).state == "running")
    (pod,) = cluster.pods_of(NAME)
    assert launch.cancel(job, config).status.state == "cancelled"
    assert cluster.calls("DELETE")[0][0]["propagationPolicy"] == "Foreground"
    _until(lambda: NAME not in cluster.jobs)
    assert pod.done.is_set() and not cluster.pods
    assert gke.status(job, config).state == "cancelled"
    assert [launched.status.state for launched in launch.listed(config)] == ["cancelled"]
    launch.cancel(job, config)  # twice is fine


def _until(there):
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Go to a machine that has the same inputs and knows nothing of the jobs."""

    def go():
        (tmp_path / "runs").rename(tmp_path / f"runs-of-another-{time.monotonic_ns()}")

    return go


def test_the_same_job_is_found_again_from_anywhere_and_another_is_refused(cluster, bucket, elsewhere):
    hold = threading.Event()
    cluster.lives = [Life(told(log="step 1"), outcome(), hold=hold)]
    results(bucket)
    run(detach=True)
    elsewhere()
    with pytest.raises(UserError, match=r"train.beta was 0.1, now 0.2") as refused:
        run(settings("train.beta=0.2"))
    assert "jobs cancel gke-train-dpo" in str(refused.value.hint)
    with pytest.raises(UserError, match="can't be started over"):
        run(fresh=True)
    threading.Timer(0.3, hold.set).start()
    progress = Lines()
    assert run(progress=progress).status.exit_code == Exit.OK
    assert "step 1" in progress.lines
    assert len(cluster.calls("POST", "/jobs")) == 2  # the dry run and the one Job


def test_what_is_done_is_not_done_again_but_fetched_again(cluster, bucket):
    cluster.lives = [Life(outcome())]
    results(bucket)
    run()
    Path("adapters/nothing-gpt-dpo/adapter_model.safetensors").unlink()
    assert run().fetched
    assert len(cluster.calls("POST", "/jobs")) == 2
    assert Path("adapters/nothing-gpt-dpo/adapter_model.safetensors").exists()


@pytest.mark.parametrize("given", [{}, {"fresh": True}, {"config": ["train.beta=0.2"]}])
def test_a_job_that_ended_otherwise_makes_room(cluster, bucket, given):
    cluster.lives = [Life(outcome(2), end=2), Life(outcome())] if not given else [Life(outcome()), Life(outcome())]
    results(bucket)
    run()
    assert run(settings(*given.pop("config", [])), **given).status.exit_code == Exit.OK
    assert len([query for query, _ in cluster.calls("POST", "/jobs") if "dryRun" not in query]) == 2
    assert len(cluster.jobs) == 1


def test_a_lost_connection_loses_and_repeats_no_line(cluster, bucket):
    lines = [told(log=f"step {step}") for step in range(9)]
    cluster.lives = [Life(*lines, outcome())]
    cluster.cut_logs_after = 4
    results(bucket)
    progress = Lines()
    run(progress=progress)
    assert cluster.cut_logs_after is None
    assert [line for line in progress.lines if line.startswith("step")] == [f"step {step}" for step in range(9)]
    assert sum("does not answer" in line for line in progress.lines) == 1


def test_a_pod_that_is_gone_has_no_log(cluster):
    cluster.lives = [Life(told(log="step 1"), hold=threading.Event())]
    config = settings()
    job = run(config, detach=True).job
    _until(lambda: gke.status(job, config).state == "running")
    client = Cluster(config.gke)
    (pod,) = client.pods(NAME)
    assert [text for _, text in client.log(pod, "", follow=False)] == [told(log="step 1")]
    cluster.pods.clear()  # between the list of pods and the question for the log
    assert not list(client.log(pod, "", follow=True))


def test_a_cluster_that_is_away_for_a_while_is_asked_again(cluster, bucket):
    hold = threading.Event()
    cluster.lives = [Life(outcome(), hold=hold)]
    results(bucket)

    class Away(Lines):
        def log(self, text):
            super().log(text)
            if "created" in text:
                cluster.failing = 5
                threading.Timer(0.5, hold.set).start()

    progress = Away()
    assert run(progress=progress).status.exit_code == Exit.OK
    assert sum("unable to handle the request" in line for line in progress.lines) == 1


MISSING = {
    "namespace": (["gke.namespace=nowhere"], "kubectl create namespace nowhere"),
    "service account": (["gke.service_account=nobody"], "kubectl create serviceaccount nobody -n default && gcloud"),
    "secret": (["gke.hf_secret=none", "gke.wandb_secret=x"], 'kubectl create secret generic x -n default --from-literal'
               '=WANDB_API_KEY="$WANDB_API_KEY"; or do without: --set gke.wandb_secret=none'),
    "key": (["gke.hf_secret=openai-secret"],
            """openai-secret -n default -p '{"stringData":{"HF_TOKEN":"'"$HF_TOKEN"'"}}'"""),
    "context": (["gke.context=other"], "gcloud container clusters get-credentials CLUSTER --region us-central1"),
    "bucket": (["gke.bucket=gone"], "gcloud storage buckets create gs://gone"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_is_one_line_with_the_command_that_makes_it(cluster, bucket, what):
    sets, command = MISSING[what]
    with pytest.raises(UserError) as missing:
        run(settings(*sets))
    assert "\n" not in str(missing.value) and command in str(missing.value.hint)
    assert not cluster.jobs and not bucket.names()
    assert jobs.all_jobs(settings()) == ([], [])


def test_without_a_kubeconfig_the_command_that_makes_it_is_named(cluster, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", "nowhere")
    with pytest.raises(UserError, match="no cluster to talk to") as missing:
        run()
    assert "get-credentials CLUSTER --region us-central1 --project my-project" in str(missing.value.hint)


def test_data_that_is_neither_here_nor_there_stops_it_before_it_costs(cluster, bucket):
    Path("data/dpo/train.jsonl").unlink()
    Path("data/dpo/val.jsonl").unlink()
    bucket.write("data/dpo/completions.jsonl")
    with pytest.raises(UserError, match=r"neither here nor at gs://runs: /vol/data/dpo/train\.jsonl") as missing:
        run()
    assert missing.value.hint == "nothing-dpo push data gs://runs/data/dpo"
    assert not cluster.jobs
    bucket.write("data/dpo/train.jsonl", PAIR)
    cluster.lives = [Life(outcome())]
    results(bucket)
    assert run().status.exit_code == Exit.OK


def test_who_may_not_look_may_still_submit_and_who_may_not_submit_is_told(cluster, bucket):
    cluster.forbidden = {"secrets", "serviceaccounts"}
    cluster.lives = [Life(outcome())]
    results(bucket)
    assert run().status.exit_code == Exit.OK
    cluster.forbidden = {"jobs"}
    with pytest.raises(UserError, match="you may not") as refused:
        run(name="other")
    assert "roles/container.developer" in str(refused.value.hint)


def test_what_the_cluster_refuses_is_said_before_anything_is_uploaded(cluster, bucket):
    with pytest.raises(UserError, match=r"refuses it.*image"):
        run(settings("gke.image=Not An Image", "gke.allow_tag=true"))
    assert not bucket.names()


def test_a_queue_lets_it_run_later(cluster, bucket):
    config = settings("gke.queue_name=team-a")
    cluster.lives = [Life(outcome())]
    results(bucket)

    class Admit(Lines):
        def log(self, text):
            super().log(text)
            if text == "waiting: queue team-a has not admitted it":
                assert not cluster.pods
                cluster.jobs[NAME]["spec"]["suspend"] = False

    assert run(config, progress=Admit()).status.exit_code == Exit.OK


def test_a_paused_job_saves_and_goes_on_in_another_pod(cluster, bucket):
    cluster.lives = [Life(hold=threading.Event()), Life(outcome())]
    results(bucket)
    config = settings()
    job = run(config, detach=True).job
    _until(lambda: gke.status(job, config).state == "running")
    (pod,) = cluster.pods_of(NAME)
    paused = launch.suspend(job, config, True)
    assert (paused.status.state, paused.status.reason) == ("pending", "it is suspended")
    _until(lambda: not cluster.pods)
    assert pod.terminate.is_set()
    launch.suspend(job, config, False)
    assert launch.attach(job, config, Lines()).status.exit_code == Exit.OK


def test_only_what_can_pause_does():
    with pytest.raises(UserError, match="no pause"):
        launch.suspend(jobs.Job(id="local-train-dpo", backend="local", spec=launch.spec("local", settings(), "train")),
                       settings(), True)  # fmt: skip


def test_the_service_of_several_nodes_goes_with_its_job(cluster, elsewhere):
    cluster.lives = [Life(hold=threading.Event())]
    config = settings()
    job = run(config, detach=True, nodes=2).job
    cluster.services.clear()  # as if the machine had been lost before it was created
    elsewhere()
    run(config, detach=True, nodes=2)
    owner = cluster.services[NAME]["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"]) == ("Job", cluster.jobs[NAME]["metadata"]["uid"])
    launch.cancel(job, config)
    _until(lambda: not cluster.jobs and not cluster.services)


def test_judging_uploads_what_is_here_and_takes_the_key_from_the_cluster(cluster, bucket):
    Path("data/dpo/completions.jsonl").write_text('{"id": "1", "prompt": [], "completions": ["a", "b"]}\n')
    cluster.lives = [Life(told(outcome=Outcome(exit_code=0, result={})))]
    bucket.write("runs/x")
    spec = launch.spec("gke", settings(), "judge")
    for there in spec.results:
        bucket.write(there.removeprefix("/vol/"), '{"id": "1"}\n')
    done = run(command="judge")
    assert done.status.exit_code == Exit.OK
    assert {Path(path).name for path in done.fetched} == {"judgments.jsonl", "train.jsonl", "val.jsonl"}
    environment = cluster.jobs["nothing-dpo-judge-judge"]["spec"]["template"]["spec"]["containers"][0]["env"]
    key = next(one for one in environment if one["name"] == "OPENAI_API_KEY")
    assert key["valueFrom"]["secretKeyRef"]["name"] == "openai-secret"
