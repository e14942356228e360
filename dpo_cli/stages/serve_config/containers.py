"""A plan as text for a machine elsewhere: Kubernetes, Modal, Compose.

What lies in a folder here lies under `/vol` there, at the same relative path, where `push` and the backends put it; a
path outside the working folder keeps its last part. vLLM's image is pinned by `serve.image`. Not covered: more than one
GPU or replica.
"""

import json
import math
import shlex
from pathlib import Path, PurePosixPath
from typing import Any

from msgspec.structs import replace

from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import absolute
from dpo_cli.stages.serve_config.formats import flags
from dpo_cli.stages.serve_config.plan import ServePlan

NAME = "nothing-gpt-serve"
VOLUME = "/vol"
PORT = 8000
START_SECONDS = 1200  # a cold node pulls the image and the base model
USER = 2000  # any but root


def as_k8s(plan: ServePlan, config: Config) -> str:
    """A Deployment on one L4 and the Service before it, for GKE; the adapters come from a bucket."""
    if config.gke.bucket is None:
        raise UserError("no bucket to serve the adapters from", where="gke.bucket", hint="--set gke.bucket=NAME")
    labels = {"app": NAME}
    metadata = {"name": NAME, "namespace": config.gke.namespace, "labels": labels}
    mount = {"gke-gcsfuse/volumes": "true", "gke-gcsfuse/cpu-limit": "1", "gke-gcsfuse/memory-limit": "1Gi"}
    pod = {
        "nodeSelector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        "serviceAccountName": config.gke.service_account,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(_moved(plan)[0], config)],
        "volumes": [
            {
                "name": "vol",
                "csi": {
                    "driver": "gcsfuse.csi.storage.gke.io",
                    "readOnly": True,
                    "volumeAttributes": {
                        "bucketName": config.gke.bucket,
                        "mountOptions": f"implicit-dirs,uid={USER},gid={USER}",
                    },
                },
            },
            {"name": "cache", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        ],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a rolling update would wait for a second GPU
            "progressDeadlineSeconds": START_SECONDS + 600,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels, "annotations": mount}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {"selector": labels, "ports": [{"name": "http", "port": PORT, "targetPort": "http"}]},
    }
    return "---\n".join(map(_yaml, (deployment, service))).rstrip("\n")


def _container(plan: ServePlan, config: Config) -> dict[str, Any]:
    environment: list[dict[str, Any]] = [
        {"name": name, "value": _literal(value)}
        for name, value in (
            {"HOME": "/cache", "USER": "vllm", "HF_HOME": "/cache/huggingface"} | plan.environment
        ).items()
    ]
    if config.gke.hf_secret:
        key = {"name": config.gke.hf_secret, "key": "HF_TOKEN"}
        environment.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": key}})
    health = {"httpGet": {"path": "/health", "port": "http"}}
    return {
        "name": "vllm",
        "image": config.serve.image,
        "command": ["vllm", "serve", _literal(plan.model)],
        "args": [_literal(word) for words in flags(plan) for word in words],
        "env": environment,
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {
            "requests": {"cpu": "4", "memory": "16Gi", "ephemeral-storage": "40Gi", "nvidia.com/gpu": "1"},
            "limits": {"memory": "24Gi", "ephemeral-storage": "40Gi", "nvidia.com/gpu": "1"},
        },
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "startupProbe": health | {"periodSeconds": 10, "failureThreshold": START_SECONDS // 10},
        "readinessProbe": health | {"periodSeconds": 5},
        "livenessProbe": health | {"periodSeconds": 15, "timeoutSeconds": 10, "failureThreshold": 4},
        "volumeMounts": [
            {"name": "vol", "mountPath": VOLUME, "readOnly": True},
            {"name": "cache", "mountPath": "/cache"},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }


def as_compose(plan: ServePlan, config: Config) -> str:
    """A Compose file for a machine with a GPU; the folders of this machine are mounted, readable alone."""
    moved, places = _moved(plan)
    service: dict[str, Any] = {
        "image": config.serve.image,
        "entrypoint": ["vllm", "serve"],
        "command": [_literal(word) for words in ([moved.model], *flags(moved)) for word in words],
        "environment": {"HF_TOKEN": "${HF_TOKEN:-}", "HF_HOME": "/cache/huggingface"} | plan.environment,
        "ports": [f"{config.serve.host}:{config.serve.port}:{PORT}"],
        "volumes": [
            {"type": "bind", "source": _literal(here), "target": there, "read_only": True}
            for here, there in places.items()
        ]
        + [{"type": "volume", "source": "cache", "target": "/cache"}],
        "shm_size": "2gb",
        "deploy": {
            "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}}
        },
        "healthcheck": {
            "test": ["CMD", "curl", "-sf", f"http://localhost:{PORT}/health"],
            "interval": "10s",
            "timeout": "5s",
            "start_period": f"{START_SECONDS}s",
        },
        "restart": "unless-stopped",
    }
    return _yaml({"name": NAME, "services": {"vllm": service}, "volumes": {"cache": {}}}).rstrip("\n")


def as_modal(plan: ServePlan, config: Config) -> str:
    """A Modal app: `modal deploy FILE`."""
    moved, _ = _moved(plan)
    version = config.serve.image.rpartition(":v")[2]
    command = json.dumps(["vllm", "serve", moved.model, *(word for words in flags(moved) for word in words)], indent=4)
    secrets = f"[modal.Secret.from_name({config.modal.hf_secret!r})]" if config.modal.hf_secret else "[]"
    environment = {"HF_HUB_CACHE": "/cache"} | plan.environment
    return f'''\
"""vLLM with the adapters, on Modal: `modal deploy THIS_FILE`. Written by `nothing-dpo serve-config --format modal`.

Whoever knows its URL can use it, unless the secret that it is given also holds VLLM_API_KEY.
"""

import subprocess

import modal

COMMAND = {command}

image = modal.Image.debian_slim(python_version="3.12").uv_pip_install({f"vllm=={version}"!r}).env({environment!r})
app = modal.App("{NAME}")
volume = modal.Volume.from_name({config.modal.volume!r}, create_if_missing=True)
cache = modal.Volume.from_name({config.modal.cache_volume!r}, create_if_missing=True)


@app.function(
    image=image,
    gpu="L4",
    volumes={{"{VOLUME}": volume, "/cache": cache}},
    secrets={secrets},
    scaledown_window=300,
    timeout=86400,
)
@modal.concurrent(max_inputs=64)
@modal.web_server(port={PORT}, startup_timeout={START_SECONDS})
def serve():
    subprocess.Popen(COMMAND)'''


def bring(plan: ServePlan, config: Config, form: str) -> list[str]:
    """The commands that bring what lies on this machine to where a format's server reads it.

    Args:
        plan: what to serve.
        config: names the volume or the bucket.
        form: `k8s` or `modal`; any other reads it here.
    """
    root = {"k8s": f"gs://{config.gke.bucket}", "modal": f"modal://{config.modal.volume}"}.get(form)
    if root is None:
        return []
    copy = "gcloud storage cp -r" if form == "k8s" else f"modal volume put {shlex.quote(config.modal.volume)}"
    commands = []
    for here, there in _moved(plan)[1].items():
        place = PurePosixPath(there).relative_to(VOLUME)
        target = f"{root}/{place.parent}/" if form == "k8s" else f"/{place}"
        commands.append(f"{copy} {shlex.quote(here)} {shlex.quote(target.replace('/./', '/'))}")
    return commands


def _moved(plan: ServePlan) -> tuple[ServePlan, dict[str, str]]:
    """The plan with its paths as they are there, listening to the network; and each folder here -> there."""
    places: dict[str, str] = {}

    def there(path: str) -> str:
        if not Path(path).is_absolute() or path.startswith(f"{VOLUME}/"):
            return path  # a Hub id, or there already
        inside = Path(path).relative_to(absolute(".")) if Path(path).is_relative_to(absolute(".")) else None
        places[path] = f"{VOLUME}/{inside.as_posix() if inside else Path(path).name}"
        if list(places.values()).count(places[path]) > 1:
            raise UserError("two folders outside this one have the same name", where=path, hint="rename one")
        return places[path]

    model = there(plan.model)
    modules = [
        {"name": name, "path": there(str(adapter.path)), "base_model_name": plan.whole or model}
        for name, adapter in plan.adapters.items()
    ]
    moved = {"host": "0.0.0.0", "port": PORT} | ({"lora-modules": modules} if modules else {})
    if "chat-template" in plan.arguments:
        moved["chat-template"] = there(str(plan.arguments["chat-template"]))
    return replace(plan, model=model, arguments=plan.arguments | moved), places


def _literal(word: str) -> str:
    """Compose would take `$NAME` for a variable, Kubernetes `$(NAME)`, which may be a secret of the pod's."""
    return word.replace("$", "$$")


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(content, Dumper=Plain, sort_keys=False, allow_unicode=True, width=math.inf)
