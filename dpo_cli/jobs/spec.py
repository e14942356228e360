"""What a job is to do: the command, every path as it is on the volume, and the files that it reads from here.

Inputs that are on this machine are uploaded to paths made from their content, so that the same input is sent once;
what is not here is looked for there, at the path that it has in the settings. Needs no backend and no torch.
"""

import hashlib
import os
import re
import socket
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
from msgspec import Struct

from dpo_cli.config.resolve import as_dict
from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError

Command = Literal["train", "generate", "judge"]


VOLUME = "/vol"


# What each command reads from the data folder, and what it leaves there.
READ = {"train": ("train.jsonl", "val.jsonl"), "generate": (), "judge": ("completions.jsonl",)}


MADE = {"train": (), "generate": ("completions.jsonl",), "judge": ("judgments.jsonl", "train.jsonl", "val.jsonl")}


NOT_HOME = ("checkpoints",)  # of a run's folder: gigabytes, of use where they are


class Upload(Struct, frozen=True):
    """One file that must be there before the work starts; its place is made from its content."""

    here: str
    there: str
    sha256: str


class Spec(Struct, kw_only=True):
    """What is to be run elsewhere.

    `config` is the resolved configuration and `data` the data given, both with paths as they are there; `results`
    says where what comes of it belongs here (path there -> path here), `base` the base model's name here; `needs` are
    inputs that are not here, by their paths there, where they must be already. `seeds` are uploaded rows that the work
    goes on with (path there -> the file that they are added to). `fresh` is unique to the submission that asked to
    start over, so that a second attempt of it does not start over again; `submission` is unique to each
    that is capped, and `owner` says where it came from. `seconds` caps how long it may hold its cards, attempts added
    up.
    """

    command: Command
    stage: Literal["dpo", "sft"] = "dpo"
    name: str
    config: dict[str, Any]
    data: str | None = None
    limit: int | None = None
    fresh: str | None = None
    submission: str = ""
    owner: str = ""
    seconds: float | None = None
    gpu: str | None = None
    gpus: int = 1
    nodes: int = 1
    uploads: list[Upload] = []
    needs: list[str] = []
    seeds: dict[str, str] = {}
    results: dict[str, str] = {}
    base: str | None = None

    def identity(self) -> dict[str, Any]:
        """What makes it another piece of work: neither where files are here, nor whether it starts over."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        for key in ("fresh", "results", "base", "needs", "submission", "owner", "seconds"):
            plain.pop(key)
        plain["config"].pop("plan", None)  # prices and caps make no other work
        plain["uploads"] = {upload.there: upload.sha256 for upload in self.uploads}
        return plain

    @property
    def hash(self) -> str:
        """SHA-256 of `identity`, in hexadecimal."""
        return _digest(msgspec.json.encode(self.identity(), order="deterministic"))


def make(
    config: Config,
    command: Command,
    *,
    name: str | None = None,
    stage: Literal["dpo", "sft"] = "dpo",
    data: Path | None = None,
    limit: int | None = None,
    fresh: bool = False,
    gpu: str | None = None,
    gpus: int = 1,
    nodes: int = 1,
    seconds: float | None = None,
    volume: str | None = VOLUME,
) -> Spec:
    """The spec of a command.

    Args:
        config: every setting, with paths as they are here.
        command: what to run.
        name: of the run; unset: the stage, or the command.
        stage: of `train`.
        data: folder or file given instead of the configured data.
        limit: at most so many rows.
        fresh: start over.
        gpu: type of the card, as the backend names it.
        gpus: cards a node.
        nodes: machines.
        seconds: how long it may hold its cards, all attempts together; None: no cap.
        volume: where the volume is mounted there; None: the work runs on this machine, with its paths.
    """
    name = name or (stage if command == "train" else command)
    if PurePosixPath(name).name != name:
        raise UserError(f"'{name}' is no name for a run", hint="--name takes a folder name without '/'")
    settings = msgspec.convert(as_dict(config), Config)  # a copy
    spec = Spec(
        command=command,
        stage=stage,
        name=name,
        config={},
        limit=limit,
        gpu=gpu,
        gpus=gpus,
        nodes=nodes,
        data=str(data.absolute()) if data else None,
        fresh=os.urandom(8).hex() if fresh else None,
        owner=f"{os.environ.get('USER', 'somebody')}@{socket.gethostname()}:{Path.cwd()}",
        seconds=seconds,
        base=config.model.base,
    )
    if volume is not None:
        _move(spec, settings, data, _Places(PurePosixPath(volume), spec))
    spec.config = as_dict(settings)
    return spec


def identity(backend: str, spec: Spec) -> str:
    """The id of a job: the same for the same backend, command and run name. A valid name of a Kubernetes object."""
    plain = f"{backend}-{spec.command}-{spec.name}"
    safe = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    return safe if safe == plain and len(safe) <= 50 else f"{safe[:41].rstrip('-')}-{_digest(plain.encode())[:8]}"


def training_secrets(spec: Spec, secrets: dict[str, str | None]) -> dict[str, str | None]:
    """Those of a training job's secrets that it has a use for, by their variable.

    A base that is uploaded, or lies on the volume, needs no token of the Hub; no other tracker needs wandb's key.
    """
    section = spec.config["train" if spec.stage == "dpo" else "sft"]
    unused = {"HF_TOKEN"} if spec.config["model"]["base"].startswith("/") else set()
    if section.get("report_to") not in (None, "wandb"):
        unused.add("WANDB_API_KEY")
    return {variable: secret for variable, secret in secrets.items() if variable not in unused}


def comes_home(path: str) -> bool:
    """Whether a file of a result's folder, by its path in there, is fetched."""
    parts = PurePosixPath(path).parts
    return parts[0] not in NOT_HOME and not any(part.startswith(".") for part in parts)


class _Places:
    """Where files are there."""

    def __init__(self, volume: PurePosixPath, spec: Spec) -> None:
        self.volume = volume
        self.spec = spec

    def same(self, path: str) -> str:
        """The place of a path that is configured here: relative ones stand under the volume."""
        if PurePosixPath(path).is_relative_to(self.volume):
            return path
        here = Path(path).resolve()
        inside = here.is_relative_to(Path.cwd())
        return str(self.volume / (here.relative_to(Path.cwd()) if inside else here.name))

    def take(self, path: str, names: Collection[str] | None = None) -> str:
        """An input's place: made from its content if it is here, else the same path, where it must be already.

        Args:
            path: a file, or a folder whose name stays.
            names: files of the folder that are the input, the first of which must be there; None: all of them.
        """
        here = Path(path).resolve()
        below = [file for file in _files(here) if names is None or _is_named(file, here, names)]
        files = [here] if here.is_file() else below
        if not files:
            place = self.same(path)
            lacks = next(iter(names)) if names and not PurePosixPath(place).suffix else None
            self.spec.needs.append(f"{place}/{lacks}" if lacks else place)
            return place
        hashes = {str(file.relative_to(here.parent)): _hash_file(file) for file in files}
        content = _digest(msgspec.json.encode(hashes, order="deterministic"))
        there = self.volume / "uploads" / content[:16]
        self.spec.uploads += [
            Upload(str(here.parent / name), str(there / name), digest) for name, digest in hashes.items()
        ]
        return str(there / here.name)

    def seed(self, file: Path, there: str) -> None:
        """Rows to go on with, if there are any here."""
        if file.is_file():
            self.spec.seeds[self.take(str(file))] = f"{there}/{file.name}"


def _move(spec: Spec, config: Config, data: Path | None, places: _Places) -> None:
    """Turn every path that the command reads or writes into the one there; note uploads and results."""
    runs, config.runs = config.runs, places.same(config.runs)
    if Path(config.model.base).is_dir():
        config.model.base = places.take(config.model.base)
    if spec.command == "train":
        spec.results[f"{config.runs}/{spec.name}"] = str(Path(runs) / spec.name)
        _move_training(spec, config, data, places)
        return
    home, read = Path(config.data), READ[spec.command]
    if spec.command == "generate":
        config.generate.prompts = places.take(config.generate.prompts, ("val.jsonl",))
        if config.generate.url is None and config.model.adapter:  # sampled there
            config.model.adapter = places.take(config.model.adapter)
    config.data = places.take(config.data, read) if read else places.same(config.data)
    if config.judge.rubric:
        config.judge.rubric = places.take(config.judge.rubric)
    places.seed(home / MADE[spec.command][0], config.data)
    spec.results |= {f"{config.data}/{name}": str(home / name) for name in MADE[spec.command]}


def _move_training(spec: Spec, config: Config, data: Path | None, places: _Places) -> None:
    model = config.model
    if data is not None:
        spec.data = places.take(str(data), READ["train"])
    elif spec.stage == "dpo":
        config.data = places.take(config.data, READ["train"])
    else:
        config.generate.prompts = places.take(config.generate.prompts, READ["train"])
    if spec.stage == "dpo":
        made, model.dpo_adapter = model.dpo_adapter, places.same(model.dpo_adapter)
        spec.results[model.dpo_adapter] = made
        model.adapter = places.take(model.adapter) if model.adapter else None
    elif model.adapter:
        made, model.adapter = model.adapter, places.same(model.adapter)
        spec.results[model.adapter] = made


def _is_named(file: Path, folder: Path, names: Collection[str]) -> bool:
    """Whether a file lies at the top of a folder under one of the names: those further down are not read."""
    return file.parent == folder and file.name in names


def _files(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts))


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
