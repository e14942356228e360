"""What the cluster is asked for: one Job, and a Service where a run has several nodes.

Pure functions of spec and settings: the same ones give the same objects. Nothing secret is in them; keys come from the
cluster's own secrets, by reference. Not covered: what GKE's admission changes, such as Autopilot's rounding.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
from kubernetes import client as k8s

from dpo_cli.config.remote_settings import GkeSection
from dpo_cli.config.resolve import as_dict
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import SYNC
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs.cap import GRACE_SECONDS
from dpo_cli.jobs.spec import VOLUME, Spec, training_secrets
from dpo_cli.jobs.worker import PORT, SPEC, TRY_AGAIN

CACHE = "/cache"
LOCK = Path(__file__).parents[1] / "locks" / "train.txt"
DRIVER_OF_CUDA = {12: 525, 13: 580}  # the least driver of a CUDA release, by NVIDIA's compatibility table
USER = 1000  # of the image; the bucket's files are shown as its own
WAIT_SECONDS = 600  # for the data; the GPU is paid for meanwhile
KEEP_SECONDS = 7 * 24 * 3600  # a finished Job
SPOT_GRACE, GRACE = 25, 120  # seconds from SIGTERM to SIGKILL; a spot node is gone sooner whatever is asked for
SYNC_SECONDS = "5"  # an object may be replaced once a second, and a sync of a mounted file replaces its object
SHARED_MEMORY = "2Gi"  # counts against the memory limit
SMALL = {"cpu": "500m", "ephemeral-storage": "1Gi"}  # of the commands that need no GPU, besides gke.stage_memory
LONGEST_SPEC = 120_000  # bytes; the kernel takes 128 KiB an environment variable

OURS = "app.kubernetes.io/managed-by"
COMMAND = "app.kubernetes.io/component"
QUEUE = "kueue.x-k8s.io/queue-name"
HASH = "nothing-dpo/config-sha256"
JOB_OF_POD = "batch.kubernetes.io/job-name"
INDEX_OF_POD = "batch.kubernetes.io/job-completion-index"

ACCELERATORS = {
    "L4": "nvidia-l4", "T4": "nvidia-tesla-t4", "A100": "nvidia-tesla-a100", "A100-40GB": "nvidia-tesla-a100",
    "A100-80GB": "nvidia-a100-80gb", "H100": "nvidia-h100-80gb", "H200": "nvidia-h200-141gb", "B200": "nvidia-b200",
}  # fmt: skip

# Staged writes make fsync as good as close; a streamed file is lost whole if the process is killed before it closes it.
# A directory is renamed object by object in a bucket without hierarchical names, which must be allowed.
MOUNT_OPTIONS = (
    "implicit-dirs",
    f"uid={USER}",
    f"gid={USER}",
    "metadata-cache:negative-ttl-secs:0",
    "write:enable-streaming-writes:false",
    "file-system:rename-dir-limit:10000",
)
# Of the sidecar that mounts the bucket: processor, memory, disk. No limit ("0") is refused beside Autopilot's GPUs.
SIDECAR = {"train": ("1", "1Gi", "10Gi"), "generate": ("250m", "256Mi", "1Gi"), "judge": ("250m", "256Mi", "1Gi")}


def job_name(identity: str) -> str:
    """The Job's name: the id of our job, so that it is understood in a cluster with other people's."""
    return f"nothing-dpo-{identity.removeprefix('gke-')}"


def render(identity: str, spec: Spec, gke: GkeSection) -> list[dict[str, Any]]:
    """Everything that is created, as plain values: the Job, and perhaps its Service.

    Raises:
        UserError: the settings are not those of anything that could run.
    """
    name = job_name(identity)
    made = [job(name, spec, gke), *([service(name, spec, gke)] if spec.nodes > 1 else [])]
    plain: list[dict[str, Any]] = k8s.ApiClient().sanitize_for_serialization(made)
    return plain


def job(name: str, spec: Spec, gke: GkeSection) -> k8s.V1Job:
    """The Job of one command."""
    several = {"completion_mode": "Indexed", "completions": spec.nodes, "parallelism": spec.nodes}
    return k8s.V1Job(
        api_version="batch/v1",
        kind="Job",
        metadata=k8s.V1ObjectMeta(
            name=name,
            namespace=gke.namespace,
            labels=_labels(spec) | ({QUEUE: gke.queue_name} if gke.queue_name else {}),
            annotations={HASH: spec.hash},
        ),
        spec=k8s.V1JobSpec(
            backoff_limit=2 * spec.nodes,  # one node's fault ends the others too
            pod_failure_policy=_failure_policy(spec),
            pod_replacement_policy="Failed",
            ttl_seconds_after_finished=KEEP_SECONDS,
            active_deadline_seconds=round(gke.deadline_hours * 3600),
            suspend=True if gke.queue_name else None,  # until Kueue admits it
            template=k8s.V1PodTemplateSpec(
                metadata=k8s.V1ObjectMeta(labels=_labels(spec), annotations=_mount_annotations(spec)),
                spec=_pod(name, spec, gke),
            ),
            **(several if spec.nodes > 1 else {}),
        ),
    )


def service(name: str, spec: Spec, gke: GkeSection) -> k8s.V1Service:
    """The headless Service by which the nodes of a run find the first of them."""
    return k8s.V1Service(
        api_version="v1",
        kind="Service",
        metadata=k8s.V1ObjectMeta(name=name, namespace=gke.namespace, labels=_labels(spec)),
        spec=k8s.V1ServiceSpec(
            cluster_ip="None",
            selector={JOB_OF_POD: name},
            publish_not_ready_addresses=True,
            ports=[k8s.V1ServicePort(name="rendezvous", port=PORT)],
        ),
    )


def sent(spec: Spec, gke: GkeSection) -> Spec:
    """The spec as it goes there: without paths of this machine, and with the cluster's own server to sample from."""
    settings = msgspec.convert(spec.config, Config)
    if spec.command == "generate" and settings.generate.url is None:
        settings.generate.url = gke.serve_url
    uploads = [msgspec.structs.replace(upload, here="") for upload in spec.uploads]
    return msgspec.structs.replace(spec, config=as_dict(settings), results={}, uploads=uploads, owner="")


def needs(spec: Spec) -> list[str]:
    """Files there without which the command can't begin."""
    config = msgspec.convert(spec.config, Config)
    if spec.command == "judge":
        return [f"{config.data}/completions.jsonl"]
    if spec.command == "generate":
        return [_file(config.generate.prompts, "val.jsonl")]
    source = config.data if spec.stage == "dpo" else config.generate.prompts
    files = [_file(spec.data or source, "train.jsonl")]
    if spec.stage == "dpo" and config.model.adapter:
        files.append(f"{config.model.adapter}/adapter_model.safetensors")
    return files


def secrets(spec: Spec, gke: GkeSection) -> dict[str, str]:
    """Environment variable, which is also the key in the secret -> name of the secret."""
    wanted: dict[str, str | None] = {
        "train": training_secrets(spec, {"HF_TOKEN": gke.hf_secret, "WANDB_API_KEY": gke.wandb_secret}),
        "generate": {},
        "judge": {"OPENAI_API_KEY": gke.openai_secret},
    }[spec.command]
    return {variable: secret for variable, secret in wanted.items() if secret}


def accelerator(gpu: str) -> str:
    """GKE's name of a GPU.

    Raises:
        UserError: there is none of that name.
    """
    if gpu.startswith("nvidia-"):
        return gpu
    if gpu.upper() not in ACCELERATORS:
        raise UserError(f"GKE has no GPU '{gpu}'", where="--gpu", hint=f"one of: {', '.join(ACCELERATORS)}")
    return ACCELERATORS[gpu.upper()]


def _file(path: str, name: str) -> str:
    return path if PurePosixPath(path).suffix else f"{path}/{name}"


def _labels(spec: Spec) -> dict[str, str]:
    return {OURS: "nothing-dpo", COMMAND: spec.command}


def _mount_annotations(spec: Spec) -> dict[str, str]:
    limits = zip(("cpu", "memory", "ephemeral-storage"), SIDECAR[spec.command], strict=True)
    return {"gke-gcsfuse/volumes": "true"} | {f"gke-gcsfuse/{what}-limit": limit for what, limit in limits}


def _failure_policy(spec: Spec) -> k8s.V1PodFailurePolicy:
    """Preemption does not count, and what would only end the same way is not tried again. The first match decides."""
    disrupted = k8s.V1PodFailurePolicyOnPodConditionsPattern(type="DisruptionTarget", status="True")
    return k8s.V1PodFailurePolicy(
        rules=[
            k8s.V1PodFailurePolicyRule(action="Ignore", on_pod_conditions=[disrupted]),
            # Of several machines those that are left are ended by SIGTERM, without a disruption of their own; and an
            # attempt that has saved a checkpoint before it failed has come further than the one before.
            _on_exit("Ignore", spec.command, "In", [TRY_AGAIN, Exit.PREEMPTED]),
            _on_exit("FailJob", spec.command, "In", [Exit.FAILED, Exit.USAGE, Exit.GATE, Exit.BUDGET]),
            _on_exit("FailJob", "wait-for-data", "NotIn", [0]),
        ]
    )


def _on_exit(action: str, container: str, operator: str, codes: list[int]) -> k8s.V1PodFailurePolicyRule:
    requirement = k8s.V1PodFailurePolicyOnExitCodesRequirement(
        container_name=container, operator=operator, values=[int(code) for code in codes]
    )
    return k8s.V1PodFailurePolicyRule(action=action, on_exit_codes=requirement)


def _pod(name: str, spec: Spec, gke: GkeSection) -> k8s.V1PodSpec:
    training = spec.command == "train"
    return k8s.V1PodSpec(
        restart_policy="Never",
        service_account_name=gke.service_account,
        automount_service_account_token=False,
        # Of the pod, not of the Job: the wait for a node costs nothing. The worker itself ends at the cap.
        active_deadline_seconds=round(spec.seconds + GRACE_SECONDS) if spec.seconds is not None else None,
        termination_grace_period_seconds=SPOT_GRACE if training and gke.spot else GRACE,
        subdomain=name if spec.nodes > 1 else None,
        node_selector=_node_selector(spec, gke) if training else None,
        tolerations=_tolerations(gke) if training else None,
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=USER,
            run_as_group=USER,
            fs_group=USER,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        init_containers=[_wait_for_data(spec, gke)],
        containers=[_container(name, spec, gke)],
        volumes=_volumes(spec, gke),
    )


def _node_selector(spec: Spec, gke: GkeSection) -> dict[str, str]:
    """What draws the pod to a node. A compute class decides on accelerator and spot itself."""
    if gke.compute_class:
        return {"cloud.google.com/compute-class": gke.compute_class}
    wanted = {"cloud.google.com/gke-accelerator": accelerator(spec.gpu or gke.gpu)}
    wanted |= {"cloud.google.com/gke-spot": "true"} if gke.spot else {}
    return wanted | ({"cloud.google.com/gke-gpu-driver-version": gke.gpu_driver} if gke.gpu_driver else {})


def _tolerations(gke: GkeSection) -> list[k8s.V1Toleration]:
    """Taints that do not keep the pod away; they do not draw it to a node either."""
    gpu = k8s.V1Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule")
    spot = k8s.V1Toleration(key="cloud.google.com/gke-spot", operator="Equal", value="true", effect="NoSchedule")
    return [gpu, spot] if gke.spot else [gpu]


def _volumes(spec: Spec, gke: GkeSection) -> list[k8s.V1Volume]:
    if not gke.bucket:
        raise UserError(
            "no bucket for data and results",
            where="gke.bucket",
            hint=f"gcloud storage buckets create gs://NAME --location {gke.region} --uniform-bucket-level-access",
        )
    bucket = k8s.V1CSIVolumeSource(
        driver="gcsfuse.csi.storage.gke.io",
        volume_attributes={"bucketName": gke.bucket, "mountOptions": ",".join(MOUNT_OPTIONS)},
    )
    cache = k8s.V1EmptyDirVolumeSource(size_limit=_resources(spec, gke)["ephemeral-storage"])
    volumes = [k8s.V1Volume(name="bucket", csi=bucket), k8s.V1Volume(name="cache", empty_dir=cache)]
    if spec.command == "train":
        memory = k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=SHARED_MEMORY)
        volumes.append(k8s.V1Volume(name="shared-memory", empty_dir=memory))
    return volumes


def _resources(spec: Spec, gke: GkeSection) -> dict[str, str]:
    """Requests, and limits as well: a GPU's must be equal, and a pod that takes no more than it asked for stays."""
    if spec.command != "train":
        return SMALL | {"memory": gke.stage_memory}
    return {"cpu": gke.cpu, "memory": gke.memory, "ephemeral-storage": gke.disk, "nvidia.com/gpu": str(spec.gpus)}


def _wait_for_data(spec: Spec, gke: GkeSection) -> k8s.V1Container:
    """Waits, within bounds, for what another command may still be writing."""
    files = needs(spec)
    there = " && ".join(f'test -s "${place}"' for place in range(1, len(files) + 1))
    small = {"cpu": "100m", "memory": "64Mi"}
    return k8s.V1Container(
        name="wait-for-data",
        image=image(spec, gke),
        command=["timeout", str(WAIT_SECONDS), "sh", "-c", f"until {there}; do sleep 5; done", "wait", *files],
        resources=k8s.V1ResourceRequirements(requests=small, limits=small),
        security_context=_confined(),
        volume_mounts=[k8s.V1VolumeMount(name="bucket", mount_path=VOLUME)],
    )


def _container(name: str, spec: Spec, gke: GkeSection) -> k8s.V1Container:
    wanted = _resources(spec, gke)
    mounts = {"bucket": VOLUME, "cache": CACHE} | ({"shared-memory": "/dev/shm"} if spec.command == "train" else {})
    return k8s.V1Container(
        name=spec.command,
        image=image(spec, gke),
        # No shell, which would hide its exit code and keep SIGTERM from it.
        command=["python", "-m", "dpo_cli.jobs.worker"],
        env=[
            # Kubernetes would substitute `$(NAME)` in a value.
            *(
                k8s.V1EnvVar(name=key, value=value.replace("$", "$$"))
                for key, value in _environment(name, spec, gke).items()
            ),
            *(_from_secret(variable, secret) for variable, secret in secrets(spec, gke).items()),
            *([k8s.V1EnvVar(name="NODE_RANK", value_from=_index())] if spec.nodes > 1 else []),
        ],
        resources=k8s.V1ResourceRequirements(requests=wanted, limits=wanted),
        security_context=_confined(),
        volume_mounts=[k8s.V1VolumeMount(name=volume, mount_path=path) for volume, path in mounts.items()],
    )


def _environment(name: str, spec: Spec, gke: GkeSection) -> dict[str, str]:
    text = msgspec.json.format(msgspec.json.encode(sent(spec, gke), order="deterministic"), indent=2).decode()
    if len(text.encode()) > LONGEST_SPEC:
        raise UserError("the settings and the list of inputs are too long to send", where=name, hint="fewer files")
    # The first pod, whose lines are shown, holds rank 0.
    first = {"MASTER_ADDR": f"{name}-0.{name}"} if spec.nodes > 1 else {}
    return {
        SPEC: text,
        "HOME": CACHE,
        "HF_HOME": f"{CACHE}/huggingface",
        "PYTHONUNBUFFERED": "1",
        SYNC: SYNC_SECONDS,
    } | first


def _from_secret(variable: str, secret: str) -> k8s.V1EnvVar:
    key = k8s.V1SecretKeySelector(name=secret, key=variable)
    return k8s.V1EnvVar(name=variable, value_from=k8s.V1EnvVarSource(secret_key_ref=key))


def _index() -> k8s.V1EnvVarSource:
    field = k8s.V1ObjectFieldSelector(field_path=f"metadata.annotations['{INDEX_OF_POD}']")
    return k8s.V1EnvVarSource(field_ref=field)


def _confined() -> k8s.V1SecurityContext:
    return k8s.V1SecurityContext(allow_privilege_escalation=False, capabilities=k8s.V1Capabilities(drop=["ALL"]))


def image(spec: Spec, gke: GkeSection) -> str:
    """The image of a command, which its digest pins.

    Raises:
        UserError: there is none, or only a tag names it.
    """
    light = spec.command != "train" and gke.stage_image is not None
    where, name = ("gke.stage_image", gke.stage_image) if light else ("gke.image", gke.image)
    if not name:
        hint = "bash examples/gke/build.sh IMAGE prints it, then --set gke.image=HOST/PROJECT/REPOSITORY/NAME@sha256:…"
        raise UserError("no image to run", where=where, hint=hint)
    if not re.search(r"@sha256:[0-9a-f]{64}$", name) and not gke.allow_tag:
        raise UserError(
            f"'{name}' has no digest: a pod that replaces another could run another image",
            where=where,
            hint=f"gcloud artifacts docker images describe {name} shows it; or --set gke.allow_tag=true",
        )
    return name


def driver_line(spec: Spec, gke: GkeSection) -> str | None:
    """What the image's CUDA asks of the nodes' driver; None where it is asked for, or nothing is trained."""
    if spec.command != "train" or gke.gpu_driver == "latest":
        return None
    pinned = re.search(r"^nvidia-cublas==(\d+)", LOCK.read_text(), re.MULTILINE)
    if pinned is None or int(pinned[1]) not in DRIVER_OF_CUDA:
        return None
    least = DRIVER_OF_CUDA[int(pinned[1])]
    return (
        f"PyTorch in the image is built for CUDA {pinned[1]}, which needs driver {least} or newer; GKE's default "
        "has been older: --set gke.gpu_driver=latest asks for such nodes, and a run without a card ends in seconds"
    )
