"""Where work runs: one module a backend, whose name is the value of `--backend`, with the functions of `Backend`.

What runs there is `dpo_cli.jobs.worker`. Nothing but the standard library is imported here: a container imports this
first.
"""

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Protocol, cast

from dpo_cli.errors import EXTRAS, UserError, require

if TYPE_CHECKING:
    from pathlib import Path

    from dpo_cli.config.settings import Config
    from dpo_cli.jobs.registry import Job, Status
    from dpo_cli.jobs.spec import Spec
    from dpo_cli.progress import Progress


class Backend(Protocol):
    """What a backend's module offers; each function raises `UserError` for whatever a user can mend."""

    @property
    def VOLUME(self) -> str | None:
        """Where the volume is mounted there; None: the work runs on this machine."""

    def gpu(self, config: "Config") -> str | None:
        """The type of card that is asked for by default; None: no card."""

    def usd_per_hour(self, spec: "Spec", config: "Config") -> float:
        """List price of the cards that a spec asks for; 0 where they are nobody's."""

    def render(self, spec: "Spec", config: "Config") -> str:
        """What `submit` would submit, exactly and completely, as text for a person."""

    def submit(self, spec: "Spec", config: "Config", progress: "Progress") -> "Job":
        """Check what can be checked in seconds, upload, start.

        That no job of this id is running has been checked here; where the job is known by its name there, a second
        one is refused there as well.
        """

    def status(self, job: "Job", config: "Config") -> "Status":
        """Where it stands now."""

    def card_seconds(self, job: "Job", config: "Config") -> float | None:
        """For how long the job's machines have run so far, all attempts together; None where nobody is paid."""

    def logs(self, job: "Job", config: "Config", follow: bool) -> Iterator[str]:
        """Its stdout, each line once.

        With `follow` until it has ended, over lost connections and preemptions, which are said in a line.
        """

    def cancel(self, job: "Job", config: "Config") -> None:
        """End it, and wait for nothing."""

    def suspend(self, job: "Job", config: "Config", suspended: bool) -> None:
        """Let it save and rest, or go on."""

    def fetch(self, job: "Job", config: "Config", into: "Path", progress: "Progress") -> None:
        """Fetch what `spec.results` names, as far as `spec.comes_home` says so.

        Files land in the folder `into`, at the paths that they have there below the volume.
        """


def names() -> list[str]:
    """Every backend's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Backend:
    """The module of a backend.

    Raises:
        UserError: there is none of that name, or it needs an extra that is not installed.
    """
    if name not in names():
        raise UserError(f"unknown backend '{name}'", hint=f"one of: {', '.join(names())}")
    if name in EXTRAS:
        require(name, f"--backend {name}")
    return cast(Backend, import_module(f"{__name__}.{name}"))
