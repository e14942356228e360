"""Where completions come from: one module an engine, whose name is the value of `--engine`.

An engine is a function `sample(requests, config, deliver, progress)` that calls `deliver` once for each request, as
soon as that request is finished, in any order, and returns the receipt of its paid calls, if it has any.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TypeAlias, cast

from msgspec import Struct

from dpo_cli.config import Config
from dpo_cli.endpoint import Receipt
from dpo_cli.errors import require
from dpo_cli.progress import Progress
from dpo_cli.schema import Message, Usage


class Request(Struct, kw_only=True):
    """`need` more completions for one prompt.

    `have` are the completions that exist; a new one's index, and with it its seed, continues after them.
    """

    id: str
    prompt: list[Message]
    have: list[str]
    need: int


class Sampled(Struct, kw_only=True):
    """What came of one request: texts and finish reasons in step, or an `error` that the next run retries."""

    id: str
    texts: list[str]
    finish_reasons: list[str]
    usage: Usage
    error: str | None = None


Sample: TypeAlias = Callable[[list[Request], Config, Callable[[Sampled], None], Progress], Receipt | None]


def names() -> list[str]:
    """Every engine's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Sample:
    """The engine of a name that `names` lists.

    Raises:
        UserError: it needs an extra that is not installed.
    """
    if name == "transformers":
        require("train", "--engine transformers")
    return cast(Sample, import_module(f"{__name__}.{name}").sample)
