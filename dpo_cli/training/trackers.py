"""Metrics to a tracker besides metrics.jsonl: wandb, trackio or tensorboard, through TRL's `report_to`.

What a tracker prints goes to the progress log; its run ends with ours, so that the next one of a sweep has its own.
Offline modes are the trackers' own (`WANDB_MODE=offline`; trackio and tensorboard write to this machine alone). Not
covered: a run that is resumed begins a new one of the same name in wandb.
"""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo_cli.config.settings import TrainingSection
from dpo_cli.errors import UserError
from dpo_cli.progress import Progress

PROJECT = "nothing-dpo"
REACH_SECONDS = 20.0  # in which wandb must answer, or its run is kept on this machine
TENSORBOARD = "TENSORBOARD_LOGGING_DIR"  # as transformers reads it


def tracker(section: TrainingSection) -> str:
    """Where metrics are reported besides metrics.jsonl.

    Raises:
        UserError: the tracker that was asked for is not installed.
    """
    if section.report_to is None:
        return "wandb" if os.environ.get("WANDB_API_KEY") and find_spec("wandb") else "none"
    if section.report_to != "none" and find_spec(section.report_to) is None:
        raise UserError(
            f"{section.report_to} is not installed", where="train.report_to", hint=f"pip install {section.report_to}"
        )
    return section.report_to


@contextmanager
def tracked(section: TrainingSection, run: Path, progress: Progress) -> Iterator[None]:
    """Begin the tracker's run, if there is a tracker, and end it.

    Args:
        section: settings of the stage.
        run: the run's folder, which gives its name.
        progress: hears what the tracker says, and where it writes.
    """
    name = tracker(section)
    if name == "none":
        yield
        return
    begin = {"wandb": _wandb, "tensorboard": _tensorboard, "trackio": _trackio}[name]
    with redirect_stdout(_Lines(progress)):
        progress.log(f"{name}: {begin(run)}")
        try:
            yield
        finally:
            os.environ.pop(TENSORBOARD, None)
            _finish(name)


def _wandb(run: Path) -> str:
    import wandb

    quiet = wandb.Settings(silent=True, console="off", init_timeout=REACH_SECONDS)
    asked: dict[str, Any] = {
        "project": os.environ.get("WANDB_PROJECT", PROJECT),
        "name": run.name,
        "dir": str(run),
        "settings": quiet,
    }
    try:
        begun = wandb.init(**asked)
    except Exception as error:  # whatever it is: training does not wait for a tracker
        wandb.teardown()
        begun = wandb.init(mode="offline", **asked)
        reason = " ".join(str(error).split())[:200]
        return (
            f"can't be reached ({reason}): tracking goes on offline; wandb sync {Path(begun.dir).parent} sends it later"
        )
    return str(begun.url or begun.dir)


def _tensorboard(run: Path) -> str:
    os.environ[TENSORBOARD] = str(run / "tensorboard")
    return f"tensorboard --logdir {run / 'tensorboard'}"


def _trackio(run: Path) -> str:
    return f"trackio show --project {PROJECT}"  # transformers begins its run


def _finish(name: str) -> None:
    library = sys.modules.get(name)
    if library is not None and (name == "wandb" or (name == "trackio" and library.context_vars.current_run.get())):
        try:
            library.finish()
        except Exception:  # what is trained is saved; what the tracker could not send lies in the run's folder
            return


class _Lines(io.TextIOBase):
    """Writes whole lines to the progress log."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.rest = ""

    def write(self, text: str) -> int:
        """Take a piece of text."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in filter(str.strip, lines):
            self.progress.log(line.strip())
        return len(text)
