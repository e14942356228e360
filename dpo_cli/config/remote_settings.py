"""Settings of what runs elsewhere: the vLLM server, a Job on GKE, an app on Modal."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from dpo_cli.config.field_types import Count, Positive, Quantity, Share
from dpo_cli.config.field_types import description as _doc

Driver = Literal["default", "latest"]
ServedType = Literal["auto", "half", "float16", "bfloat16", "float", "float32"]


class ServeSection(Struct, kw_only=True):
    """The vLLM server that serves both adapters."""

    host: Annotated[str, _doc("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=1024, le=65535), _doc("Port to listen on; vLLM takes none below 1024.")] = 8000
    dtype: Annotated[ServedType, _doc("vLLM's weight type.")] = "auto"
    max_model_len: Annotated[Count, _doc("Longest context, in tokens.")] = 4096
    gpu_memory_utilization: Annotated[Share, _doc("Share of the card that vLLM may take.")] = 0.9
    chat_template: Annotated[str | None, _doc("Chat template file; unset: the base's own.")] = None
    runtime_loading: Annotated[bool, _doc("Let adapters be loaded while it runs; whoever reaches the port may.")] = (
        False
    )
    arguments: Annotated[
        dict[str, Any], _doc("More of vLLM's flags, by name without dashes; they win over those chosen here.")
    ] = msgspec.field(default_factory=dict)
    image: Annotated[str, _doc("vLLM's image, for k8s and compose; its version, for modal.")] = (
        "vllm/vllm-openai:v0.32.0"
    )


class GkeSection(Struct, kw_only=True):
    """`--backend gke`: the cluster, and what a Job asks it for."""

    project: Annotated[str | None, _doc("Google Cloud project, for the commands that are suggested.")] = None
    region: Annotated[str, _doc("Region of cluster and bucket, likewise.")] = "us-central1"
    context: Annotated[str | None, _doc("Context of the kubeconfig; unset: the current one.")] = None
    namespace: Annotated[str, _doc("Namespace of the Jobs.")] = "default"
    bucket: Annotated[str | None, _doc("Cloud Storage bucket that is mounted at /vol.")] = None
    image: Annotated[str | None, _doc("Image by digest, of examples/gke/Dockerfile: HOST/PATH@sha256:...")] = None
    allow_tag: Annotated[bool, _doc("Take an image without a digest; it may change between two pods of a Job.")] = False
    service_account: Annotated[str, _doc("Kubernetes service account that may use the bucket.")] = "nothing-dpo"
    gpu: Annotated[str, _doc("Card.")] = "L4"
    spot: Annotated[bool, _doc("Spot nodes: a third of the price, taken away at any time; training goes on after.")] = (
        True
    )
    gpu_driver: Annotated[Driver | None, _doc("Nodes of this driver, default or latest; unset: any.")] = None
    stage_image: Annotated[str | None, _doc("Light image of generate and judge, by digest; unset: image.")] = None
    cpu: Annotated[Quantity, _doc("Processors for training.")] = "4"
    memory: Annotated[Quantity, _doc("Memory for training, 2Gi of it shared between processes.")] = "24Gi"
    stage_memory: Annotated[Quantity, _doc("Memory of generate and judge, which need no GPU.")] = "1Gi"
    disk: Annotated[Quantity, _doc("Disk for training: the base model and caches.")] = "30Gi"
    deadline_hours: Annotated[Positive, _doc("Hours after which a Job is ended, the wait for a node included.")] = 72.0
    queue_name: Annotated[str | None, _doc("Kueue queue that admits the Job.")] = None
    compute_class: Annotated[str | None, _doc("GKE compute class that decides on nodes, instead of gpu and spot.")] = (
        None
    )
    hf_secret: Annotated[str | None, _doc("Secret with the key HF_TOKEN; none: without.")] = "hf-secret"
    wandb_secret: Annotated[str | None, _doc("Secret with the key WANDB_API_KEY; none: without.")] = "wandb-secret"
    openai_secret: Annotated[str | None, _doc("Secret with the key OPENAI_API_KEY; none: without.")] = "openai-secret"
    serve_url: Annotated[str, _doc("Endpoint in the cluster to generate with, where generate.url is not set.")] = (
        "http://nothing-gpt-serve:8000/v1"
    )


class ModalSection(Struct, kw_only=True):
    """`--backend modal`; Modal's client checks none of the bounds."""

    app: Annotated[str, _doc("Name of the app.")] = "nothing-gpt-dpo-train"
    gpu: Annotated[str, _doc("Card to train on; --gpus says how many.")] = "L4"
    timeout: Annotated[int, Meta(ge=1, le=86400), _doc("Seconds that one attempt may take.")] = 86400
    startup_timeout: Annotated[int, Meta(ge=1, le=86400), _doc("Seconds that a container may take to start.")] = 1800
    retries: Annotated[int, Meta(ge=0, le=10), _doc("Further attempts after a failure or a timeout.")] = 10
    volume: Annotated[str, _doc("Volume that is mounted at /vol; created if missing.")] = "nothing-gpt-vol"
    cache_volume: Annotated[str, _doc("Volume of downloaded models; created if missing.")] = "nothing-gpt-hf-cache"
    hf_secret: Annotated[str | None, _doc("Secret that holds HF_TOKEN; none: public models only.")] = "hf-secret"
    wandb_secret: Annotated[str | None, _doc("Secret that holds WANDB_API_KEY; none: no tracking.")] = "wandb-secret"
    judge_secret: Annotated[str | None, _doc("Secret that holds OPENAI_API_KEY, for judge.")] = "openai-secret"
