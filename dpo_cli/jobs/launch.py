"""Run a command where it was asked for: submit, follow, bring the results home.

The log of the remote run is shown as if it ran here. Ctrl-C leaves a remote job running; one on this machine is
stopped by it. Reads and writes `runs/.jobs/`; results land beside what there is and replace it when they are whole.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data import files, jsonl
from dpo_cli.errors import Exit, UserError
from dpo_cli.jobs import backends, cap, elsewhere, progress_lines
from dpo_cli.jobs import registry as jobs
from dpo_cli.jobs import spec as jobs_spec
from dpo_cli.jobs.backends import Backend
from dpo_cli.jobs.registry import Job, Status
from dpo_cli.jobs.spec import Spec
from dpo_cli.progress import Progress
from dpo_cli.stages import train as training
from dpo_cli.training import preflight
from dpo_cli.training.run_history import Trained


class Launched(Struct, kw_only=True):
    """A job and where it stands; `result` is what the command returned, once it has ended, with paths of here.

    `step` is the newest of training, `usd` what its cards have cost so far at list price, `hours_left` what is left to
    its cap.
    """

    job: Job
    status: Status
    result: Any = None
    hint: str | None = None
    fetched: list[str] = []
    detached: bool = False
    step: int | None = None
    usd: float | None = None
    hours_left: float | None = None


def spec(backend: str, config: Config, command: jobs_spec.Command, gpu: str | None = None, **given: Any) -> Spec:
    """A spec for a backend, as `spec.make` makes it: with its paths, and its card unless another is asked for."""
    chosen = backends.load(backend)
    elsewhere.refuse(config, command, backend)
    gpu = gpu or (chosen.gpu(config) if command == "train" else None)
    made = jobs_spec.make(config, command, gpu=gpu, volume=chosen.VOLUME, **given)
    if command == "train":
        made.seconds = cap.seconds_for(config.plan.max_usd, config.plan.max_hours, chosen.usd_per_hour(made, config))
        made.submission = os.urandom(8).hex() if made.seconds is not None else ""
    return made


def expected(backend: str, spec: Spec, config: Config) -> str:
    """What a training job will take and cost, and where its cap ends it; what can't be known is said."""
    price = backends.load(backend).usd_per_hour(spec, config)
    said = f"plan: {_hours(spec, config, price)}; ${price:.2f} an hour"
    if spec.seconds is None:
        return f"{said}; no cap (--max-usd, --max-hours)"
    return f"{said}; cap {spec.seconds / 3600:.3g} hours, ${spec.seconds / 3600 * price:.2f}"


def _hours(spec: Spec, config: Config, price: float) -> str:
    """Hours and dollars of a DPO run, by the data that was given or is configured."""
    if spec.stage != "dpo":
        return "hours are reckoned for DPO alone"
    data = Path(config.data)
    try:
        plan = preflight.run(config, data if data.is_file() else None, spec.limit)
    except UserError as error:
        return f"hours not known ({error})"
    hours = plan.hours / (spec.gpus * spec.nodes)
    return f"about {hours:.2g} hours, ${hours * price:.2f}"


def render(backend: str, spec: Spec, config: Config) -> str:
    """What would be submitted."""
    return backends.load(backend).render(spec, config)


def run(
    backend: str, spec: Spec, config: Config, progress: Progress, detach: bool = False, fetch: bool = True
) -> Launched:
    """Submit, or find the same job running; follow it to its end unless `detach`.

    Args:
        backend: where.
        spec: what.
        config: every setting, with paths as they are here.
        progress: what the remote run reports.
        detach: return once it is submitted.
        fetch: bring the results home at the end.

    Raises:
        UserError: what the backend can't do, or another job of this name is running.
        KeyboardInterrupt: Ctrl-C before it was submitted.
    """
    chosen = backends.load(backend)
    submitted = _submit(chosen, jobs_spec.identity(backend, spec), spec, config, progress)
    if detach:
        return Launched(job=submitted, status=chosen.status(submitted, config), detached=True)
    return _attach(chosen, submitted, config, progress, fetch)


def train(
    backend: str, config: Config, progress: Progress, *, name: str, data: Path | None, fresh: bool, limit: int | None
) -> Trained:
    """Train to the end, here or elsewhere, and bring the results home.

    Raises:
        UserError: as `train.run`, or the job did not end well.
    """
    if backend == "local":
        return training.run(config, progress, "dpo", name, data, fresh, limit)
    asked = spec(backend, config, "train", name=name, data=data, fresh=fresh, limit=limit)
    launched = run(backend, asked, config, progress)
    if launched.result is None:
        code = Exit.INTERRUPTED if not launched.status.ended else Exit(launched.status.exit_code or Exit.FAILED)
        raise UserError(
            launched.status.reason or launched.status.state,
            where=launched.job.id,
            hint=launched.hint or f"nothing-dpo jobs attach {launched.job.id}",
            code=code,
        )
    return msgspec.convert(launched.result, Trained)


def submit(backend: str, spec: Spec, config: Config, progress: Progress) -> Job:
    """Submit, or find the same job running.

    Raises:
        UserError: as `run`.
    """
    return _submit(backends.load(backend), jobs_spec.identity(backend, spec), spec, config, progress)


def _submit(backend: Backend, identity: str, spec: Spec, config: Config, progress: Progress) -> Job:
    with jobs.claimed(identity, config):
        known = jobs.find(identity, config)
        if known is not None and not backend.status(known, config).ended:
            jobs.refuse_another(known.spec, spec, identity)
            progress.log(f"{identity} is running since {known.submitted}: attaching to it")
            return known
        return jobs.save(backend.submit(spec, config, progress), config)


def attach(job: Job, config: Config, progress: Progress, fetch: bool = True) -> Launched:
    """Show a job's log until it has ended or Ctrl-C comes, then bring its results home.

    Raises:
        UserError: as the backend.
    """
    return _attach(backends.load(job.backend), job, config, progress, fetch)


def _attach(backend: Backend, job: Job, config: Config, progress: Progress, fetch: bool) -> Launched:
    try:
        last = _follow(backend, job, config, progress)
    except KeyboardInterrupt:
        progress.end()
        if backend.VOLUME is not None:
            return Launched(job=job, status=backend.status(job, config))
        backend.cancel(job, config)
        _follow(backend, job, config, progress)
        return Launched(job=job, status=Status("cancelled", Exit.INTERRUPTED, "interrupted; a checkpoint is saved"))
    finally:
        progress.end()
    status = backend.status(job, config)
    launched = Launched(job=job, status=status)
    if last is not None and last.exit_code == status.exit_code:
        status.reason = status.reason or last.error
        launched.result, launched.hint = _here(last.result, job.spec.results), last.hint
    succeeded = status.state == "succeeded"
    if fetch and backend.VOLUME is not None and (succeeded or job.spec.command != "train"):
        try:
            launched.fetched = bring_home(backend, job, config, progress)
        except UserError:  # rows are paid for, however it ended; but there may be none
            if succeeded:
                raise
    return launched


def listed(config: Config, warn: Callable[[str], None] = lambda text: None) -> list[Launched]:
    """Every job and where it stands, the newest first; what can't be asked is said in its reason.

    Args:
        config: every setting.
        warn: told of each file that holds no job.
    """
    found = []
    known, unreadable = jobs.all_jobs(config)
    for error in unreadable:
        warn(f"{error}: {error.hint}")
    for job in known:
        try:
            status = backends.load(job.backend).status(job, config)
        except UserError as error:
            status = Status("pending", None, f"not known: {error}")
        found.append(_measured(Launched(job=job, status=status), config))
    return found


def _measured(launched: Launched, config: Config) -> Launched:
    """With step, cost and hours left of a training job that runs, as far as its backend says."""
    job, backend = launched.job, backends.load(launched.job.backend)
    if job.spec.command != "train" or launched.status.state != "running":
        return launched
    try:
        launched.step = progress_lines.newest_step(backend.logs(job, config, follow=False))
        seconds = backend.card_seconds(job, config)
    except UserError:  # it is known to run: the rest is for information
        return launched
    if seconds is not None:
        launched.usd = seconds / 3600 * backend.usd_per_hour(job.spec, config)
        if job.spec.seconds is not None:
            launched.hours_left = max(job.spec.seconds - seconds, 0.0) / 3600
    return launched


def cancel(job: Job, config: Config) -> Launched:
    """End a job; it is cancelled once the backend says so.

    Who may end a job need not be allowed to see its pods: where its state can't be asked for, it is ended all the same.

    Raises:
        UserError: as the backend; nothing has been noted as cancelled then.
    """
    backend = backends.load(job.backend)
    before = _status_or_none(backend, job, config)
    if before is not None and before.ended:
        return Launched(job=job, status=before)
    backend.cancel(job, config)
    job.cancelled = True  # how its end is to be understood: the backend may only know that it failed
    jobs.save(job, config)
    status = _status_or_none(backend, job, config)
    if status is None or not status.ended:
        state = status.state if status else "running"
        status = Status(state, None, "it was asked to end; nothing-dpo jobs tells when it has")
    return Launched(job=job, status=status)


def _status_or_none(backend: Backend, job: Job, config: Config) -> Status | None:
    try:
        return backend.status(job, config)
    except UserError:
        return None


def suspend(job: Job, config: Config, suspended: bool) -> Launched:
    """Let a job rest, or go on.

    Raises:
        UserError: as the backend, or it can't.
    """
    backend = backends.load(job.backend)
    backend.suspend(job, config, suspended)
    return Launched(job=job, status=backend.status(job, config), detached=True)


def bring_home(backend: Backend, job: Job, config: Config, progress: Progress) -> list[str]:
    """Fetch a job's results: each replaces what is here once it is whole; rows made here since are kept.

    Returns:
        Where they are.
    """
    spec, fetched = job.spec, []
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=_parent(config)) as staged:
        backend.fetch(job, config, Path(staged), progress)
        for there, here in spec.results.items():
            new = Path(staged) / Path(there).relative_to(str(backend.VOLUME))
            if new.exists():
                _replace(new, Path(here), spec.base)
                fetched.append(here)
    return fetched


def _parent(config: Config) -> Path:
    runs = Path(config.runs)
    runs.mkdir(parents=True, exist_ok=True)
    return runs


def _replace(new: Path, here: Path, base: str | None) -> None:
    here.parent.mkdir(parents=True, exist_ok=True)
    if new.is_file():
        _keep_own_rows(new, here)
        shutil.move(new, here)
        return
    settings = new / "adapter_config.json"
    if settings.exists() and base:
        files.write_json(settings, msgspec.json.decode(settings.read_bytes()) | {"base_model_name_or_path": base})
        with files.replacing_folder(here) as staged:
            for file in new.iterdir():
                shutil.move(file, staged)
        return
    for file in sorted(new.rglob("*")):
        if file.is_file():
            target = here / file.relative_to(new)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, target)


def _keep_own_rows(new: Path, here: Path) -> None:
    """Add the rows of here whose id is not among the new ones: they were made meanwhile, and paid."""
    if not here.exists() or here.stem in ("train", "val"):  # made of the others, and free
        return
    ids = {row["id"] for _, row in jsonl.read_rows(new, dict[str, Any])}
    own = [row for _, row in jsonl.read_rows(here, dict[str, Any]) if row["id"] not in ids]
    if own:
        jsonl.write_rows(new, [*(row for _, row in jsonl.read_rows(new, dict[str, Any])), *own])


def _follow(backend: Backend, job: Job, config: Config, progress: Progress) -> progress_lines.Outcome | None:
    last = None
    for text in backend.logs(job, config, follow=True):
        last = progress_lines.replay(text, progress) or last
    return last


def _here(value: Any, results: dict[str, str]) -> Any:
    """A result with the paths that things have here."""
    if isinstance(value, dict):
        return {key: _here(inner, results) for key, inner in value.items()}
    if isinstance(value, str):
        for there, here in results.items():
            if value == there or value.startswith(f"{there}/"):
                return here + value[len(there) :]
    return value
