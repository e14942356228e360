"""A cap on the seconds that a job may hold its cards: what is used is kept on the volume, over all its attempts.

At the cap the process is told to end as by a preemption, so that it saves; what follows is the same command again. Time
before the worker starts (image, node, download of the container) is not counted, since nothing here runs then.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from dpo_cli.data import files
from dpo_cli.errors import STOPPED, Exit, UserError
from dpo_cli.jobs.progress_lines import Outcome
from dpo_cli.jobs.spec import Spec

NOTE_SECONDS = 20.0  # between two notes of what is used: what a killed attempt may not have noted
# Beyond the cap, until the service ends what does not end by itself: to pull the image, load the model and save.
GRACE_SECONDS = 1800.0
LEAST_SECONDS = 60.0  # with less left an attempt does not begin: it would load the model and save nothing


def seconds_for(usd: float | None, hours: float | None, usd_per_hour: float) -> float | None:
    """Card seconds that a cap in dollars or hours allows: the lower of both; None where there is none.

    Raises:
        UserError: dollars, and no price to reckon with.
    """
    allowed = [] if hours is None else [hours * 3600]
    if usd is not None:
        if not usd_per_hour > 0:
            raise UserError("--max-usd needs a price of the card", hint="--max-hours, or set the price in [plan]")
        allowed.append(usd / usd_per_hour * 3600)
    return min(allowed, default=None)


class Cap:
    """Counts the seconds of this attempt and ends it at the cap.

    Args:
        spec: its `seconds` are the cap; None: only what is used is noted.
        folder: on the volume, where what earlier attempts used is kept.
        stop: what ends the work; unset: SIGTERM to this process.
    """

    def __init__(self, spec: Spec, folder: Path, stop: Callable[[], None] | None = None) -> None:
        self.allowed = spec.seconds
        self._reached = False
        self._file = folder / f".used-{spec.submission or 'here'}.json"
        self._stop = stop or (lambda: os.kill(os.getpid(), signal.SIGTERM))
        self._before = float(files.read_json(self._file).get("seconds", 0.0)) if self._file.exists() else 0.0
        self._end = threading.Event()

    @property
    def used(self) -> float:
        """Seconds, those of earlier attempts included."""
        return self._before + time.monotonic() - self._began

    def reached(self) -> bool:
        """Whether the cap ended this attempt, or left it nothing to begin with."""
        return self._reached

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        if self.allowed is not None:
            left = self.allowed - self._before
            if left < LEAST_SECONDS and self._before:
                self._reached = True
            else:
                threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self.allowed is not None:
            self._note()

    def _watch(self) -> None:
        assert self.allowed is not None
        while not self._end.wait(min(NOTE_SECONDS, max(self.allowed - self.used, 0.0))):
            if self.used >= self.allowed:
                self._reached = True
                self._stop()
                return
            self._note()

    def _note(self) -> None:
        files.write_json(self._file, {"seconds": self.used})

    def outcome(self, ended: Outcome | None = None) -> Outcome:
        """How the work ended, or would have: at the cap, unless it had ended by itself."""
        if not self._reached or (ended is not None and ended.exit_code not in STOPPED):
            assert ended is not None
            return ended
        hours = (self.allowed or 0.0) / 3600
        return Outcome(
            exit_code=Exit.BUDGET,
            error=f"the cap of {hours:.3g} hours is reached; what is saved is kept",
            hint="the same command goes on from the last checkpoint, with a cap of its own",
        )
