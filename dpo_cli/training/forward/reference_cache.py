"""Log-probabilities of the reference, computed once and kept.

The reference never changes, so what it says of a row is worth keeping as soon as the row comes up twice: in another
epoch, another evaluation, a resumed run, a run with other settings. Rows are known by content: their token ids and
where the completion begins, under a hash of everything that the reference computes with (weights, adapter,
configuration, precision, device). Kept are the log-probabilities of single tokens, so that every loss, LD-DPO's
included, and KL find what they need.

Reads and writes `<folder>/<hash>.jsonl`. Not covered: models that are left to TRL's forward; they compute their
reference live.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec import Struct
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.trainer.utils import use_adapter

from dpo_cli import interrupts
from dpo_cli.data.resumable import Resumable
from dpo_cli.errors import Exit, UserError
from dpo_cli.interrupts import Interrupted
from dpo_cli.progress import Progress
from dpo_cli.training import distributed
from dpo_cli.training.forward.collator import PairCollator, row_key, row_keys
from dpo_cli.training.forward.packed import LOG_PROB_TOLERANCE

TOKENS = 4096  # in a forward: enough to fill a card, less memory than a training step takes
NAMES_ONLY = ("_name_or_path", "base_model_name_or_path", "transformers_version", "use_cache", "dtype")


class Known(Struct):
    """One row's log-probabilities, float32, of its completion tokens."""

    id: str
    log_probs: bytearray

    def tensor(self) -> Tensor:
        """(completion tokens,), sharing the row's memory."""
        if not self.log_probs:  # a completion that was cut away
            return torch.empty(0)
        return torch.frombuffer(self.log_probs, dtype=torch.float32)


class PairPlace(NamedTuple):
    """Where a pair stands: in `train` or `eval`, at which row; and its tokens."""

    side: str
    row: int
    tokens: int


def keep_reference(trainer: Any, folder: Path, progress: Progress, wanted: bool | None = None) -> None:
    """Look up, or compute and keep, the reference's log-probabilities of the rows that come up more than once.

    Args:
        trainer: a DPOTrainer whose forwards are packed.
        folder: where they are kept.
        progress: hears what was chosen.
        wanted: keep them for all rows or for none; None: where it saves work.

    Raises:
        UserError: what is kept is not what the reference computes, or memory does not suffice for one pair.
        Interrupted: a signal came; what was computed is kept.
    """
    collator: PairCollator = trainer.data_collator
    if wanted is False or not collator.pack:
        progress.log("reference: live, " + ("as set" if collator.pack else "as the forward is TRL's"))
        return
    passes = {"train": _train_passes(trainer), "eval": _evaluations(trainer)}
    rows = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
    used = [name for name in rows if rows[name] is not None and (wanted or passes[name] > 1)]
    if not used:
        progress.log("reference: live, as no row comes up twice")
        return
    path = folder / f"{content_key(trainer)[:16]}.jsonl"
    pairs = {
        _keys(collator, example): PairPlace(name, index, _tokens(example))
        for name in used
        for index, example in enumerate(rows[name])
    }

    def read(place: PairPlace) -> dict[str, Any]:
        found: dict[str, Any] = rows[place.side][place.row]
        return found

    # Rank 0 writes; another run may be computing just these rows, and is waited for.
    with Resumable(path, Known, wait=True) if distributed.is_main_process() else nullcontext() as kept:
        known = distributed.broadcast(kept.known if kept else {})
        missing = {id for pair in pairs for id in pair if id not in known}
        whole = [place for pair, place in pairs.items() if missing.isdisjoint(pair)]
        progress.log(
            f"reference: kept for {' and '.join(f'{name} ({passes[name]:.3g} passes)' for name in used)}; "
            f"{len(whole)} of {len(pairs)} pairs are known"
        )
        if whole:
            _check(trainer, read(whole[0]), known, path)
        # Always the same groups, whatever is known of them: a run that was killed here comes to the same values.
        groups = [group for group in _groups(pairs) if not missing.isdisjoint(id for pair in group for id in pair)]
        for first in range(0, len(groups), distributed.count()):
            # Each process computes a group; where fewer are left than processes, some compute the same one.
            own = groups[min(first + distributed.rank(), len(groups) - 1)]
            mine = _compute_what_fits(trainer, [read(pairs[pair]) for pair in own])
            gathered = distributed.gather((mine, interrupts.noted()))
            for id, log_probs in dict(itertools.chain(*(computed for computed, _ in gathered))).items():
                if id in missing:
                    known[id] = row = Known(id, bytearray(log_probs.numpy().tobytes()))
                    if kept:
                        kept.deliver(row)
            if any(signal is not None for _, signal in gathered):
                there = sum(all(id in known for id in pair) for pair in pairs)
                raise Interrupted(f"the reference of {there} of {len(pairs)} pairs is kept")
    collator.reference = {id: row.tensor() for id, row in known.items()}


def content_key(trainer: Any) -> str:
    """Hash of everything that the reference computes with."""
    model = trainer.ref_model or trainer.model
    adapters = getattr(model, "peft_config", {})
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if ".default." not in name:  # what is trained
            if isinstance(value, DTensor):  # sharded over the processes: each hashes its part
                value = value.to_local()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    settings = [
        model.config.to_dict(),
        adapters["ref"].to_dict() if "ref" in adapters else None,
        [trainer.args.bf16, trainer.args.fp16, torch.get_float32_matmul_precision(), trainer.args.device.type],
    ]
    for one in settings:
        kept = {key: value for key, value in one.items() if key not in NAMES_ONLY} if isinstance(one, dict) else one
        digest.update(json.dumps(kept, sort_keys=True, default=str).encode())
    parts = distributed.gather(digest.hexdigest())
    return parts[0] if len(set(parts)) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _train_passes(trainer: Any) -> float:
    """How often a training row comes up."""
    if trainer.args.max_steps <= 0:
        return float(trainer.args.num_train_epochs)
    return float(trainer.args.max_steps * _pairs_a_step(trainer) / len(trainer.train_dataset))


def _evaluations(trainer: Any) -> float:
    """How often a held-out row comes up; the last step is evaluated whatever its number."""
    steps = math.ceil(_train_passes(trainer) * len(trainer.train_dataset) / _pairs_a_step(trainer))
    return float(math.ceil(steps / trainer.args.eval_steps)) if trainer.args.eval_strategy == "steps" else 1.0


def _pairs_a_step(trainer: Any) -> int:
    own = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    return int(own * distributed.count())


def _plain(collator: PairCollator) -> PairCollator:
    return dataclasses.replace(collator, tokens_per_batch=None, reference=None, pack=True)


def _keys(collator: PairCollator, example: dict[str, list[int]]) -> tuple[str, str]:
    """(key of chosen, key of rejected) of a pair, cut as the collator cuts it."""
    prompt = example["prompt_ids"]
    chosen, rejected = (prompt + example[name] for name in ("chosen_ids", "rejected_ids"))
    most = collator.max_length
    if most is None:
        return row_key(chosen, len(prompt)), row_key(rejected, len(prompt))
    from_start = collator.truncation_mode == "keep_start"

    def cut(row: list[int]) -> str:
        start = min(len(prompt), most) if from_start else max(0, len(prompt) - max(0, len(row) - most))
        return row_key(row[:most] if from_start else row[-most:], start)

    return cut(chosen), cut(rejected)


def _groups(pairs: dict[tuple[str, str], PairPlace]) -> Iterator[list[tuple[str, str]]]:
    """Keys of pairs of like length together, at most TOKENS in a group, one pair at least."""
    group: list[tuple[str, str]] = []
    tokens = 0
    for pair in sorted(pairs, key=lambda pair: (pairs[pair].tokens, pair)):
        more = pairs[pair].tokens
        if group and tokens + more > TOKENS:
            yield group
            group, tokens = [], 0
        group.append(pair)
        tokens += more
    yield group


def _tokens(example: dict[str, Any]) -> int:
    return sum(len(example[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


def _compute_what_fits(trainer: Any, examples: list[dict[str, Any]]) -> list[tuple[str, Tensor]]:
    """(row key, log-probabilities) of pairs from `_compute`, in halves where memory does not suffice for all."""
    try:
        return list(_compute(trainer, examples))
    except torch.OutOfMemoryError:
        if len(examples) == 1:
            raise UserError(
                "memory does not suffice for the reference's forward of one pair",
                hint="lower train.max_length, or set train.load_in_4bit = true",
                code=Exit.FAILED,
            ) from None
    half = len(examples) // 2  # outside of `except`, where the failed forward's memory is free
    return _compute_what_fits(trainer, examples[:half]) + _compute_what_fits(trainer, examples[half:])


def _compute(trainer: Any, examples: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """(row key, its log-probabilities under the reference) of pairs."""
    collated = _plain(trainer.data_collator)(examples)
    batch = trainer._prepare_inputs(collated)
    model = trainer.ref_model or trainer.model
    adapters = getattr(model, "peft_config", None)
    model.eval()
    with (
        torch.no_grad(),
        nullcontext() if adapters is None else use_adapter(model, "ref" if "ref" in adapters else None),
        trainer.accelerator.autocast(),
    ):
        log_probs = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            labels=batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100),
            packing=batch["packing"],
            fused_lm_head=True,
        ).log_probs
    scored = collated["completion_mask"][:, 1:].bool()
    for key, row, mask in zip(row_keys(collated), log_probs.float().cpu(), scored, strict=True):
        yield key, row[mask]


def _check(trainer: Any, example: dict[str, Any], known: dict[str, Known], path: Path) -> None:
    tolerance = LOG_PROB_TOLERANCE[torch.bfloat16 if trainer.args.bf16 else trainer.model.dtype]
    for key, log_probs in _compute(trainer, [example]):
        if not (log_probs - known[key].tensor()).abs().sum() <= tolerance * max(1, len(log_probs)):  # also for NaN
            raise UserError(
                "it does not hold what this reference computes",
                where=str(path),
                hint="delete it",
                code=Exit.FAILED,
            )
