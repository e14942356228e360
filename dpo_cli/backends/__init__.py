"""Where training runs: one module a backend, whose name is the value of `--backend`.

A backend is a function `train(config, progress, *, stage, name, fresh)` that returns what `train.run` returns.
"""

import pkgutil
from importlib import import_module
from types import ModuleType

from dpo_cli.errors import UserError


def names() -> list[str]:
    """Every backend's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The module of a backend.

    Raises:
        UserError: there is none of that name.
    """
    if name not in names():
        raise UserError(f"unknown backend '{name}'", hint=f"one of: {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
