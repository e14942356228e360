"""Where completions come from: one module an engine, whose name is the value of `--engine`.

An engine is a function `sample(requests, config, deliver, progress)` that calls `deliver` once for each request, as
soon as that request is finished, in any order, and returns the receipt of its paid calls, if it has any. What it is
asked and what it gives is in `_engine`, which `--help` has no need of.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, TypeAlias, cast

from dpo_cli.errors import require

if TYPE_CHECKING:  # the names of engines are wanted for --help, the rest is not
    from dpo_cli.config.settings import Config
    from dpo_cli.endpoint.costs import Receipt
    from dpo_cli.engines._engine import Request, Sampled
    from dpo_cli.progress import Progress

Sample: TypeAlias = "Callable[[list[Request], Config, Callable[[Sampled], None], Progress], Receipt | None]"


def names() -> list[str]:
    """Every engine's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> Sample:
    """The engine of a name that `names` lists.

    Raises:
        UserError: it needs an extra that is not installed.
    """
    if name == "transformers":
        require("train", "--engine transformers")
    return cast(Sample, import_module(f"{__name__}.{name}").sample)
