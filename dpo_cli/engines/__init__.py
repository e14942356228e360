"""Where completions come from: one module an engine, whose name is the value of `--engine`.

An engine is a function `sample(requests, config, deliver, progress)` that calls `deliver` once for each request, as
soon as that request is finished, in any order.
"""

import pkgutil

from msgspec import Struct

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


def names() -> list[str]:
    """Every engine's name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
