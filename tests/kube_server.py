"""An API server with a job controller and a kubelet, in this process: what `--backend gke` talks to in tests.

It is ours, not Kubernetes: it answers the calls that the backend makes, refuses what the real server refuses
(`kube_rules`), and follows a Job's own podFailurePolicy, backoffLimit and suspend. What pods do is told by `Life`s, or
is the container's real command, run as a process with `/vol` in a folder. There is no clock: a life ends when its
lines are written, or when a test lets it.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from kube_rules import faults, restricted_pod, substituted, unknown_fields

JOB_OF_POD = "batch.kubernetes.io/job-name"
TICK = 0.02
Json = dict[str, Any]


class Life:
    """What becomes of one pod.

    Args:
        lines: what its container prints.
        end: exit code of the container, or "preempted".
        pending: why it is not scheduled at first, as the scheduler says it.
        waiting: (reason, message) of a container that does not start, such as ImagePullBackOff.
        hold: the container ends only once this is set; a SIGTERM ends it with 143 in any case.
        wait_for_data: exit code of the init container.
        reason: of that end, such as OOMKilled.
        events: (reason, message) of what the cluster says of the pod.
        vol: folder that is `/vol`: the container's real command is run.
    """

    def __init__(
        self, *lines: str, end: int | str = 0, pending: str | None = None, waiting: tuple[str, str] | None = None,
        hold: threading.Event | None = None, wait_for_data: int = 0, reason: str = "Error",
        events: Sequence[tuple[str, str]] = (),
        vol: Path | None = None,
    ) -> None:  # fmt: skip
        self.lines = lines
        self.end = end
        self.pending = pending
        self.waiting = waiting
        self.hold = hold
        self.wait_for_data = wait_for_data
        self.reason = reason
        self.events = events
        self.vol = vol
        self.schedule = threading.Event()  # a pending or waiting pod goes on once this is set
        self.preempt = threading.Event()

    def mount(self) -> None:
        """Before the container starts."""

    def unmount(self) -> None:
        """After it has ended."""


class Pod:
    """A pod and its log."""

    def __init__(self, document: Json, life: Life) -> None:
        self.document = document
        self.life = life
        self.log: list[tuple[str, str]] = []
        self.terminate = threading.Event()
        self.done = threading.Event()

    @property
    def name(self) -> str:
        return str(self.document["metadata"]["name"])

    def say(self, text: str) -> None:
        self.log.append((f"2026-01-01T00:00:00.{len(self.log):09d}Z", text))

    def status(self, phase: str, **more: Any) -> None:
        """The kubelet's word; a pod has started once it no longer waits for a node."""
        before = self.document.get("status", {})
        started = {} if phase == "Pending" or "startTime" in before else {"startTime": _now()}
        self.document["status"] = before | {"phase": phase} | started | more


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class Cluster:
    """The state of a namespace, and the thread of each Job."""

    def __init__(self) -> None:
        self.namespaces = {"default"}
        self.service_accounts = {"nothing-dpo"}
        self.secrets: dict[str, set[str]] = {
            "hf-secret": {"HF_TOKEN"}, "wandb-secret": {"WANDB_API_KEY"}, "openai-secret": {"OPENAI_API_KEY"},
        }  # fmt: skip
        self.forbidden: set[str] = set()  # kinds that may not be read
        self.jobs: dict[str, Json] = {}
        self.services: dict[str, Json] = {}
        self.pods: dict[str, Pod] = {}
        self.lives: list[Life] = []
        self.requests: list[tuple[str, str, dict[str, str], Any]] = []
        self.cut_logs_after: int | None = None  # lines after which a followed log breaks off, once
        self.refused: defaultdict[str, list[str]] = defaultdict(list)  # Job -> why admission takes none of its pods
        self.failing = 0  # requests that are answered with 503
        self.lock = threading.RLock()
        self._uids = 0

    # What a test asks.

    def pods_of(self, job: str) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.document["metadata"]["labels"][JOB_OF_POD] == job]

    def calls(self, method: str, path: str = "") -> list[tuple[dict[str, str], Any]]:
        return [(query, body) for verb, url, query, body in self.requests if verb == method and path in url]

    # The job controller.

    def create_job(self, document: Json) -> None:
        self._uids += 1
        document["metadata"]["uid"] = f"uid-{self._uids}"
        document["status"] = {}
        name = document["metadata"]["name"]
        self.jobs[name] = document
        threading.Thread(target=self._control, args=(document,), daemon=True).start()

    def _control(self, job: Json) -> None:
        spec = job["spec"]
        failures = 0
        while job is self.jobs.get(job["metadata"]["name"]) and not job["metadata"].get("deletionTimestamp"):
            if spec.get("suspend") or self.refused[job["metadata"]["name"]]:
                time.sleep(TICK)
                continue
            pod = self._start_pod(job)
            while not pod.done.wait(TICK):
                if spec.get("suspend") or job["metadata"].get("deletionTimestamp"):
                    pod.terminate.set()
            if job["metadata"].get("deletionTimestamp"):
                return
            if spec.get("suspend"):
                self.pods.pop(pod.name)
                continue
            if pod.document["status"]["phase"] == "Succeeded":
                job["status"] = {"succeeded": 1, "conditions": [_condition("Complete", "CompletionsReached", "")]}
                return
            rule = _matching_rule(spec["podFailurePolicy"]["rules"], pod.document)
            if rule is not None and rule["action"] == "FailJob":
                message = f"Container of pod {pod.name} failed, matching FailJob rule"
                job["status"] = {"failed": 1, "conditions": [_condition("Failed", "PodFailurePolicy", message)]}
                return
            failures += 0 if rule is not None and rule["action"] == "Ignore" else 1
            if failures > spec.get("backoffLimit", 6):
                message = "Job has reached the specified backoff limit"
                job["status"] = {
                    "failed": failures, "conditions": [_condition("Failed", "BackoffLimitExceeded", message)],
                }  # fmt: skip
                return

    def _start_pod(self, job: Json) -> Pod:
        with self.lock:
            self._uids += 1
            name = job["metadata"]["name"]
            template = job["spec"]["template"]
            life = self.lives.pop(0) if self.lives else Life()
            labels = template["metadata"]["labels"] | {JOB_OF_POD: name}
            created = f"2026-01-01T00:00:{self._uids:02d}Z"
            metadata = {"name": f"{name}-{self._uids:05d}", "labels": labels, "creationTimestamp": created}
            pod = Pod({"metadata": metadata, "spec": template["spec"]}, life)
            pod.status("Pending")
            self.pods[pod.name] = pod
            job["status"] = {"active": 1}
        threading.Thread(target=_live, args=(pod,), daemon=True).start()
        return pod

    def delete_job(self, name: str) -> None:
        """In the foreground: the pods end first, then the Job is gone."""
        job = self.jobs[name]
        job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:59Z"

        def finish() -> None:
            for pod in self.pods_of(name):
                pod.terminate.set()
                pod.done.wait(30)
                self.pods.pop(pod.name, None)
            self.jobs.pop(name, None)
            for service in [key for key, one in self.services.items() if _owned_by(one, job)]:
                self.services.pop(service)

        threading.Thread(target=finish, daemon=True).start()


def _owned_by(document: Json, job: Json) -> bool:
    return any(owner["uid"] == job["metadata"]["uid"] for owner in document["metadata"].get("ownerReferences", []))


def _condition(kind: str, reason: str, message: str) -> Json:
    return {"type": kind, "status": "True", "reason": reason, "message": message}


def _matching_rule(rules: list[Json], pod: Json) -> Json | None:
    """The first rule that fits a failed pod."""
    status = pod["status"]
    conditions = {(one["type"], one["status"]) for one in status.get("conditions", [])}
    ended = {
        one["name"]: one["state"]["terminated"]["exitCode"]
        for one in [*status.get("containerStatuses", []), *status.get("initContainerStatuses", [])]
        if "terminated" in one["state"]
    }
    for rule in rules:
        if any((one["type"], one.get("status", "True")) in conditions for one in rule.get("onPodConditions", [])):
            return rule
        codes = rule.get("onExitCodes")
        if codes:
            names = [codes["containerName"]] if "containerName" in codes else list(ended)
            failed = [ended[name] for name in names if ended.get(name)]
            if any((code in codes["values"]) == (codes["operator"] == "In") for code in failed):
                return rule
    return None


# The kubelet.


def _live(pod: Pod) -> None:
    try:
        _live_through(pod, pod.life)
    finally:
        pod.done.set()


def _live_through(pod: Pod, life: Life) -> None:
    spec = pod.document["spec"]
    container = spec["containers"][0]["name"]
    if life.pending:
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": life.pending}
        pod.status("Pending", conditions=[condition])
        if not _either(life.schedule, pod.terminate):
            return pod.status("Failed")
    pod.status("Pending", conditions=[{"type": "PodScheduled", "status": "True"}])
    if life.waiting:
        reason, message = life.waiting
        state = {"waiting": {"reason": reason, "message": message}}
        pod.status("Pending", containerStatuses=[_container_status(container, state)])
        if not _either(life.schedule, pod.terminate):
            return pod.status("Failed")
    init = _container_status("wait-for-data", {"terminated": {"exitCode": life.wait_for_data}})
    if life.wait_for_data:
        return pod.status("Failed", initContainerStatuses=[init])
    running = _container_status(container, {"running": {}})
    pod.status("Running", initContainerStatuses=[init], containerStatuses=[running])
    life.mount()
    code = _run(pod, life)
    life.unmount()
    conditions = []
    if life.preempt.is_set() or (life.end == "preempted" and not pod.terminate.is_set()):
        conditions = [{"type": "DisruptionTarget", "status": "True", "reason": "TerminationByKubelet",
                       "message": "Pod was terminated in response to imminent node shutdown."}]  # fmt: skip
    ended = _container_status(
        container,
        {"terminated": {"exitCode": code, "reason": life.reason if code else "Completed", "finishedAt": _now()}},
    )
    pod.status("Failed" if code else "Succeeded", containerStatuses=[ended], conditions=conditions)


def _run(pod: Pod, life: Life) -> int:
    """The container's exit code."""
    if life.vol is not None:
        return _run_process(pod, life.vol)
    for line in life.lines:
        pod.say(line)
    if life.hold and not _either(life.hold, pod.terminate, life.preempt):
        return 143
    return 143 if life.end == "preempted" else int(life.end)


def _run_process(pod: Pod, vol: Path) -> int:
    """Run the container's command, with `/vol` in a folder and without its secrets."""
    container = pod.document["spec"]["containers"][0]
    values = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    given = {name: substituted(value, values) for name, value in values.items() if "HOME" not in name}
    process = subprocess.Popen(
        [sys.executable if word == "python" else word for word in container["command"]], text=True,
        env=os.environ | {name: value.replace('"/vol/', f'"{vol}/') for name, value in given.items()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def signals() -> None:
        if not _either(pod.done, pod.terminate, pod.life.preempt):
            process.send_signal(signal.SIGTERM)

    threading.Thread(target=signals, daemon=True).start()
    assert process.stdout is not None
    for line in process.stdout:
        pod.say(line.rstrip("\n").replace(str(vol), "/vol"))
    code = process.wait()
    return 137 if code < 0 else code  # the first process of a container gets no signal that it does not handle


def _container_status(name: str, state: Json) -> Json:
    return {"name": name, "state": state, "image": "x", "imageID": "x", "ready": False, "restartCount": 0}


def _either(wanted: threading.Event, *others: threading.Event) -> bool:
    """Wait for any; whether it is the first."""
    while not wanted.is_set():
        if any(other.is_set() for other in others):
            return False
        time.sleep(TICK / 4)
    return True


# The API server.


class Refused(Exception):
    """What the server answers instead."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                       "message": message}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Cluster

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.cluster.requests.append((self.command, url.path, query, body))
        try:
            if self.cluster.failing:
                self.cluster.failing -= 1
                raise Refused(503, "ServiceUnavailable", "the server is currently unable to handle the request")
            answer = self._route(url.path.strip("/").split("/"), query, body)
        except Refused as error:
            return self._answer(error.code, error.status)
        if answer is not None:
            self._answer(201 if self.command == "POST" else 200, answer)

    do_GET = do_POST = do_PATCH = do_DELETE = _handle

    def _answer(self, code: int, document: Json) -> None:
        content = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _route(self, parts: list[str], query: dict[str, str], body: Any) -> Json | None:
        cluster = self.cluster
        at = parts.index("namespaces") + 1
        namespace, rest = parts[at], parts[at + 1 :]
        if namespace not in cluster.namespaces:
            raise Refused(404, "NotFound", f'namespaces "{namespace}" not found')
        if rest and rest[0] in cluster.forbidden:
            raise Refused(403, "Forbidden", f'{rest[0]} is forbidden: User "me" cannot get resource "{rest[0]}"')
        match self.command, rest:
            case "GET", []:
                return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": namespace}}
            case "GET", ["serviceaccounts", name]:
                return self._named("ServiceAccount", name, name in cluster.service_accounts)
            case "GET", ["secrets", name]:
                found = self._named("Secret", name, name in cluster.secrets)
                return found | {"data": dict.fromkeys(cluster.secrets[name], "aHVzaA==")}
            case "POST", ["jobs" | "services" as kind]:
                return self._create(kind, query, body)
            case "GET", ["jobs"]:
                return {
                    "kind": "JobList",
                    "apiVersion": "batch/v1",
                    "metadata": {},
                    "items": list(cluster.jobs.values()),
                }
            case "GET", ["jobs", name]:
                return self._job(name)
            case "PATCH", ["jobs", name]:
                return self._patch(self._job(name), query, body)
            case "DELETE", ["jobs", name]:
                return self._delete(self._job(name), query, body or {})
            case "GET", ["pods"]:
                job = query["labelSelector"].removeprefix(f"{JOB_OF_POD}=")
                items = [pod.document for pod in cluster.pods_of(job)]
                return {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items}
            case "GET", ["events"]:
                return self._events(dict(part.split("=") for part in query["fieldSelector"].split(",")))
            case "GET", ["pods", name, "log"]:
                return self._log(name, query)
        raise Refused(404, "NotFound", "the server could not find the requested resource")

    def _named(self, kind: str, name: str, exists: bool) -> Json:
        if not exists:
            raise Refused(404, "NotFound", f'{kind.lower()}s "{name}" not found')
        return {"kind": kind, "apiVersion": "v1", "metadata": {"name": name}}

    def _job(self, name: str) -> Json:
        if name not in self.cluster.jobs:
            raise Refused(404, "NotFound", f'jobs.batch "{name}" not found')
        return self.cluster.jobs[name]

    def _create(self, kind: str, query: dict[str, str], document: Json) -> Json:
        if query.get("fieldValidation") != "Strict":
            raise Refused(400, "BadRequest", "this test's server takes nothing without fieldValidation=Strict")
        unknown = unknown_fields({key: value for key, value in document.items() if key != "status"})
        if unknown:
            raise Refused(400, "BadRequest", f"strict decoding error: {unknown}")
        wrong = faults(document)
        if kind == "jobs":
            wrong += restricted_pod(document["spec"]["template"]["spec"])
        if wrong:
            raise Refused(422, "Invalid", f"{document['kind']} is invalid: {'; '.join(wrong)}")
        store = self.cluster.jobs if kind == "jobs" else self.cluster.services
        name = document["metadata"]["name"]
        if name in store:
            raise Refused(409, "AlreadyExists", f'{kind} "{name}" already exists')
        if query.get("dryRun") != "All":
            if kind == "jobs":
                self.cluster.create_job(document)
            else:
                store[name] = document
        return document | {"status": document.get("status", {})}

    def _patch(self, job: Json, query: dict[str, str], body: Any) -> Json:
        if query.get("fieldValidation") != "Strict" or set(body) != {"spec"} or set(body["spec"]) != {"suspend"}:
            raise Refused(422, "Invalid", "only spec.suspend may change")
        job["spec"]["suspend"] = body["spec"]["suspend"]
        return job

    def _delete(self, job: Json, query: dict[str, str], body: Json) -> Json:
        if (query | body).get("propagationPolicy") != "Foreground":
            raise Refused(400, "BadRequest", "the pods would run on: propagationPolicy=Foreground is missing")
        if not job["metadata"].get("deletionTimestamp"):
            self.cluster.delete_job(job["metadata"]["name"])
        return job

    def _events(self, wanted: dict[str, str]) -> Json:
        if wanted.get("involvedObject.kind") == "Job":
            events = [("FailedCreate", message) for message in self.cluster.refused[wanted["involvedObject.name"]]]
        else:
            events = self.cluster.pods[wanted["involvedObject.name"]].life.events
        items = [
            {"metadata": {"name": "e"}, "involvedObject": {}, "reason": reason, "message": message}
            for reason, message in events
            if reason == wanted["reason"]
        ]
        return {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": items}

    def _log(self, name: str, query: dict[str, str]) -> None:
        pod = self.cluster.pods.get(name)
        if pod is None:
            raise Refused(404, "NotFound", f'pods "{name}" not found')
        if pod.document["status"]["phase"] == "Pending":
            raise Refused(400, "BadRequest", f'container in pod "{name}" is waiting to start: ContainerCreating')
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for count, (when, text) in enumerate(self._lines(pod, query.get("follow") == "true")):
            if self.cluster.cut_logs_after == count:
                self.cluster.cut_logs_after = None
                self.close_connection = True
                return None
            line = f"{when} {text}\n" if query.get("timestamps") == "true" else f"{text}\n"
            self._chunk(line.encode())
        self._chunk(b"")
        return None

    def _lines(self, pod: Pod, follow: bool) -> Iterator[tuple[str, str]]:
        sent = 0
        while True:
            ended = pod.done.is_set()
            yield from pod.log[sent:]
            sent = len(pod.log) if ended or not follow else sent + len(pod.log[sent:])
            if ended or not follow:
                return
            time.sleep(TICK / 2)

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")
        self.wfile.flush()


@contextmanager
def serve(folder: Path) -> Iterator[tuple[Cluster, Path]]:
    """A cluster and the kubeconfig that leads to it."""
    cluster = Cluster()
    handler = type("Bound", (Handler,), {"cluster": cluster})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(TICK,), daemon=True).start()
    kubeconfig = folder / "kubeconfig"
    context = {"name": "test", "context": {"cluster": "test", "user": "me"}}
    kubeconfig.write_text(
        json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "test", "contexts": [context],
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "me", "user": {"token": "kube-user-token"}}],
        })
    )  # fmt: skip
    try:
        yield cluster, kubeconfig
    finally:
        server.shutdown()
        server.server_close()
