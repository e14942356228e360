"""The card that goes with what is pushed: a README.md with the Hub's metadata, from what the run measured.

Takes facts, returns text. It claims nothing that no file says: what is not known is left out, and a gate that says no
is written as such.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli import __version__
from dpo_cli.adapter import Adapter
from dpo_cli.analysis.data_stats import PairStats
from dpo_cli.models.adapter_settings import RANKS
from dpo_cli.training.gates import Gate
from dpo_cli.training.run_history import Merged, Trained

TAG = "nothing-dpo"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
SETTINGS = (
    "learning_rate", "beta", "loss_type", "label_smoothing", "lr_scheduler_type", "warmup_steps", "warmup_ratio",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed",
)  # fmt: skip


class Facts(Struct, kw_only=True):
    """What is known of a model: `config` is the run's config.json; empty where nothing is known."""

    name: str
    base: str
    served_as: str
    adapter: Adapter | None = None
    report: Trained | None = None
    config: dict[str, Any] = msgspec.field(default_factory=dict)
    judge: dict[str, Any] = msgspec.field(default_factory=dict)
    evaluation: dict[str, Any] = msgspec.field(default_factory=dict)
    is_merged: bool = False
    merged: Merged | None = None


def of_model(facts: Facts) -> str:
    """The card of an adapter or a model."""
    parts = [
        _header(_model_metadata(facts)),
        f"# {facts.name}",
        _what_it_is(facts),
        _gates(facts.report),
        _evaluation(facts.evaluation),
        _training(facts),
        _hashes(facts),
        _use(facts),
        f"Made by nothing-dpo {__version__}; the numbers are the run's own.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def of_data(name: str, numbers: PairStats, judge: dict[str, Any], hashes: Mapping[str, str]) -> str:
    """The card of preference pairs."""
    splits = {"train": "train", "val": "validation"}
    files = [{"split": splits[side], "path": f"{side}.jsonl"} for side in numbers.pairs]
    metadata: dict[str, Any] = {"tags": ["preference", "dpo", TAG], "task_categories": ["text-generation"]}
    if files:
        metadata["configs"] = [{"config_name": "default", "data_files": files}]
    counts = " and ".join(f"{count:,} in {side}.jsonl" for side, count in numbers.pairs.items())
    gap = f" Their scores are {numbers.gaps.mean:.3g} apart on average." if numbers.gaps else ""
    parts = [
        _header(metadata),
        f"# {name}",
        f"Preference pairs in TRL's conversational format, {counts}; no prompt is in both.{gap}" if counts else None,
        _judged_by(judge),
        _table(("file", "SHA-256"), [(f"`{file}`", f"`{value}`") for file, value in hashes.items()]),
        f"Made by nothing-dpo {__version__}.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def is_hub_id(base: str) -> bool:
    """Whether a base can be named on the Hub: `owner/name`, and no path."""
    return HUB_ID.fullmatch(base) is not None


def _model_metadata(facts: Facts) -> dict[str, Any]:
    is_adapter = facts.adapter is not None and not facts.is_merged
    metadata: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*(["dpo"] if _is_dpo(facts) else []), *(["lora"] if is_adapter else []), TAG],
    }
    if is_hub_id(facts.base):
        metadata |= {"base_model": facts.base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return metadata


def _header(metadata: dict[str, Any]) -> str:
    import yaml

    return f"---\n{yaml.safe_dump(metadata, sort_keys=True, allow_unicode=True).rstrip()}\n---"


def _is_dpo(facts: Facts) -> bool:
    return facts.report is not None and facts.report.stage == "dpo"


def _what_it_is(facts: Facts) -> str:
    shape = "A model"
    if facts.adapter is not None:
        shape = f"A LoRA adapter of rank {facts.adapter.rank} (alpha {facts.adapter.alpha:g})"
        shape += " folded into" if facts.is_merged else " for"
        shape += f" {_code(facts.base)}"
    how = ""
    if _is_dpo(facts):
        against = "its own SFT adapter" if _identity(facts)["model"]["adapter_sha256"] else "the base model"
        how = f", trained by Direct Preference Optimization against {against}"
    elif facts.report is not None:
        how = ", trained by supervised fine-tuning"
    return f"{shape}{how}.{_merging(facts.merged)}"


def _merging(merged: Merged | None) -> str:
    if not merged:
        return ""
    off = f"{merged.mean_difference:.2g} nats a token from the adapter's on average"
    return f" Its log-probabilities are {off} ({merged.dtype}; up to {merged.tolerance:g} is rounding)."


def _gates(report: Trained | None) -> str:
    if report is None:
        return "**No report**: no run of nothing-dpo is known to have made these weights."
    verdict = f"**Gates: {report.verdict}.**" if report.verdict else "**No verdict.**"
    rows = [(f"`{name}`", *_gate(gate)) for name, gate in report.gates.items()]
    return f"{verdict}\n\n" + _table(("gate", "value", "interval", "limit", ""), rows)


def _gate(gate: Gate) -> tuple[str, str, str, str]:
    interval = f"{gate.interval[0]:.3g} to {gate.interval[1]:.3g}" if gate.interval else ""
    return f"{gate.value:.4g}", interval, f"{gate.limit:.4g}", gate.verdict


def _evaluation(found: dict[str, Any]) -> str:
    if not found:
        return ""
    low, high = found["interval"]
    text = f"Against the reference on {found['n']:,} held-out prompts: win rate {found['win_rate']:.3f}"
    text += f" (95% interval {low:.3f} to {high:.3f})"
    controlled = found.get("length_controlled_win_rate")
    if controlled is not None and math.isfinite(controlled):
        text += f", length-controlled {controlled:.3f}"
    return f"## Evaluation\n\n{text}. {_judged_by(found.get('judge') or {})}".rstrip()


def _training(facts: Facts) -> str:
    report = facts.report
    if report is None:
        return ""
    unit = "preference pairs" if report.stage == "dpo" else "demonstrations"
    rows = f"{report.rows:,} {unit}, {report.held_out:,} held out."
    used = _identity(facts)["train" if report.stage == "dpo" else "sft"]
    settings = [(f"`{key}`", _code(used[key])) for key in SETTINGS if used.get(key) is not None]
    settings.append(("steps", f"{report.step} of {report.steps}, best: {_code(report.best_checkpoint)}"))
    return "\n\n".join(
        filter(None, ["## Training", f"{rows} {_judged_by(facts.judge)}".rstrip(), _table(("setting", ""), settings)])
    )


def _hashes(facts: Facts) -> str:
    rows: list[tuple[str, str | None]] = [] if facts.adapter is None else [("adapter", facts.adapter.sha256)]
    if facts.report is not None:
        identity = _identity(facts)
        rows += [
            ("reference", facts.report.reference_sha256),
            ("base, of its files' edges", identity["model"]["base_sha256"]),
        ]
        rows += list(identity["data"]["sha256"].items())
    table = _table(("SHA-256", ""), [(name, f"`{value}`") for name, value in rows if value])
    versions = ", ".join(f"{name} {version}" for name, version in facts.config.get("versions", {}).items())
    return "\n\n".join(filter(None, ["## Provenance" if rows else "", table, versions]))


def _use(facts: Facts) -> str:
    if facts.adapter is None or facts.is_merged:
        return ""
    rank = next(allowed for allowed in RANKS if allowed >= facts.adapter.rank)
    lora = f"--enable-lora --max-lora-rank {rank} --lora-modules {facts.served_as}=PATH"
    return f"## Use\n\n```bash\nvllm serve {facts.base} {lora}\n```"


def _judged_by(judge: dict[str, Any]) -> str:
    known = [f"{key} {_code(value)}" for key, value in judge.items() if isinstance(value, str | int | float) and value]
    known += [f"{key} {', '.join(map(_code, value))}" for key, value in judge.items() if isinstance(value, list)]
    return f"Judged by: {', '.join(known)}." if known else ""


def _identity(facts: Facts) -> dict[str, Any]:
    identity: dict[str, Any] = facts.config["identity"]
    return identity


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(value: object) -> str:
    """As code, on one line, and harmless in a table."""
    text = " ".join(str(value).split()).replace("`", "'").replace("|", "¦")
    return f"`{text[:80]}`"
