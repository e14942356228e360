"""What a real API server refuses and a JSON schema does not know. Ours, written after the API's documentation."""

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import kubernetes_validate

VERSION = "1.36"
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
SCALES = {"m": Decimal("0.001"), "k": Decimal(10) ** 3, "M": Decimal(10) ** 6, "G": Decimal(10) ** 9,
          "T": Decimal(10) ** 12, "Ki": Decimal(2) ** 10, "Mi": Decimal(2) ** 20, "Gi": Decimal(2) ** 30,
          "Ti": Decimal(2) ** 40}  # fmt: skip


def unknown_fields(document: dict[str, Any]) -> str | None:
    """What strict decoding says of a document; None if it has no unknown and no mistyped field."""
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message}"
    return None


def amount(quantity: str) -> Decimal:
    """A quantity as a number."""
    match = QUANTITY.fullmatch(quantity)
    if not match:
        raise ValueError(f"'{quantity}' is no quantity")
    return Decimal(match[1]) * SCALES.get(match[2] or "", Decimal(1))


def substituted(value: str, environment: dict[str, str]) -> str:
    """A container's arg or variable as Kubernetes hands it on: `$$` is `$`, `$(NAME)` the variable of that name."""
    return re.sub(
        r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)",
        lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0]),
        value,
    )


def faults(document: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a Job or a Service; empty: it would be taken."""
    found = [*_names(document)]
    if document["kind"] == "Job":
        found += _job(document)
    return found


def _names(document: dict[str, Any]) -> Iterator[str]:
    name = document["metadata"].get("name", "")
    # A pod's name and host are made from a Job's.
    longest = 63 - len("-00") if document["kind"] == "Job" else 63
    if not LABEL.fullmatch(name) or len(name) > longest:
        yield f"metadata.name: '{name}'"
    for key, value in document["metadata"].get("labels", {}).items():
        if not LABEL_VALUE.fullmatch(value):
            yield f"metadata.labels.{key}: '{value}'"


def _job(document: dict[str, Any]) -> Iterator[str]:
    spec = document["spec"]
    pod = spec["template"]["spec"]
    containers = [*pod.get("initContainers", []), *pod["containers"]]
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        yield f"restartPolicy: {pod.get('restartPolicy')}"
    if "podFailurePolicy" in spec:
        if pod.get("restartPolicy") != "Never":
            yield "podFailurePolicy: restartPolicy must be Never"
        if spec.get("podReplacementPolicy", "Failed") != "Failed":
            yield "podReplacementPolicy: must be Failed with a podFailurePolicy"
        yield from _failure_rules(spec["podFailurePolicy"]["rules"], {container["name"] for container in containers})
    if spec.get("completionMode") == "Indexed" and not spec.get("completions"):
        yield "completions: missing"
    yield from _volumes(pod, containers)
    for container in containers:
        yield from _container(container)
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if grace < 0:
        yield f"terminationGracePeriodSeconds: {grace}"


def _failure_rules(rules: list[dict[str, Any]], containers: set[str]) -> Iterator[str]:
    for rule in rules:
        codes = rule.get("onExitCodes")
        if (codes is None) == (rule.get("onPodConditions") is None):
            yield "podFailurePolicy: a rule has either exit codes or conditions"
        if codes is not None:
            if codes.get("containerName", next(iter(containers))) not in containers:
                yield f"podFailurePolicy: no container '{codes['containerName']}'"
            if codes["operator"] == "In" and 0 in codes["values"]:
                yield "podFailurePolicy: 0 is no failure"
            if codes["values"] != sorted(set(codes["values"])):
                yield "podFailurePolicy: values must be in order, each once"


def _volumes(pod: dict[str, Any], containers: list[dict[str, Any]]) -> Iterator[str]:
    volumes = [volume["name"] for volume in pod.get("volumes", [])]
    if len(volumes) != len(set(volumes)):
        yield "volumes: a name twice"
    for container in containers:
        mounts = container.get("volumeMounts", [])
        yield from (f"volumeMounts: no volume '{m['name']}'" for m in mounts if m["name"] not in volumes)
        paths = [mount["mountPath"] for mount in mounts]
        if len(paths) != len(set(paths)):
            yield "volumeMounts: a path twice"
    for volume in pod.get("volumes", []):
        limit = volume.get("emptyDir", {}).get("sizeLimit")
        if limit is not None and not QUANTITY.fullmatch(limit):
            yield f"sizeLimit: '{limit}' is no quantity"


def _container(container: dict[str, Any]) -> Iterator[str]:
    requests, limits = (container.get("resources", {}).get(side, {}) for side in ("requests", "limits"))
    for side in (requests, limits):
        yield from (f"resources: '{value}' is no quantity" for value in side.values() if not QUANTITY.fullmatch(value))
    for name, limit in limits.items():
        if QUANTITY.fullmatch(limit) and QUANTITY.fullmatch(requests.get(name, limit)):
            if "/" in name and requests.get(name, limit) != limit:
                yield f"resources: {name} must be requested as it is limited"
            if amount(requests.get(name, limit)) > amount(limit):
                yield f"resources: {name} is limited below its request"
    yield from (f"resources: {name} has no limit" for name in requests if "/" in name and name not in limits)
    for variable in container.get("env", []):
        if ("value" in variable) == ("valueFrom" in variable):
            yield f"env: {variable['name']} has no value, or two"
    if not re.fullmatch(r"[a-z0-9./_-]+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", container["image"]):
        yield f"image: '{container['image']}'"
    yield from _restricted(container)


def _restricted(container: dict[str, Any]) -> Iterator[str]:
    """PodSecurity's level "restricted", of a container."""
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"restricted: {container['name']} may escalate its privileges"
    if context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield f"restricted: {container['name']} keeps capabilities"
    if context.get("privileged"):
        yield f"restricted: {container['name']} is privileged"


def restricted_pod(pod: dict[str, Any]) -> Iterator[str]:
    """PodSecurity's level "restricted", of a pod."""
    context = pod.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
        yield "restricted: the pod may run as root"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "restricted: the pod has no seccomp profile"
    for volume in pod.get("volumes", []):
        kinds = set(volume) - {"name"}
        if not kinds <= {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim",
                         "projected", "secret"}:  # fmt: skip
            yield f"restricted: volume of kind {kinds}"
