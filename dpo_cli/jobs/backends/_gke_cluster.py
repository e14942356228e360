"""The cluster's API server: what is there, what is asked, and each refusal as a line with the command that mends it.

Talks to the context of the kubeconfig. Not covered: what only the cluster's own logs tell, such as why its autoscaler
finds no machine.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
import urllib3
from kubernetes import client as k8s
from kubernetes import config as kubeconfig
from kubernetes.client.exceptions import ApiException

from dpo_cli.config.remote_settings import GkeSection
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs.backends._gke_render import INDEX_OF_POD, JOB_OF_POD

TIMEOUT = (10, 60)  # seconds to connect, and without a byte; a log that is silent for longer is asked for again
STARTING = ("PodInitializing", "ContainerCreating")


class ClusterUnreachable(UserError):
    """The cluster does not answer now; the same question may be answered later."""


class End(NamedTuple):
    """How a pod's container ended."""

    container: str
    code: int
    reason: str | None


class Refusal(NamedTuple):
    """Why pods are not created: the cluster's words, and what mends it if it will not pass by itself."""

    message: str
    mend: str | None


class Cluster:
    """One namespace of the cluster.

    Raises:
        UserError: there is no kubeconfig, or no such context in it.
    """

    def __init__(self, gke: GkeSection) -> None:
        self.gke = gke
        self.namespace = gke.namespace
        try:
            api = kubeconfig.new_client_from_config(os.environ.get("KUBECONFIG") or None, gke.context)
        except (kubeconfig.ConfigException, OSError) as error:
            message = f"no cluster to talk to: {' '.join(str(error).split())}"
            raise UserError(message, where="kubeconfig", hint=self._login()) from None
        self._batch, self._core = k8s.BatchV1Api(api), k8s.CoreV1Api(api)

    def job(self, name: str) -> Any | None:
        """A Job; None if there is none of that name."""
        with self._explained():
            return _or_none(self._batch.read_namespaced_job, name, self.namespace)

    def create_job(self, document: dict[str, Any], dry_run: bool = False) -> bool:
        """Create a Job; False if one of that name is there.

        Args:
            document: the Job.
            dry_run: let the cluster check it, and create nothing.
        """
        options = {"dry_run": "All"} if dry_run else {}
        return self._create(self._batch.create_namespaced_job, document, **options)

    def create_service(self, document: dict[str, Any]) -> None:
        """Create a Service that goes when the Job of its name goes, unless it is there."""
        metadata = document["metadata"]
        owner = self.job(metadata["name"])
        if owner is not None:
            reference = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": owner.metadata.uid}
            owned = metadata | {"ownerReferences": [reference | {"blockOwnerDeletion": True}]}
            self._create(self._core.create_namespaced_service, document | {"metadata": owned})

    def _create(self, create: Any, document: dict[str, Any], **options: str) -> bool:
        with self._explained():
            try:
                create(self.namespace, document, field_validation="Strict", _request_timeout=TIMEOUT, **options)
                return True
            except ApiException as error:
                if error.status != 409:
                    raise
                return False

    def delete_job(self, name: str) -> None:
        """Delete a Job and its pods; without saying so, they would run on. No such Job is fine."""
        with self._explained():
            _or_none(self._batch.delete_namespaced_job, name, self.namespace, propagation_policy="Foreground")

    def suspend(self, name: str, suspended: bool) -> None:
        """Let a Job's pods go, or start them again."""
        with self._explained():
            self._batch.patch_namespaced_job(
                name,
                self.namespace,
                {"spec": {"suspend": suspended}},
                field_validation="Strict",
                _request_timeout=TIMEOUT,
            )

    def pods(self, job: str) -> list[Any]:
        """The pods of a Job, the oldest first; of one with several nodes, those of the first."""
        with self._explained():
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{JOB_OF_POD}={job}", _request_timeout=TIMEOUT
            ).items
        first = [pod for pod in found if (pod.metadata.annotations or {}).get(INDEX_OF_POD, "0") == "0"]
        return sorted(first, key=lambda pod: (pod.metadata.creation_timestamp, pod.metadata.name))

    def log(self, pod: Any, after: str, follow: bool) -> Iterator[tuple[str, str]]:
        """(time, line) of what a pod's container has printed after a time; none if it is gone or not started."""
        with self._explained():
            try:
                response = self._core.read_namespaced_pod_log(
                    pod.metadata.name,
                    self.namespace,
                    container=pod.spec.containers[0].name,
                    follow=follow,
                    timestamps=True,
                    _preload_content=False,
                    _request_timeout=TIMEOUT,
                )
            except ApiException as error:
                if error.status in (400, 404):
                    return
                raise
            for line in _lines(response):
                when, _, text = line.partition(" ")
                if when > after:
                    yield when, text

    def check(self, secrets: dict[str, str]) -> None:
        """See that what a pod refers to is there: it would wait for it for ever, without a word.

        Args:
            secrets: key -> name of the secret that holds it.

        Raises:
            UserError: something is missing.
        """
        namespace, account, core = self.namespace, self.gke.service_account, self._core
        if self._seen(core.read_namespace, namespace) is None:
            raise UserError("no such namespace", where=namespace, hint=f"kubectl create namespace {namespace}")
        if self._seen(core.read_namespaced_service_account, account, namespace) is None:
            hint = f"kubectl create serviceaccount {account} -n {namespace} && {self._grant()}"
            raise UserError("no such service account", where=f"{namespace}/{account}", hint=hint)
        for key, name in secrets.items():
            hint = f'kubectl create secret generic {name} -n {namespace} --from-literal={key}="${key}"'
            if key in ("HF_TOKEN", "WANDB_API_KEY"):
                hint += f"; or do without: --set gke.{'hf' if key == 'HF_TOKEN' else 'wandb'}_secret=none"
            secret = self._seen(core.read_namespaced_secret, name, namespace)
            if secret is None:
                raise UserError("no such secret", where=f"{namespace}/{name}", hint=hint)
            if secret is not True and key not in (secret.data or {}):
                data = f"""'{{"stringData":{{"{key}":"'"${key}"'"}}}}'"""
                hint = f"kubectl patch secret {name} -n {namespace} -p {data}"
                raise UserError(f"it has no key {key}", where=f"{namespace}/{name}", hint=hint)

    def why_pending(self, pod: Any) -> str:
        """What a pod waits for, in the cluster's words."""
        status = pod.status
        for condition in status.conditions or []:
            if condition.type == "PodScheduled" and condition.status == "False":
                return f"no node yet: {condition.message}{self._event(pod, 'TriggeredScaleUp')}"
        for container in [*(status.init_container_statuses or []), *(status.container_statuses or [])]:
            waiting = container.state.waiting
            if waiting and waiting.reason not in STARTING:
                return f"{waiting.reason}: {waiting.message}"
            if container.name == "wait-for-data" and container.state.running:
                return "for the data to appear in the bucket"
        return f"for the container to start{self._event(pod, 'FailedMount')}"

    def why_no_pods(self, job: str) -> "Refusal | None":
        """What the cluster says of a Job whose pods it does not create; None if it says nothing, or we may not ask."""
        try:
            with self._explained():
                events = self._core.list_namespaced_event(
                    self.namespace,
                    field_selector=f"involvedObject.name={job},involvedObject.kind=Job,reason=FailedCreate",
                    _request_timeout=TIMEOUT,
                ).items
        except UserError:
            return None
        return refusal(events[-1].message, job, self.namespace) if events else None

    def _event(self, pod: Any, reason: str) -> str:
        """The newest event of a reason, said after a semicolon."""
        try:
            with self._explained():
                events = self._core.list_namespaced_event(
                    self.namespace,
                    field_selector=f"involvedObject.name={pod.metadata.name},reason={reason}",
                    _request_timeout=TIMEOUT,
                ).items
        except UserError:
            return ""
        return f"; {reason}: {events[-1].message}" if events else ""

    def _seen(self, read: Any, *names: str) -> Any:
        """What is there; None if nothing is, True if we may not look."""
        with self._explained():
            try:
                return _or_none(read, *names)
            except ApiException as error:
                if error.status == 403:
                    return True
                raise

    def _login(self) -> str:
        place = f"--region {self.gke.region} --project {self.gke.project or 'PROJECT'}"
        return f"gcloud container clusters get-credentials CLUSTER {place}"

    def _grant(self) -> str:
        """The command that lets the service account use the bucket."""
        project = self.gke.project or "PROJECT"
        number = f"$(gcloud projects describe {project} --format='value(projectNumber)')"
        pool = f"projects/{number}/locations/global/workloadIdentityPools/{project}.svc.id.goog"
        member = f"principal://iam.googleapis.com/{pool}/subject/ns/{self.namespace}/sa/{self.gke.service_account}"
        binding = f"gcloud storage buckets add-iam-policy-binding gs://{self.gke.bucket}"
        return f'{binding} --role roles/storage.objectUser --member "{member}"'

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except ApiException as error:
            raise self._refusal(error) from None
        except urllib3.exceptions.HTTPError as error:
            raise self._unreachable(" ".join(str(error).split())) from None

    def _unreachable(self, why: str) -> ClusterUnreachable:
        hint = "a job that was submitted runs on; is this the cluster? kubectl config current-context"
        return ClusterUnreachable(
            f"the cluster does not answer: {why}", where=self.namespace, hint=hint, code=Exit.FAILED
        )

    def _refusal(self, error: ApiException) -> UserError:
        try:
            message = str(msgspec.json.decode(error.body)["message"])
        except (msgspec.MsgspecError, KeyError, TypeError):
            message = str(error.reason)
        if error.status == 401:
            return UserError("the cluster does not know you", where="kubeconfig", hint=self._login())
        if error.status == 403:
            binding = f"gcloud projects add-iam-policy-binding {self.gke.project or 'PROJECT'}"
            hint = f"ask for a role that may: {binding} --role roles/container.developer --member YOU"
            return UserError(f"you may not: {message}", where=self.namespace, hint=hint)
        if error.status == 429 or error.status >= 500:
            return self._unreachable(message)
        return UserError(f"the cluster refuses it: {message}", where=self.namespace)


def refusal(message: str, job: str, namespace: str) -> Refusal:
    """Read a FailedCreate event of a Job.

    A quota that is used up may be given back; one that is smaller than the request, and everything else that admission
    refuses, stays as it is.
    """
    quota = re.search(r"exceeded quota: ([\w.-]+), requested: (.*?), used: .*?, limited: (.*)$", message)
    if quota is None:
        return Refusal(message, f"kubectl describe job {job} -n {namespace}")
    requested, limited = (
        dict(part.split("=", 1) for part in text.split(",") if "=" in part) for text in (quota[2], quota[3])
    )
    never = [name for name in requested if name in limited and _amount(requested[name]) > _amount(limited[name])]
    mend = f"kubectl edit resourcequota {quota[1]} -n {namespace}, or ask whoever owns it for more {', '.join(never)}"
    return Refusal(message, mend if never else None)


def _amount(quantity: str) -> float:
    """A Kubernetes quantity as a number: `500m`, `24Gi`, `8`."""
    found = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", quantity.strip())
    if found is None:
        return 0.0
    scale = {"m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
        f"{letter}i": 1024.0**power for power, letter in enumerate("KMGT", 1)
    }
    return float(found[1]) * scale.get(found[2], 1.0)


def end_of(pod: Any) -> End | None:
    """How a pod ended: as its init container did if that failed, else as its container; None if that is not known."""
    for container in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]:
        ended = container.state.terminated
        if ended and (ended.exit_code or container.name == pod.spec.containers[0].name):
            return End(container.name, ended.exit_code, ended.reason)
    return None


def ended_at(pod: Any) -> datetime | None:
    """When a pod's last container ended; None while one runs."""
    if pod.status.phase not in ("Succeeded", "Failed"):
        return None
    ends = [one.state.terminated.finished_at for one in pod.status.container_statuses or [] if one.state.terminated]
    return max((end for end in ends if end is not None), default=None)


def preempted(pod: Any) -> bool:
    """Whether a pod was ended for no fault of its own."""
    return any(one.type == "DisruptionTarget" and one.status == "True" for one in pod.status.conditions or [])


def _or_none(call: Any, *arguments: Any, **options: Any) -> Any | None:
    try:
        return call(*arguments, _request_timeout=TIMEOUT, **options)
    except ApiException as error:
        if error.status == 404:
            return None
        raise


def _lines(response: Any) -> Iterator[str]:
    """Whole lines of a response; the last one may lack its end if the connection broke."""
    rest = b""
    for block in response.stream():
        *whole, rest = (rest + block).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
    if rest:
        yield rest.decode(errors="replace")
