"""`--backend gke`: a Job on Google Kubernetes Engine; inputs and results are in a Cloud Storage bucket.

The Job's name comes from the job's id, so a second one of the same id can't exist: the one that is there is compared by
the hash of its spec, and attached to or refused. Credentials are the kubeconfig's, and Google's application default
ones for the bucket. Not covered: making cluster, bucket, secrets or image; each missing one is named with the command
that makes it.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import yaml

from dpo_cli.config.settings import Config
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import transfer
from dpo_cli.jobs.backends import _gke_render as rendering
from dpo_cli.jobs.backends._gke_cluster import Cluster, ClusterUnreachable, end_of, ended_at, preempted
from dpo_cli.jobs.backends._gke_render import HASH, QUEUE, job_name
from dpo_cli.jobs.registry import Job, Status, ended, refuse_another
from dpo_cli.jobs.spec import VOLUME as VOLUME
from dpo_cli.jobs.spec import Spec, identity
from dpo_cli.jobs.worker import SPEC, TRY_AGAIN
from dpo_cli.progress import Progress

POLL_SECONDS = 2.0
DELETION_SECONDS = 180.0  # what the deletion of a Job that has ended may take
PATIENCE_SECONDS = 600.0  # how long the cluster may not answer before a log is given up


def gpu(config: Config) -> str | None:
    """The card that is asked for by default."""
    return config.gke.gpu


def usd_per_hour(spec: Spec, config: Config) -> float:
    """What `plan.gke_usd_per_hour` says of one card, for all of them: Google's price depends on region and contract."""
    return config.plan.gke_usd_per_hour * spec.gpus * spec.nodes if spec.command == "train" else 0.0


def render(spec: Spec, config: Config) -> str:
    """The YAML of everything that is created."""
    documents = rendering.render(identity("gke", spec), spec, config.gke)
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def submit(spec: Spec, config: Config, progress: Progress) -> Job:
    """Check, upload, create; or find the Job that does the same.

    Raises:
        UserError: what the Job needs is missing, another Job of its name is running, or the cluster refuses it.
    """
    job = Job(id=identity("gke", spec), backend="gke", spec=spec)
    document, *services = rendering.render(job.id, spec, config.gke)
    cluster = Cluster(config.gke)
    job.handle = {"name": job_name(job.id), "namespace": cluster.namespace, "bucket": str(config.gke.bucket)}
    cluster.check(rendering.secrets(spec, config.gke))
    if not _is_there(cluster, job, config, progress):
        if line := rendering.driver_line(spec, config.gke):
            progress.log(line)
        cluster.create_job(document, dry_run=True)
        transfer.refuse_missing(spec, _bucket(job), VOLUME)
        transfer.upload(spec, _bucket(job), VOLUME, progress)
        if not cluster.create_job(document):
            raise UserError("somebody else has just created it", where=job.id, hint="the same command attaches to it")
        progress.log(f"Job {job.handle['name']} created in namespace {cluster.namespace}")
    for service in services:
        cluster.create_service(service)
    return job


def status(job: Job, config: Config) -> Status:
    """Where the Job stands, and with which exit code its last pod ended.

    Raises:
        UserError: the cluster does not say.
    """
    now = _status(_cluster(job, config), job.handle["name"])
    if now.state == "cancelled" and job.cancelled:
        now = Status("cancelled", Exit.INTERRUPTED, "its checkpoints are in the bucket")
    return now


def card_seconds(job: Job, config: Config) -> float | None:
    """From each pod's start, its image's pull included, to its end or now; of the first node of several."""
    seconds = 0.0
    for pod in _cluster(job, config).pods(job.handle["name"]):
        if pod.status.start_time is not None:
            until = ended_at(pod) or datetime.now(UTC)
            seconds += max((until - pod.status.start_time).total_seconds(), 0.0)
    return seconds


def logs(job: Job, config: Config, follow: bool) -> Iterator[str]:
    """What each pod in turn prints, and in between why nothing runs.

    Raises:
        UserError: the cluster refuses, or has not answered for long.
    """
    story = _Story(_cluster(job, config), job.handle["name"])
    answered = time.monotonic()
    while True:
        try:
            yield from story.news(follow)
            answered = time.monotonic()
        except ClusterUnreachable as error:
            if not follow or time.monotonic() - answered > PATIENCE_SECONDS:
                raise
            yield from story.once(f"waiting: {error.message}")
        if story.ended or not follow:
            return
        time.sleep(POLL_SECONDS)


def cancel(job: Job, config: Config) -> None:
    """Delete the Job and, with it, its pods."""
    _cluster(job, config).delete_job(job.handle["name"])


def suspend(job: Job, config: Config, suspended: bool) -> None:
    """Let the Job's pods save and go, or start one again."""
    _cluster(job, config).suspend(job.handle["name"], suspended)


def fetch(job: Job, config: Config, into: Path, progress: Progress) -> None:
    """Download the results from the bucket.

    Raises:
        UserError: the bucket can't be read.
    """
    transfer.fetch(job.spec, _bucket(job), VOLUME, into, progress)


class _Story:
    """What has been told of a Job's pods."""

    def __init__(self, cluster: Cluster, job: str) -> None:
        self.cluster = cluster
        self.job = job
        self.ended = False
        self._told: dict[str, str] = {}  # pod -> time of its last line
        self._over: set[str] = set()
        self._said = ""

    def once(self, text: str) -> Iterator[str]:
        """A line, unless it is the one that was said last."""
        if text != self._said:
            self._said = text
            yield text

    def news(self, follow: bool) -> Iterator[str]:
        """What is new, until the pod that runs has ended if `follow`."""
        there = self.cluster.job(self.job)  # asked first: what its last pod prints then is told still
        pods = self.cluster.pods(self.job)
        for pod in pods:
            if pod.metadata.name not in self._over:
                yield from self._of_pod(pod, follow)
        if not pods and there is not None:
            yield from self._of_refusal()
        self.ended = there is None or _condition(there) is not None or there.metadata.deletion_timestamp is not None
        if there is not None and there.spec.suspend and not self.ended:
            yield from self.once(f"waiting: {_why_suspended(there)}")

    def _of_refusal(self) -> Iterator[str]:
        """Why there is no pod.

        Raises:
            UserError: the reason will not pass by itself.
        """
        refused = self.cluster.why_no_pods(self.job)
        if refused is None:
            return
        if refused.mend:
            hint = f"{refused.mend}; nothing-dpo jobs cancel ends it"
            raise UserError(f"its pods are refused: {refused.message}", where=self.job, hint=hint, code=Exit.FAILED)
        yield from self.once(f"waiting: {refused.message}")

    def _of_pod(self, pod: Any, follow: bool) -> Iterator[str]:
        name = pod.metadata.name
        if pod.status.phase == "Pending":
            yield from self.once(f"waiting: {self.cluster.why_pending(pod)}")
            return
        if name not in self._told:
            self._told[name] = ""
            if self._over:
                yield f"{name} takes over"
        for when, text in self.cluster.log(pod, self._told[name], follow):
            self._told[name] = when
            yield text
        if pod.status.phase in ("Succeeded", "Failed"):
            self._over.add(name)
            if pod.status.phase == "Failed":
                yield _describe_failure(pod)


def _describe_failure(pod: Any) -> str:
    """How a pod failed."""
    end = end_of(pod)
    code = f"exit code {end.code}" if end else "no exit code"
    if preempted(pod):
        return f"{pod.metadata.name} was preempted ({code}); the next one goes on from the last checkpoint"
    where = f" in {end.container}" if end and end.container != pod.spec.containers[0].name else ""
    reason = f", {end.reason}" if end and end.reason not in (None, "Error") else ""
    return f"{pod.metadata.name} failed with {code}{where}{reason}"


def _status(cluster: Cluster, name: str) -> Status:
    there = cluster.job(name)
    if there is None:
        return Status(
            "cancelled", None, f"there is no Job {name} in {cluster.namespace}: cancelled, or over for a week"
        )
    if there.metadata.deletion_timestamp is not None:
        return Status("cancelled", None, "it is being deleted")
    condition = _condition(there)
    if condition is not None and condition.type == "Complete":
        return ended(Exit.OK)
    pods = cluster.pods(name)
    if condition is not None:
        return _failed(condition, pods)
    if there.spec.suspend:
        return Status("pending", None, _why_suspended(there))
    if not pods:
        refused = cluster.why_no_pods(name)
        return Status("pending", None, f"no pod: {refused.message}" if refused else None)
    if pods[-1].status.phase != "Running":
        return Status("pending", None, f"waiting: {cluster.why_pending(pods[-1])}")
    return Status("running")


def _failed(condition: Any, pods: list[Any]) -> Status:
    """Of a Job that failed: its last pod's exit code, as far as it is one of ours, and why."""
    if condition.reason == "DeadlineExceeded":
        return ended(Exit.FAILED, "it took longer than gke.deadline_hours, the wait for a node included")
    end = end_of(pods[-1]) if pods else None
    if end is None:
        return ended(Exit.FAILED, condition.message)
    if end.container == "wait-for-data":
        return ended(Exit.USAGE, "its data did not appear in the bucket")
    if end.reason == "OOMKilled":
        setting = "gke.memory" if end.container == "train" else "gke.stage_memory"
        return ended(Exit.FAILED, f"out of memory: raise {setting}")
    if end.code == TRY_AGAIN:
        return ended(Exit.FAILED, condition.message)
    if end.code in list(Exit):
        return ended(end.code, None if end.code == Exit.GATE else condition.message)
    return ended(Exit.FAILED, f"exit code {end.code}")


def _condition(job: Any) -> Any | None:
    """The condition that says how a Job ended; None if it has not."""
    conditions = (job.status and job.status.conditions) or []
    return next((one for one in conditions if one.type in ("Complete", "Failed") and one.status == "True"), None)


def _why_suspended(job: Any) -> str:
    queue = (job.metadata.labels or {}).get(QUEUE)
    return f"queue {queue} has not admitted it" if queue else "it is suspended"


def _is_there(cluster: Cluster, job: Job, config: Config, progress: Progress) -> bool:
    """Whether the Job that is there does, or has done, what is asked; any other that has ended makes room.

    Raises:
        UserError: it runs, and does something else.
    """
    name = job.handle["name"]
    there = cluster.job(name)
    if there is None:
        return False
    now = _status(cluster, name)
    same = (there.metadata.annotations or {}).get(HASH) == job.spec.hash and not job.spec.fresh
    if not now.ended and not same:
        refuse_another(_spec_of(there, name), rendering.sent(job.spec, config.gke), job.id)
    if same and (not now.ended or now.state == "succeeded"):
        progress.log(f"Job {name} is {'done already' if now.ended else 'there'}: attaching to it")
        return True
    progress.log(f"the old Job {name} makes room")
    cluster.delete_job(name)
    until = time.monotonic() + DELETION_SECONDS
    while cluster.job(name) is not None:
        if time.monotonic() > until:
            raise UserError("its deletion takes long", where=name, hint="try again in some minutes", code=Exit.FAILED)
        time.sleep(POLL_SECONDS / 4)
    return False


def _spec_of(there: Any, name: str) -> Spec:
    """The spec that a Job runs."""
    for variable in there.spec.template.spec.containers[0].env or []:
        if variable.name == SPEC:
            return msgspec.json.decode(variable.value.replace("$$", "$"), type=Spec)
    raise UserError("a Job that is not ours has this name", where=name, hint="--name OTHER")


def _bucket(job: Job) -> str:
    return f"gs://{job.handle['bucket']}"


def _cluster(job: Job, config: Config) -> Cluster:
    """The cluster, in the namespace of the job whatever is configured now."""
    return Cluster(msgspec.structs.replace(config.gke, namespace=job.handle["namespace"]))


class _Dumper(yaml.SafeDumper):
    """YAML with texts of several lines as they are read, and no references."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
