"""Is what is served what was trained? A server's log-probabilities, held against those of the adapters on disk.

Reads the adapters, the base and a few rows of data (pairs, or prompts alone); writes nothing. Each served name must be
nearer to its own adapter than to any other or to the bare base, and within what the weights' type explains. Where two
adapters are closer to each other than that noise, none can tell them apart, and the result says so.
"""

from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import msgspec
from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.columns import Cells
from dpo_cli.data.formats.preferences import read_pair
from dpo_cli.data.formats.prompts import PromptFile
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import Message, Preference
from dpo_cli.errors import Exit, UserError, require
from dpo_cli.progress import Progress
from dpo_cli.stages.serve_config import server
from dpo_cli.stages.serve_config.plan import ServePlan
from dpo_cli.stages.serve_config.server import ask, said

PROMPTS = 20
MOST_TOKENS = 512  # of each
BASE = "the bare base"
# Mean difference of a token's log-probability, in nats, that the weights' type explains. Measured, vLLM 0.32 on a CPU
# against transformers in float32, two layers: 5e-7 in float32, 7e-3 in bfloat16. Rounding grows with depth, so the
# limits are wide; what tells adapters apart is which one is nearest.
SERVED_TOLERANCE = {"float32": 1e-3, "float": 1e-3, "float16": 2e-2, "half": 2e-2}
OTHERWISE = 6e-2  # bfloat16, and auto, which makes it of float32
CLEARLY = 2.0  # times nearer


class Served(Struct, kw_only=True):
    """One served name: mean difference of a token's log-probability from each adapter on disk, in nats."""

    name: str
    ok: bool
    differences: dict[str, float]
    tokens: int
    reason: str | None = None


class Checked(Struct, kw_only=True):
    """What a server serves, and whether it is what lies on disk; `notes` are for the user."""

    url: str
    verdict: Literal["pass", "fail"]
    served: list[Served]
    prompts: int
    tolerance: float
    notes: list[str] = msgspec.field(default_factory=list)


def check(plan: ServePlan, config: Config, url: str, progress: Progress) -> Checked:
    """Compare a server with the adapters of a plan.

    Args:
        plan: what should be served.
        config: names the rows to compare on, and the server's type of weights.
        url: of the server, with or without `/v1`.
        progress: told of requests.

    Raises:
        UserError: the extra `train` is missing, nobody answers, or there are no rows.
    """
    require("train", "--check")
    listed = server.listed(url)
    rows = _rows(config)

    from dpo_cli.stages.serve_config.log_probs import encode, log_probs
    from dpo_cli.training.inputs import download_base
    from dpo_cli.training.trainer import redirect_logs

    base = Path(plan.model) if Path(plan.model).is_dir() else download_base(plan.model)
    with redirect_logs(progress):
        sequences = [ids[:MOST_TOKENS] for ids in encode(base, config.model, rows)]
        bare, known = log_probs(base, {name: adapter.path for name, adapter in plan.adapters.items()}, sequences)
    known[plan.whole or BASE] = bare
    names = [*plan.adapters, *([plan.whole] if plan.whole else [])]
    tolerance = SERVED_TOLERANCE.get(config.serve.dtype, OTHERWISE)
    result = Checked(url=url, verdict="pass", served=[], prompts=len(sequences), tolerance=tolerance)
    progress.begin("check", len(names) * len(sequences))
    try:
        for number, name in enumerate(names):
            if fault := _listing_fault(listed.get(name), name == plan.whole):
                result.served.append(Served(name=name, ok=False, differences={}, tokens=0, reason=fault))
                continue
            heard = []
            for done, ids in enumerate(sequences, 1):
                heard += _heard(url, name, ids)
                progress.update(number * len(sequences) + done)
            differences = {other: _difference(heard, values) for other, values in known.items()}
            one = _judged(name, differences, len(heard), tolerance)
            result.served.append(one)
            there = plan.model if name == plan.whole else str(plan.adapters[name].path)
            result.notes += _notes(one, listed[name].get("root"), there)
    finally:
        progress.end()
    result.verdict = "pass" if all(one.ok for one in result.served) else "fail"
    return result


def _pair(row: dict[str, Any]) -> Preference:
    return read_pair(Cells(row))[1]


def _rows(config: Config) -> list[list[Message]]:
    """Prompts with the completion that was chosen, or prompts alone."""
    data, prompts = Path(config.data), Path(config.generate.prompts)
    pairs = [file for name in ("val", "train") if (file := data / f"{name}.jsonl").is_file()]
    if pairs:
        read = chain.from_iterable(parse_rows(file, _pair) for file in pairs)
        return [pair.prompt + pair.chosen for _, pair in islice(read, PROMPTS)]
    file = prompts / "val.jsonl" if prompts.is_dir() else prompts
    if not file.is_file():
        hint = "--data FOLDER with pairs, or --set generate.prompts=FILE"
        raise UserError("no rows to compare on", where=str(data), hint=hint)
    return [prompt.messages for prompt in islice(PromptFile(file, config.generate.columns), PROMPTS)]


def _listing_fault(model: dict[str, Any] | None, whole: bool) -> str | None:
    """Why a listed model can't be the adapter of its name, or the whole model."""
    if model is None:
        return "is not served"
    if model.get("parent") is None and not whole:
        return "is served as a base model, not as an adapter"
    return None


def _heard(url: str, name: str, ids: list[int]) -> list[float]:
    """The server's log-probability of each token after the first."""
    body = {"model": name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    status, reply = ask(url, "completions", body)
    if status != 200:
        raise UserError(f"{name}: {status}, {said(reply)}", where=url, code=Exit.FAILED)
    found = reply["choices"][0].get("prompt_logprobs")
    if not found:
        raise UserError("gives no log-probabilities of a prompt: not vLLM?", where=url, code=Exit.FAILED)
    return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], found[1:], strict=True)]


def _difference(heard: Sequence[float], known: Sequence[float]) -> float:
    return fmean(abs(one - other) for one, other in zip(heard, known, strict=True))


def _judged(name: str, differences: dict[str, float], tokens: int, tolerance: float) -> Served:
    own = differences[name]
    nearest = min(differences, key=lambda other: differences[other])
    reason = None
    if CLEARLY * differences[nearest] < own:
        reason = f"answers as {nearest} ({differences[nearest]:.2g} nats a token from it), not as itself ({own:.2g})"
    elif own > tolerance:
        reason = f"is {own:.2g} nats a token from its adapter on disk, more than serve.dtype explains"
    return Served(name=name, ok=reason is None, differences=differences, tokens=tokens, reason=reason)


def _notes(one: Served, root: str | None, path: str) -> list[str]:
    notes = [] if root == path else [f"{one.name}: the server has it from {root}"]
    own = one.differences[one.name]
    alike = [other for other, value in one.differences.items() if other != one.name and value < CLEARLY * own]
    if one.ok and alike:
        notes.append(f"{one.name}: too close to {' and '.join(alike)} to be told apart from it")
    return notes
