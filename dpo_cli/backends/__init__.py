"""Where training runs: one module a backend, whose name is the value of `--backend`."""

import pkgutil


def names() -> list[str]:
    """Every backend's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
