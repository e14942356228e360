"""`--backend local`: a process of its own on this machine, whose log is a file beside the job's.

Used for `--detach` and for several GPUs; otherwise a command runs in the process that was started. The process holds a
lock for as long as it lives, so that a dead one is known as such whatever its number is used for now.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.errors import STOPPED, Exit, UserError
from dpo_cli.jobs import progress_lines, worker
from dpo_cli.jobs.registry import Job, Status, ended, folder
from dpo_cli.jobs.spec import Spec, identity
from dpo_cli.progress import Progress

VOLUME = None
POLL_SECONDS = 0.2


def gpu(config: Config) -> str | None:
    """No card is asked for: training takes the one that is there."""
    return None


def usd_per_hour(spec: Spec, config: Config) -> float:
    """0: this machine is not rented."""
    return 0.0


def render(spec: Spec, config: Config) -> str:
    """The process: its command and its spec."""
    command = worker.torchrun(spec) if spec.gpus * spec.nodes > 1 else _command()
    content = msgspec.json.format(msgspec.json.encode(spec), indent=2).decode()
    return f"{shlex.join(command)}\n\n{worker.SPEC}={content}"


def submit(spec: Spec, config: Config, progress: Progress) -> Job:
    """Start the process.

    Raises:
        UserError: the card that was asked for is not here, or more machines than this one.
    """
    if spec.nodes > 1:
        raise UserError("this is one machine", where="--nodes", hint="--backend gke")
    _check_card(spec)
    started = Job(id=identity("local", spec), backend="local", spec=spec)
    log, lock = _log(started, config), _lock(started, config)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output, lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        process = subprocess.Popen(
            _command(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[held.fileno()],
            env={**os.environ, worker.SPEC: msgspec.json.encode(spec).decode()},
        )
    started.handle = {"pid": str(process.pid), "log": str(log)}
    return started


def status(job: Job, config: Config) -> Status:
    """Running while its lock is held; else as the last line of its log says."""
    if _lives(job, config):
        return Status("running")
    if (last := _outcome(job, config)) is None:
        return Status("failed", Exit.FAILED, "the process ended without a word: killed, or out of memory")
    if last.exit_code in STOPPED:
        return Status("cancelled", last.exit_code, last.error)
    return ended(last.exit_code, last.error)


def card_seconds(job: Job, config: Config) -> float | None:
    """This machine costs nothing."""
    return None


def logs(job: Job, config: Config, follow: bool) -> Iterator[str]:
    """The lines of its log."""
    log = _log(job, config)
    if not log.exists():
        raise UserError("its log is gone", where=str(log))
    with log.open(errors="replace") as file:
        line = ""
        while True:
            alive = follow and _lives(job, config)  # asked before reading: what it wrote last is read still
            while piece := file.readline():
                line += piece
                if line.endswith("\n"):
                    yield line.rstrip("\n")
                    line = ""
            if not alive:
                break
            time.sleep(POLL_SECONDS)
        if line:
            yield line


def cancel(job: Job, config: Config) -> None:
    """Ask the process to save a checkpoint and end."""
    if _lives(job, config):
        os.kill(int(job.handle["pid"]), signal.SIGTERM)


def suspend(job: Job, config: Config, suspended: bool) -> None:
    """There is no pause here.

    Raises:
        UserError: always.
    """
    hint = f"nothing-dpo jobs cancel {job.id}; the same command goes on from its checkpoint"
    raise UserError(f"backend {job.backend} has no pause", where=job.id, hint=hint)


def fetch(job: Job, config: Config, into: Path, progress: Progress) -> None:
    """Everything is here already."""


def _command() -> list[str]:
    return [sys.executable, "-m", "dpo_cli.jobs.worker"]


def _log(job: Job, config: Config) -> Path:
    return folder(config) / f"{job.id}.log"


def _lock(job: Job, config: Config) -> Path:
    return folder(config) / f".{job.id}.running"


def _lives(job: Job, config: Config) -> bool:
    try:
        with _lock(job, config).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


def _outcome(job: Job, config: Config) -> progress_lines.Outcome | None:
    lines = (progress_lines.parse(text) for text in logs(job, config, follow=False))
    found = [line.outcome for line in lines if line is not None and line.outcome]
    return found[-1] if found else None


def _check_card(spec: Spec) -> None:
    """See that this machine has the card that was asked for by name."""
    if spec.gpu is None:
        return
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = []
    if sum(spec.gpu.lower() in name.lower() for name in listed) < spec.gpus:
        raise UserError(
            f"no {spec.gpus} × {spec.gpu} here: {', '.join(listed) or 'no NVIDIA card'}",
            where="--gpu",
            hint="--backend modal or gke, or leave --gpu out",
        )
