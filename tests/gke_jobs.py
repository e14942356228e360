"""What the tests of `--backend gke` share: settings, specs, and a bucket that Google's own client writes to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs.backends import _gke_render as rendering
from dpo_cli.jobs.spec import Spec

IMAGE = f"us-central1-docker.pkg.dev/project/nothing-dpo/nothing-dpo@sha256:{'0123456789abcdef' * 4}"
GKE = [f"gke.image={IMAGE}", "gke.bucket=runs", "gke.project=my-project",
       "train.allow_cpu=true", "sft.allow_cpu=true"]  # fmt: skip


def settings(*sets: str) -> Config:
    return resolve(sets=[*GKE, *sets], environment={}).config


def spec_of(config: Config, command: jobs_spec.Command = "train", **given: Any) -> Spec:
    return jobs_spec.make(config, command, gpu=config.gke.gpu if command == "train" else None, **given)


def rendered(config: Config, command: jobs_spec.Command = "train", **given: Any) -> list[dict[str, Any]]:
    spec = spec_of(config, command, **given)
    return rendering.render(jobs_spec.identity("gke", spec), spec, config.gke)


def pod(config: Config, command: jobs_spec.Command = "train", **given: Any) -> dict[str, Any]:
    found: dict[str, Any] = rendered(config, command, **given)[0]["spec"]["template"]["spec"]
    return found


class Bucket:
    """The bucket `runs` of an emulator."""

    def __init__(self) -> None:
        from google.cloud.storage import Client

        self.bucket: Any = Client().create_bucket("runs")

    def write(self, name: str, content: str | bytes = "x") -> None:
        self.bucket.blob(name).upload_from_string(content)

    def names(self) -> list[str]:
        return sorted(blob.name for blob in self.bucket.list_blobs())

    def to(self, folder: Path) -> None:
        """What mounting it would show."""
        for blob in self.bucket.list_blobs():
            path = folder / blob.name
            path.parent.mkdir(parents=True, exist_ok=True)
            blob.download_to_filename(path)

    def come(self, folder: Path) -> None:
        """What was written to the mount."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.bucket.blob(str(path.relative_to(folder))).upload_from_filename(path)


@contextmanager
def bucket_server() -> Iterator[Callable[[Any], Bucket]]:
    """What makes an empty bucket, and by a monkeypatch the environment in which Google's client finds it."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()

    def make(monkeypatch: Any) -> Bucket:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
        server.wipe()
        return Bucket()

    try:
        yield make
    finally:
        server.stop()
