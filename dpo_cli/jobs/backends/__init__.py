"""Where work runs: one module a backend, whose name is the value of `--backend`.

A backend is these names; `launch.py` calls them, and each raises `UserError` for whatever a user can mend.

- `VOLUME`: where the volume is mounted there, or None: the work runs on this machine.
- `gpu(config)`: the type of card that is asked for by default, or None.
- `render(spec, config) -> str`: what `submit` would submit, exactly and completely, as text for a person.
- `submit(spec, config, progress) -> Job`: check what can be checked in seconds, upload, start. That no job of this id
  is running has been checked here; where the job is known by its name there, a second one is refused there as well.
- `status(job, config) -> Status`: where it stands now.
- `logs(job, config, follow) -> Iterator[str]`: its stdout, line by line, each line once; with `follow` until it has
  ended, over lost connections and preemptions, which are said in a line.
- `cancel(job, config)`: end it, and wait for nothing.
- `suspend(job, config, suspended)`, where it can: let it save and rest, or go on.
- `fetch(job, config, into, progress)`: what `spec.results` names, into the folder `into`, at the paths that they have
  there below the volume, as far as `job.comes_home` says so.

What runs there is `dpo_cli.jobs.worker`. Nothing but the standard library is imported here: a container imports this
first.
"""

import pkgutil
from importlib import import_module
from types import ModuleType

from dpo_cli.errors import EXTRAS, UserError, require


def names() -> list[str]:
    """Every backend's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        UserError: there is none of that name, or it needs an extra that is not installed.
    """
    if name not in names():
        raise UserError(f"unknown backend '{name}'", hint=f"one of: {', '.join(names())}")
    if name in EXTRAS:
        require(name, f"--backend {name}")
    return import_module(f"{__name__}.{name}")
