"""The entry of every backend: what a `Spec` asks for, done on the machine that this runs on.

`python -m dpo_cli.jobs.worker` reads the spec from the environment variable `NOTHING_DPO_SPEC`, reports on stdout by
the lines of `progress_lines.py` and ends with the exit code that the command has anywhere. More than one process is
torchrun's work: several GPUs, or several machines, where `NODE_RANK` (or Kubernetes' `JOB_COMPLETION_INDEX`) and
`MASTER_ADDR` say which one this is.
"""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.config.settings import Config
from dpo_cli.data import jsonl
from dpo_cli.errors import STOPPED, Exit, UserError
from dpo_cli.interrupts import exit_on_sigterm, forwarding_sigterm
from dpo_cli.jobs import progress_lines
from dpo_cli.jobs.cap import Cap
from dpo_cli.jobs.progress_lines import Outcome, Relay
from dpo_cli.jobs.spec import Spec
from dpo_cli.progress import Progress, Silent

SPEC = "NOTHING_DPO_SPEC"
# What a container ends with where an attempt saved a checkpoint and then failed as nobody foresaw: another may go on
# from there. One that saved nothing ends with 1, and is not tried again.
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
PORT = 29500  # of torchrun's rendezvous, between machines


def run(spec: Spec, progress: Progress, after_save: Callable[[], None] | None = None) -> Any:
    """Do it, in this process.

    Args:
        spec: what to do; its paths are those of this machine.
        progress: where it stands.
        after_save: called when a checkpoint is on the disk.

    Returns:
        What the command returns.

    Raises:
        UserError: as the command.
        KeyboardInterrupt: as `train.run`.
    """
    config = msgspec.convert(spec.config, Config)
    _take_in_seeds(spec)
    if spec.command == "train":
        from dpo_cli.stages import train

        data = Path(spec.data) if spec.data else None
        return train.run(
            config,
            progress,
            spec.stage,
            spec.name,
            data,
            bool(spec.fresh),
            spec.limit,
            after_save=after_save,
            submission=spec.fresh,
            card=spec.gpu,
        )
    if spec.command == "generate":
        from dpo_cli.stages import generate

        return generate.run(config, progress, limit=spec.limit)
    from dpo_cli.stages import judge
    from dpo_cli.stages.pair import run as pair

    judged = judge.run(config, progress, limit=spec.limit)
    waiting = judged.receipt is not None and judged.receipt.waiting
    return {"judged": judged, "paired": None if waiting else pair.run(config)}


def outcome(spec: Spec, progress: Progress, after_save: Callable[[], None] | None = None) -> Outcome:
    """Do a spec's work as `run` does, and return how it ended; Ctrl-C and what nobody foresaw are raised."""
    try:
        result = run(spec, progress, after_save)
    except UserError as error:
        return Outcome(exit_code=error.code, error=str(error), hint=error.hint)
    return Outcome(exit_code=_exit_code(spec, result), result=msgspec.to_builtins(result))


def serve(spec: Spec, after_save: Callable[[], None] | None = None) -> Outcome:
    """Do a spec's work, report it on stdout, and return how it ended; in as many processes as the spec asks for.

    Raises:
        KeyboardInterrupt: this process was interrupted; a checkpoint is saved.
    """
    if "LOCAL_RANK" in os.environ:  # a process of torchrun's: whoever started it counts the time
        return _serve_here(spec, after_save)
    several = spec.gpus * spec.nodes > 1
    with Cap(spec, Path(msgspec.convert(spec.config, Config).runs)) as cap:
        if cap.reached():
            return _told(cap.outcome())
        work = _in_processes if several else _serve_here
        try:
            ended = work(spec, after_save)
        except (KeyboardInterrupt, SystemExit):  # the second: ended before training could note the signal
            if not cap.reached():
                raise
            ended = Outcome(exit_code=Exit.INTERRUPTED)
    return _told(cap.outcome(ended)) if cap.reached() else ended


def _told(ended: Outcome) -> Outcome:
    """An end, said on stdout as the last of the lines."""
    Relay().outcome(ended)
    return ended


def _serve_here(spec: Spec, after_save: Callable[[], None] | None) -> Outcome:
    """Do the work in this process, which may be one of several."""
    first = int(os.environ.get("RANK", "0")) == 0
    told = Relay() if first else None

    def saved() -> None:
        if told:
            told.saved()
        if after_save:
            after_save()

    try:
        ended = outcome(spec, told or Silent(), saved)
    except Exception as error:
        if told:
            said = f"{type(error).__name__}: {error}"
            told.outcome(Outcome(exit_code=Exit.FAILED, error=said, unforeseen=True))
        raise
    except KeyboardInterrupt:
        if told:
            told.outcome(Outcome(exit_code=Exit.INTERRUPTED, error="interrupted"))
        raise
    if told:
        told.outcome(ended)
    elif ended.error and ended.exit_code not in STOPPED:  # torchrun may end the first process before it says so itself
        Relay().outcome(ended)
    return ended


def serve_json(spec: str, after_save: Callable[[], None] | None = None) -> str:
    """Serve a spec that is given as JSON; returns its outcome as JSON."""
    return msgspec.json.encode(serve(msgspec.json.decode(spec, type=Spec), after_save)).decode()


def failed_json(error: str) -> str:
    """The outcome of what nobody foresaw, as JSON."""
    return msgspec.json.encode(Outcome(exit_code=Exit.FAILED, error=error)).decode()


def refused_json(error: str) -> str:
    """The outcome of a job whose folder another call of Modal's writes, as JSON."""
    hint = "wait for it, nothing-dpo jobs cancel where it was submitted, or --name OTHER"
    return msgspec.json.encode(_told(Outcome(exit_code=Exit.USAGE, error=error, hint=hint))).decode()


def main() -> None:
    """Entry point of a container or a detached process."""
    spec = msgspec.json.decode(os.environ[SPEC], type=Spec)
    exit_on_sigterm(Exit.PREEMPTED)  # the first process of a container gets no signal that it does not handle
    saves: list[bool] = []
    try:
        code = serve(spec, lambda: saves.append(True)).exit_code
        # To torchrun any other code is a failure of the process; what the first one has told is what counts.
        sys.exit(Exit.OK if "LOCAL_RANK" in os.environ and code == Exit.GATE else code)
    except KeyboardInterrupt:
        sys.exit(Exit.INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.exit(TRY_AGAIN if saves else Exit.FAILED)


def torchrun(spec: Spec) -> list[str]:
    """The command that runs this entry in as many processes as the spec asks for."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={spec.gpus}"]
    if spec.nodes > 1:
        rank = os.environ.get("NODE_RANK") or os.environ.get("JOB_COMPLETION_INDEX", "0")
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        command += [
            f"--nnodes={spec.nodes}",
            f"--node-rank={rank}",
            f"--master-addr={address}",
            f"--master-port={PORT}",
        ]
    else:
        command += ["--standalone"]
    return [*command, "-m", "dpo_cli.jobs.worker"]


def _in_processes(spec: Spec, after_save: Callable[[], None] | None) -> Outcome:
    """Run torchrun until its processes ask for no new start, which they do to go on with less memory a forward."""
    from dpo_cli.training.distributed import RESTART, RESTARTED

    note = Path(spec.config["runs"]) / spec.name / RESTART
    note.unlink(missing_ok=True)
    while True:
        ended, returned = _torchrun_once(spec, after_save)
        if note.exists():  # of several machines, each would have to know: on those a run ends here
            note.replace(note.with_name(RESTARTED))
            if spec.nodes == 1:
                continue
        if ended:
            # That a process was stopped may be what another's failure led to.
            text, told = next((line for line in ended if line[1].exit_code not in STOPPED), ended[-1])
            _pass_on(text)
            if told.unforeseen:
                raise RuntimeError(told.error)
            return told
        if returned == 0:  # the first process, which tells, is on another machine
            return Outcome(exit_code=Exit.OK)
        error = f"torchrun ended with exit code {returned}"
        if spec.nodes > 1:  # a machine that lost the others: what they say counts, and this one starts again with them
            return Outcome(exit_code=Exit.PREEMPTED, error=error)
        raise RuntimeError(error)


def _pass_on(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _torchrun_once(spec: Spec, after_save: Callable[[], None] | None) -> tuple[list[tuple[str, Outcome]], int]:
    """Run torchrun, pass on what it prints and the signals that this process gets.

    Returns:
        The lines that tell how the command ended, which are not passed on, and torchrun's exit code.
    """
    environment = {**os.environ, SPEC: msgspec.json.encode(spec).decode(), "OMP_NUM_THREADS": "1"}
    ended: list[tuple[str, Outcome]] = []

    def read(process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for text in process.stdout:
            line = progress_lines.parse(text)
            if line is not None and line.outcome:
                ended.append((text, line.outcome))
                continue
            _pass_on(text)
            if line is not None and line.saved and after_save:
                after_save()
        process.wait()

    process = subprocess.Popen(torchrun(spec), stdout=subprocess.PIPE, text=True, env=environment)
    with process, forwarding_sigterm(process):
        try:
            read(process)
        except KeyboardInterrupt:
            process.terminate()
            read(process)
            for text, _ in ended:
                _pass_on(text)
            raise
    return ended, process.returncode


def _exit_code(spec: Spec, result: Any) -> Exit:
    """As the command line has it."""
    if spec.command == "train":
        return Exit.GATE if result.verdict in ("fail", "not shown") else Exit.OK
    failed = result.failed if spec.command == "generate" else result["judged"].errors
    return Exit.FAILED if failed else Exit.OK


def _take_in_seeds(spec: Spec) -> None:
    """Add rows made elsewhere to the file that the work goes on with, unless it has a row of their id."""
    for uploaded, journal in spec.seeds.items():
        known = Path(journal)
        here = {row["id"] for _, row in jsonl.read_rows(known, dict[str, Any])} if known.exists() else set()
        with jsonl.Journal(known) as rows:
            for _, row in jsonl.read_rows(Path(uploaded), dict[str, Any]):
                if row["id"] not in here:
                    rows.append(row)


if __name__ == "__main__":
    main()
