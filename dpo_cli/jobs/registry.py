"""Work that is sent elsewhere: what is to be done, with which files, and what is known of it here.

A `Spec` says what to run, with every path as it is there (under `/vol`). Inputs that are on this machine are uploaded
to paths made from their content, so that the same input is sent once; what is not here is looked for there, at the
path that it has in the settings. A `Job` is a spec that was submitted; it is kept in `runs/.jobs/<id>.json`, so that
another shell finds it. Needs no backend and no torch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data import files
from dpo_cli.data.same_settings import refuse_other_settings
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs.spec import Spec

JobState = Literal["pending", "running", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")
FOLDER = ".jobs"


class Job(Struct, kw_only=True):
    """A spec that was submitted; `handle` is what the backend needs to find it, `submitted` a time in UTC."""

    id: str
    backend: str
    spec: Spec
    handle: dict[str, str] = {}
    submitted: str = ""
    cancelled: bool = False


class Status(Struct):
    """Where a job stands. `exit_code` has the meaning that it has on this machine; `reason` is for a person."""

    state: JobState
    exit_code: int | None = None
    reason: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ENDED


def ended(code: int, reason: str | None = None) -> Status:
    """The status of a job whose process ended with an exit code; a gate that says no is no failure of the job."""
    done = code in (Exit.OK, Exit.GATE, Exit.BUDGET)
    return Status("succeeded" if done else "failed", code, reason)


def folder(config: Config) -> Path:
    """Where jobs are kept."""
    return Path(config.runs) / FOLDER


def save(job: Job, config: Config) -> Job:
    """Keep a job, replacing the one of this id; the time of submission is set if it is not."""
    job.submitted = job.submitted or datetime.now(UTC).isoformat(timespec="seconds")
    files.write_json(folder(config) / f"{job.id}.json", job)
    return job


def find(identity: str, config: Config) -> Job | None:
    """The job of an id; None if there is none.

    Raises:
        UserError: its file can't be read.
    """
    file = folder(config) / f"{identity}.json"
    try:
        return msgspec.json.decode(file.read_bytes(), type=Job)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(str(error), where=str(file), hint=f"rm {file}, if nothing of it runs; {hint_list()}") from None


def get(identity: str, config: Config) -> Job:
    """The job of an id, or of the beginning of one.

    Raises:
        UserError: none or several.
    """
    known = [file.stem for file in sorted(folder(config).glob("*.json"))]
    matching = [name for name in known if name == identity] or [name for name in known if name.startswith(identity)]
    if len(matching) != 1:
        what = f"'{identity}' is the beginning of several jobs" if matching else f"no job '{identity}'"
        raise UserError(f"{what}: {', '.join(matching or known) or 'there are none'}", hint=hint_list())
    job = find(matching[0], config)
    assert job is not None
    return job


def all_jobs(config: Config) -> tuple[list[Job], list[UserError]]:
    """Every job, the newest first, and what is wrong with the files that hold none."""
    jobs, unreadable = [], []
    for file in sorted(folder(config).glob("*.json")):
        try:
            job = find(file.stem, config)
        except UserError as error:
            unreadable.append(error)
        else:
            jobs += [job] if job else []
    return sorted(jobs, key=lambda job: job.submitted, reverse=True), unreadable


def hint_list() -> str:
    """The command that lists jobs."""
    return "nothing-dpo jobs lists them"


@contextmanager
def claimed(identity: str, config: Config) -> Iterator[None]:
    """Hold a job's id while it is submitted, so that two shells do not start it twice.

    Raises:
        UserError: another process holds it.
    """
    file = folder(config) / f".{identity}.lock"
    with files.explained(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not files.lock(handle, file, wait=False):
            raise UserError("another nothing-dpo command is submitting it", where=identity, hint="wait for it")
        yield
    finally:
        os.close(handle)


def refuse_another(running: Spec, asked: Spec, identity: str) -> None:
    """See that a job which is running is the one that was asked for.

    Raises:
        UserError: it is not; names what differs.
    """
    hint = f"nothing-dpo jobs cancel {identity}, or --name OTHER"
    refuse_other_settings("it is running", running.identity(), asked.identity(), where=identity, hint=hint)
    if asked.fresh:
        raise UserError("it is running and can't be started over", where=identity, hint=hint)
