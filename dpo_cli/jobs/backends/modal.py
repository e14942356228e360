"""`--backend modal`: a function call of a detached app, with the volume at /vol.

Submits `_modal_app.py` with the real client; what is needed to find the call again is in the job's handle. Modal keeps
a call's result for seven days; later its status is not known. Not covered: several machines.
"""

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import import_module, reload
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.data.files import sha256
from dpo_cli.errors import STOPPED, Exit, UserError, require
from dpo_cli.jobs import progress_lines, transfer
from dpo_cli.jobs import registry as jobs
from dpo_cli.jobs.backends._modal_cards import card, cost, usd_per_second
from dpo_cli.jobs.cap import GRACE_SECONDS
from dpo_cli.jobs.progress_lines import Outcome
from dpo_cli.jobs.registry import Job, Status, ended
from dpo_cli.jobs.spec import VOLUME, Spec, identity, training_secrets
from dpo_cli.progress import Progress
from dpo_cli.storage.modal import CONNECT_SECONDS, within

HALF = "its submission was cut short, and it may be running"
PATIENCE_SECONDS = 600.0  # how long Modal may not answer before a log is given up
RECONNECT_SECONDS = 2.0


def gpu(config: Config) -> str | None:
    """The configured card."""
    return config.modal.gpu


def settings(spec: Spec, config: Config) -> dict[str, Any]:
    """What the app is made with.

    Raises:
        UserError: a card that Modal does not have, or so many; or several machines.
    """
    if spec.nodes > 1:
        raise UserError("one machine at a time on Modal", where="--nodes", hint="--gpus, or --backend gke")
    section, trains = config.modal, spec.command == "train"
    capped = None if spec.seconds is None else round(spec.seconds + GRACE_SECONDS)
    wanted = {"HF_TOKEN": section.hf_secret, "WANDB_API_KEY": section.wandb_secret}
    useful = training_secrets(spec, wanted) if trains else {}
    second = section.judge_secret if spec.command == "judge" else useful.get("WANDB_API_KEY")
    return {
        "app": section.app if trains else f"{section.app}-{spec.command}",
        "gpu": card(spec.gpu, spec.gpus) if spec.gpu else None,
        "timeout": min(section.timeout, capped or section.timeout),
        "startup_timeout": section.startup_timeout,
        "retries": section.retries,
        "mount": VOLUME,
        "volume": section.volume,
        "cache_volume": section.cache_volume,
        "first_secret": useful.get("HF_TOKEN"),
        "second_secret": second,
        "lock": "train" if trains else "light",
    }


def usd_per_hour(spec: Spec, config: Config) -> float:
    """Modal's list price of the cards."""
    return usd_per_second(card(spec.gpu, spec.gpus)) * 3600 if spec.gpu else 0.0


def render(spec: Spec, config: Config) -> str:
    """The app, its image, and the spec that the function is called with."""
    made = settings(spec, config)
    app = _app(made)
    info, packages = app.run.info(), app.lock(made["lock"])
    shown = {
        "app": made["app"],
        "function": "dpo_cli.jobs.backends._modal_app.run",
        "image": {"python": app.python(), "requirements": packages.name, "sha256": sha256(packages)},
        "gpu": made["gpu"],
        "timeout": info.timeout,
        "startup_timeout": made["startup_timeout"],
        "retries": info.max_retries,
        "single_use_containers": info.single_use_containers,
        "volumes": {path: volume.name for path, volume in info.volumes.items()},
        "secrets": [name for name in (made["first_secret"], made["second_secret"]) if name],
        "uploads": {one.there: f"{one.here} (sha256 {one.sha256[:16]}…)" for one in spec.uploads},
        "expected_there": spec.needs,
        "spec": spec,
    }
    return msgspec.json.format(msgspec.json.encode(shown), indent=2).decode()


def submit(spec: Spec, config: Config, progress: Progress) -> Job:
    """Check, upload, make the app, call its function.

    Raises:
        UserError: what is missing, each in one line with the command that makes it.
    """
    require("modal", "--backend modal")

    made = settings(spec, config)
    root = f"modal://{config.modal.volume}"
    with translate_errors(config):
        preflight(config, [made["first_secret"], made["second_secret"]])
        transfer.refuse_missing(spec, root, VOLUME)
        transfer.upload(spec, root, VOLUME, progress)
        progress.log(f"submitting {made['app']}; Modal builds its image first, the first time for some minutes")
        app = _app(made)
        submitted = Job(id=identity("modal", spec), backend="modal", spec=spec)
        with app.app.run(detach=True):
            submitted.handle = {"app_id": str(app.app.app_id), "gpu": made["gpu"] or ""}
            jobs.save(submitted, config)  # before the call: where its answer is lost, the app is known still
            submitted.handle["call_id"] = app.run.spawn(msgspec.json.encode(spec).decode()).object_id
    return submitted


def preflight(config: Config, secrets: list[str | None]) -> None:
    """See within seconds that Modal answers, knows us, and has the secrets; make the volume.

    Raises:
        UserError: it does not; every missing secret is named.
    """
    import modal
    from modal.exception import NotFoundError

    within(CONNECT_SECONDS, lambda: modal.Client.from_env().hello())
    keys = {config.modal.hf_secret: "HF_TOKEN", config.modal.wandb_secret: "WANDB_API_KEY"}
    missing = []
    for name in filter(None, secrets):
        try:
            within(CONNECT_SECONDS, modal.Secret.from_name(name).hydrate)
        except NotFoundError:
            missing.append(f"modal secret create {name} {keys.get(name, 'OPENAI_API_KEY')}=...")
    if missing:
        lines = "".join(f"\n  no secret '{command.split()[3]}': {command}" for command in missing)
        raise UserError(f"Modal lacks what this run needs{lines}", hint=f"{missing[0]}; or name others in [modal]")
    within(CONNECT_SECONDS, modal.Volume.from_name(config.modal.volume, create_if_missing=True).hydrate)


def status(job: Job, config: Config) -> Status:
    """What the call returned or raised, if it has ended."""
    import modal
    from modal import exception

    if "call_id" not in job.handle:
        with translate_errors(config):
            if _app_lives(job):
                return Status("pending", None, HALF)
            return Status("cancelled", Exit.INTERRUPTED, "its submission was cut short, and Modal has ended its app")
    with translate_errors(config):
        call = modal.FunctionCall.from_id(job.handle["call_id"])
        try:
            returned = within(CONNECT_SECONDS, lambda: _returned(call))
        except (exception.AuthError, exception.ConnectionError, exception.NotFoundError, TimeoutError):
            raise
        except exception.FunctionTimeoutError:
            return Status("failed", Exit.FAILED, "its last attempt took longer than modal.timeout allows")
        except exception.OutputExpiredError:
            return Status("failed", None, "its result is no longer kept; what it left is on the volume")
        except Exception as error:  # whatever the function raised, as far as the client could make it out
            if job.cancelled:
                return Status("cancelled", Exit.INTERRUPTED, "its checkpoints are on the volume")
            return Status("failed", Exit.FAILED, _line(error))
    if returned is None:
        return Status("running")
    outcome = msgspec.json.decode(returned, type=Outcome)
    return ended(outcome.exit_code, outcome.error)


def _app_lives(job: Job) -> bool:
    """Whether Modal still runs the job's app: its own word, since here the answer to the submission is missing."""
    import modal

    live = within(CONNECT_SECONDS, lambda: modal.Environment.from_context().apps.list())
    return any(app.app_id == job.handle["app_id"] for app in live)


def _returned(call: Any) -> str | None:
    """What the call returned; None: it goes on."""
    try:
        text: str = call.get(timeout=0)
        return text
    except TimeoutError:  # Python's own; a function that took too long raises Modal's, which is none of these
        return None


def card_seconds(job: Job, config: Config) -> float | None:
    """From each container's first log entry to its last; that of one that runs reaches until now."""
    if "call_id" not in job.handle:
        return None
    with translate_errors(config):
        lines = _Lines(job)
        for entry in _entries(job, config, follow=False, seen=set()):
            for _ in lines.of(entry):
                pass
        return lines.seconds(running=not status(job, config).ended)


def logs(job: Job, config: Config, follow: bool) -> Iterator[str]:
    """Lines of the call's containers, from the first on; a container after the first is said to be another attempt."""
    if "call_id" not in job.handle:
        raise UserError(HALF, where=job.id, hint=f"nothing-dpo jobs cancel {job.id}, then the same command")
    with translate_errors(config):
        lines = _Lines(job)
        for entry in _reconnected(job, config, follow):
            if isinstance(entry, str):
                yield entry
            else:
                yield from lines.of(entry)
        yield from lines.rest()


def _reconnected(job: Job, config: Config, follow: bool) -> Iterator[Any]:
    """The call's log entries, each once, over lost connections; a text is a line about the connection itself."""
    from modal import exception

    seen: set[tuple[Any, str]] = set()
    answered, said = time.monotonic(), False
    while True:
        try:
            for entry in _apart(_entries(job, config, follow, seen)):
                answered, said = time.monotonic(), False
                yield entry
            return
        except (OSError, exception.ConnectionError) as error:
            if not follow or time.monotonic() - answered > PATIENCE_SECONDS:
                raise
            if not said:
                yield f"waiting: Modal does not answer ({_line(error)}); the job runs on"
            said = True
            time.sleep(RECONNECT_SECONDS)


def _entries(job: Job, config: Config, follow: bool, seen: set[tuple[Any, str]]) -> Iterator[Any]:
    """The call's log entries that are not among those seen, which are added."""
    import modal

    call = modal.FunctionCall.from_id(job.handle["call_id"])
    fetched = call.logs.fetch(since=datetime.fromisoformat(job.submitted))
    # A stream begins somewhere in what was fetched.
    sources = [fetched, call.logs.stream()] if follow and not _has_ended(call) else [fetched]
    for source in sources:
        for entry in source:
            key = entry.timestamp, entry.message
            if key not in seen:
                seen.add(key)
                yield entry


def _has_ended(call: Any) -> bool:
    """Whether a call has returned or raised; a lost connection is raised on."""
    from modal import exception

    try:
        return within(CONNECT_SECONDS, lambda: _returned(call)) is not None
    except (OSError, TimeoutError, exception.ConnectionError):
        raise
    except Exception:  # what the function raised
        return True


def _apart(entries: Iterator[Any]) -> Iterator[Any]:
    """Log entries, read by a thread of their own: Ctrl-C inside the client would break it off half-way."""
    arrived: queue.Queue[Any] = queue.Queue()

    def read() -> None:
        try:
            for entry in entries:
                arrived.put(entry)
            arrived.put(None)
        except BaseException as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    try:
        while (entry := arrived.get()) is not None:
            if isinstance(entry, BaseException):
                raise entry
            yield entry
    finally:  # left early, the client's tasks would complain of it when the process ends
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class _Lines:
    """Log entries, which end anywhere, as lines."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.partial = ""
        self.interrupted = False
        self.times: dict[str, list[datetime]] = {}

    def of(self, entry: Any) -> Iterator[str]:
        """The lines that an entry ends."""
        container = entry.context_ids[-1] if entry.context_ids else ""
        if container and container not in self.times:
            if self.times:
                yield from self._rest_of_line()
                why = "preempted" if self.interrupted else "the attempt before failed"
                yield f"{why}: attempt {len(self.times) + 1} goes on from the last checkpoint"
            self.times[container] = [entry.timestamp, entry.timestamp]
        if container:
            self.times[container][1] = entry.timestamp
        *whole, self.partial = (self.partial + entry.message).split("\n")
        for text in whole:
            line = progress_lines.parse(text)
            if line is not None and line.outcome is not None:
                self.interrupted = line.outcome.exit_code in STOPPED
            yield text

    def rest(self) -> Iterator[str]:
        """What is left, and what the containers cost."""
        yield from self._rest_of_line()
        name = self.job.handle.get("gpu", "")
        if name and self.times:
            yield cost(name, self.seconds(running=False))

    def seconds(self, running: bool) -> float:
        """How long the containers ran, as far as their entries show; the last one until now if it runs."""
        spans = [(last - first).total_seconds() for first, last in self.times.values()]
        if running and self.times:
            first, _ = list(self.times.values())[-1]
            spans[-1] = (datetime.now(first.tzinfo) - first).total_seconds()
        return sum(spans)

    def _rest_of_line(self) -> Iterator[str]:
        if self.partial:
            yield self.partial
        self.partial = ""


def cancel(job: Job, config: Config) -> None:
    """Cancel the call and end its container, or all of the app if the call is not known; nothing is tried again."""
    import modal

    with translate_errors(config):
        if "call_id" not in job.handle:
            within(CONNECT_SECONDS, lambda: modal.App.lookup(job.handle["app_id"]).stop())
            return
        call = modal.FunctionCall.from_id(job.handle["call_id"])
        within(CONNECT_SECONDS, lambda: call.cancel(terminate_containers=True))


def suspend(job: Job, config: Config, suspended: bool) -> None:
    """There is no pause here.

    Raises:
        UserError: always.
    """
    hint = f"nothing-dpo jobs cancel {job.id}; the same command goes on from its checkpoint"
    raise UserError(f"backend {job.backend} has no pause", where=job.id, hint=hint)


def fetch(job: Job, config: Config, into: Path, progress: Progress) -> None:
    """Bring the results home from the volume."""
    transfer.fetch(job.spec, f"modal://{config.modal.volume}", VOLUME, into, progress)


@contextmanager
def translate_errors(config: Config) -> Iterator[None]:
    """What the client raises, as one line and the command that mends it."""
    from modal import exception

    try:
        yield
    except exception.AuthError:
        raise UserError("not logged in to Modal", hint="modal token new") from None
    except exception.ImageBuildError as error:
        raise UserError(f"the image can't be built: {_line(error)}", hint="modal app logs shows it") from None
    except exception.NotFoundError as error:
        raise UserError(_line(error), where="Modal", hint="modal app list; modal environment list") from None
    except exception.PermissionDeniedError as error:
        raise UserError(_line(error), where="Modal", hint="modal profile activate OTHER") from None
    except (exception.Error, OSError) as error:
        hint = "nothing-dpo jobs lists what runs; the same command attaches to it"
        raise UserError(f"Modal does not answer: {_line(error)}", where="Modal", hint=hint, code=Exit.FAILED) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _app(made: dict[str, Any]) -> ModuleType:
    """The app's module, made with these settings."""
    name = "dpo_cli.jobs.backends._modal_app"
    before = os.environ.get("NOTHING_DPO_MODAL")
    os.environ["NOTHING_DPO_MODAL"] = msgspec.json.encode(made).decode()
    try:
        return reload(sys.modules[name]) if name in sys.modules else import_module(name)
    finally:
        if before is None:
            del os.environ["NOTHING_DPO_MODAL"]
        else:
            os.environ["NOTHING_DPO_MODAL"] = before
