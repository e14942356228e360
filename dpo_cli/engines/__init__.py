"""Where completions come from: one module an engine, whose name is the value of `--engine`.

An engine is a function `sample(requests, config, deliver, progress)` that calls `deliver` once for each request, as
soon as that request is finished, in any order, and returns the receipt of its paid calls, if it has any.
"""

from dpo_cli.engines._engine import (
    UNLIMITED,
    Request,
    Sample,
    Sampled,
    Sampling,
    choose,
    estimate,
    load,
    names,
    sampling,
)

__all__ = ["UNLIMITED", "Request", "Sample", "Sampled", "Sampling", "choose", "estimate", "load", "names", "sampling"]
