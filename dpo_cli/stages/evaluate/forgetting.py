"""What the policy has forgotten: how likely it finds texts that it should still be able to write, before and after DPO.

Negative log-likelihood of the completions that the SFT run held out, and of those in the file `evaluate.general`, in
nats a token, by both adapters in this process; the difference is paired by row: its interval is the noise floor.
The default limit of 0.1 parts what plain DPO could afford in three worlds whose reward is known (tests/worlds.py):
where 0.07 nats or less were lost, 51 to 62% of an answer's other words were of its topic; from 0.13 on, 28 to 42%.
Reads those rows, base and adapters; writes forgetting.jsonl, so that nothing is measured twice.
Not covered: adapters that are on a server only; what lm-evaluation-harness measures, see `harness.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from dpo_cli.config.settings import Config
from dpo_cli.data.formats.prompts import read_demonstration
from dpo_cli.data.reader import parse_rows
from dpo_cli.data.records import content_id
from dpo_cli.data.resumable import Resumable
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import find_base
from dpo_cli.progress import Progress
from dpo_cli.stages.evaluate.sampling import FOLDER
from dpo_cli.statistics import Interval, of_mean
from dpo_cli.training.encode import Exchange, Sequences
from dpo_cli.training.encode_inputs import exchange
from dpo_cli.training.gates import Gate, compared
from dpo_cli.training.inputs import read_inputs

ROWS = "forgetting.jsonl"
SFT, GENERAL = "forgetting_sft", "forgetting_general"  # names of the gates


class Forgetting(Struct, kw_only=True):
    """Nats a token of some completions under both adapters; `change` is policy less reference, paired by row."""

    source: str
    rows: int
    tokens: int
    reference: float
    policy: float
    change: Interval


class Scored(Struct):
    """One line of forgetting.jsonl: nats of a completion under both adapters, and its tokens."""

    id: str
    reference: float
    policy: float
    tokens: int


def measure(config: Config, progress: Progress, who: Sequence[Any]) -> dict[str, Forgetting]:
    """What can be measured here, by the name of its gate; empty where there is nothing to measure with.

    Args:
        config: base and adapters, and where the texts are.
        progress: where to report; units are texts.
        who: what both adapters are, so that no text is measured twice.

    Raises:
        UserError: `evaluate.general` is no file of prompt-completion rows, or base or adapters can't be read.
    """
    texts = _texts(config)
    if not texts or find_base(config.model.base) is None:
        return {}
    keys = {name: [content_id("forgetting", who, *row[:3]) for row in rows] for name, (_, rows) in texts.items()}
    wanted = {key: row for name, (_, rows) in texts.items() for key, row in zip(keys[name], rows, strict=True)}
    found = {}
    with Resumable(Path(config.data) / FOLDER / ROWS, Scored) as scored:
        if owed := scored.missing(wanted):
            with scored.reporting(progress, "forgetting", len(wanted), len(owed)) as delivery:
                for key, nats in _score(config, owed, delivery):
                    scored.deliver(Scored(key, *nats))
                    delivery.note()
        for name, (source, _) in texts.items():
            rows = [scored.known[key] for key in dict.fromkeys(keys[name]) if scored.known[key].tokens]
            if len(rows) > 1:
                found[name] = _compare(source, rows, config.gate.confidence)
    return found


def _score(
    config: Config, rows: Mapping[str, Exchange], progress: Progress
) -> Iterator[tuple[str, tuple[float, float, int]]]:
    """Nats of each completion under the reference and under the policy, and its tokens; 0 where it is too long."""
    from dpo_cli.stages.evaluate.adapters import load_both
    from dpo_cli.training.trainer import load_encoder, redirect_logs

    folder = find_base(config.model.base)
    assert folder is not None
    with redirect_logs(progress):
        model, as_reference = load_both(config)
        encoder = load_encoder(folder, config.model, config.sft.max_length)
        for key, row in rows.items():
            encoded = encoder.encode([row]).rows
            if not encoded:
                yield key, (0.0, 0.0, 0)
                continue
            ours = _nll(model.network, encoded[0])
            with as_reference() as reference:
                theirs = _nll(reference, encoded[0])
            yield key, (theirs, ours, len(encoded[0].completions[0]))


def gates_of(found: dict[str, Forgetting], limit: float) -> dict[str, Gate]:
    """Each change against `gate.forgetting`: it fails where the change is beyond both the limit and its noise."""
    return {name: compared(one.change, limit, above=False) for name, one in found.items()}


def _texts(config: Config) -> dict[str, tuple[str, list[Exchange]]]:
    """Rows by gate: what SFT held out, where its data are here, and the general file, where one is named."""
    count, texts = config.evaluate.forgetting_rows, {}
    if not count:
        return {}
    by_endpoint = config.generate.engine == "endpoint"
    if not by_endpoint and (rows := _held_out(config)):
        texts[SFT] = ("what SFT held out", rows[:count])
    if config.evaluate.general:
        file = Path(config.evaluate.general)
        if not file.is_file():
            raise UserError("no such file", where=str(file), hint="evaluate.general names prompt-completion rows")
        texts[GENERAL] = (str(file), _demonstrations(file)[:count])
    return texts


def _held_out(config: Config) -> list[Exchange]:
    """Rows that `train --stage sft` keeps from training; none where the prompts' files hold prompts alone."""
    try:
        return [exchange(row) for row in read_inputs(config, "sft", None, None).held_out]
    except UserError:
        file = Path(config.generate.prompts) / "val.jsonl"
        try:
            return _demonstrations(file) if file.is_file() else []
        except UserError:
            return []


def _demonstrations(file: Path) -> list[Exchange]:
    rows = [read for _, read in parse_rows(file, read_demonstration)]
    return [Exchange(prompt.messages, [completion], prompt.tools) for prompt, completion in rows]


def _nll(network: object, row: Sequences) -> float:
    """Negative log-likelihood of a completion after its prompt, in nats."""
    import torch

    ids = torch.tensor([row.prompt + row.completions[0]], device=network.device)  # type: ignore[attr-defined]
    count = len(row.completions[0])
    with torch.inference_mode():
        logits = network(input_ids=ids, logits_to_keep=count + 1, use_cache=False).logits  # type: ignore[operator]
        chosen = logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, -count:, None])
    return -float(chosen.sum().item())


def _compare(source: str, rows: Sequence[Scored], confidence: float) -> Forgetting:
    """Sums over all tokens, and the change with its standard error as a ratio of two means over rows."""
    tokens, n = sum(row.tokens for row in rows), len(rows)
    before, after = sum(row.reference for row in rows) / tokens, sum(row.policy for row in rows) / tokens
    change = after - before
    off = sum((row.policy - row.reference - change * row.tokens) ** 2 for row in rows)
    interval = of_mean(change, math.sqrt(off * n / (n - 1)) / tokens, n, confidence)
    return Forgetting(source=source, rows=n, tokens=tokens, reference=before, policy=after, change=interval)
