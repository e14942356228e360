"""Batches of pairs on the CPU: padded as TRL pads them, planned as packed rows, divided by tokens.

A packed row is `[prompt, chosen, rejected]` of several pairs without padding, where the prompt is whatever chosen and
rejected begin with in common. The plan says where each of its tokens comes from and where each log-probability goes.
Reads and writes no files. Not covered: images.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_cli.training.forward import attention
from dpo_cli.training.losses import COLUMNS

TOKEN_MEANS = {  # metrics that TRL averages over the tokens of these rows; all others are means over pairs
    "entropy": "all", "kl": "all", "logits/chosen": "chosen", "mean_token_accuracy": "chosen",
    "logits/rejected": "rejected",
}  # fmt: skip


class Packing(TypedDict, total=False):
    """A padded batch of `2 * pairs` rows and `width` columns, as one row of T tokens of which N are scored.

    tokens: (T,) index of each token in the flattened batch.
    positions: (1, T) position of each token in its own row.
    scored: (N,) index among T of the token that predicts.
    targets: (N,) index of what it predicts, in the flattened (2 * pairs, width - 1).
    segments: how the row divides, for attention.
    reference: (N,) log-probabilities of the reference, where they are known.
    """

    tokens: Tensor
    positions: Tensor
    scored: Tensor
    targets: Tensor
    segments: attention.Segments
    reference: Tensor


def plan(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Packing:
    """Plan the packing of a right-padded batch, chosen rows before rejected rows; each is (2 * pairs, width)."""
    rows, width = input_ids.shape
    at = torch.arange(width)
    lengths = attention_mask.sum(1) - 1  # the last token predicts nothing, so nobody needs it
    chosen, rejected = lengths.chunk(2)
    same = torch.eq(*input_ids.chunk(2)).long().cumprod(1).sum(1)
    shared = torch.minimum(same, torch.minimum(chosen, rejected))
    own = rejected - shared
    starts = ((chosen + own).cumsum(0) - (chosen + own))[:, None]
    kept = torch.stack([at < chosen[:, None], (at >= shared[:, None]) & (at < rejected[:, None])], 1)
    cells = torch.arange(rows * width).view(2, -1, width).transpose(0, 1)
    of_rejected = torch.where(at < shared[:, None], starts + at, starts + at + (chosen - shared)[:, None])
    places = torch.cat([starts + at, of_rejected])
    predicted = completion_mask[:, 1:].bool()
    return {
        "tokens": cells[kept],
        "positions": at.expand_as(kept)[kept][None],
        "scored": places[:, :-1][predicted],
        "targets": predicted.flatten().nonzero()[:, 0],
        "segments": attention.segments(chosen, rejected, shared),
    }


def row_key(ids: Tensor, completion: Tensor) -> str:
    """Content hash of one row: its token ids (n,) and where its completion is (n,)."""
    return hashlib.sha256(ids.int().numpy().tobytes() + completion.bool().numpy().tobytes()).hexdigest()[:32]


def row_keys(batch: Mapping[str, Any]) -> list[str]:
    """Content hashes of the rows of a batch on the CPU."""
    lengths = batch["attention_mask"].sum(1).tolist()
    return [
        row_key(ids[:length], mask[:length])
        for ids, mask, length in zip(batch["input_ids"], batch["completion_mask"], lengths, strict=True)
    ]


@dataclass
class Collator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, which also plans the packing and divides a batch into parts.

    Args:
        tokens_per_batch: most tokens in a forward; a batch with more is divided. None: it never is.
        pack: False where the model is left to TRL's forward; tokens then count with their padding.
        reference: row key -> log-probabilities of the reference at the row's completion tokens.
    """

    tokens_per_batch: int | None = None
    pack: bool = True
    reference: Mapping[str, Tensor] | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate pairs; a batch that is divided holds its parts, whole batches each, under `parts`."""
        batch: dict[str, Any] = super().torch_call(examples)
        batch |= {name: torch.tensor([row[name] for row in examples]) for name in COLUMNS if name in examples[0]}
        if self.tokens_per_batch is None:
            return self._planned(batch)
        lengths = batch["attention_mask"].sum(1)
        order = torch.maximum(*lengths.chunk(2)).argsort(descending=True, stable=True)
        groups = self._groups(batch, order)
        batch["parts"] = [self._planned(_pick(batch, torch.tensor(group))) for group in groups]
        return batch

    def _groups(self, batch: dict[str, Tensor], order: Tensor) -> Iterator[list[int]]:
        """Pairs, longest first, in groups of at most `tokens_per_batch` tokens, a single pair at least."""
        assert self.tokens_per_batch is not None
        lengths = batch["attention_mask"].sum(1)
        chosen, rejected = lengths.chunk(2)
        shared = torch.eq(*batch["input_ids"].chunk(2)).long().cumprod(1).sum(1).minimum(chosen).minimum(rejected)
        packed, longest = (chosen + rejected - shared).tolist(), torch.maximum(chosen, rejected).tolist()
        group: list[int] = []
        for pair in order.tolist():
            grown = [*group, pair]
            cost = sum(packed[i] for i in grown) if self.pack else 2 * len(grown) * longest[grown[0]]
            if group and cost > self.tokens_per_batch:
                yield group
                grown = [pair]
            group = grown
        yield group

    def _planned(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.pack:
            packing = plan(batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
            if self.reference is not None:
                known = [self.reference.get(key) for key in row_keys(batch)]
                if None not in known:
                    packing["reference"] = torch.cat(known)  # type: ignore[arg-type]
            batch["packing"] = packing
        return batch


def _pick(batch: dict[str, Tensor], pairs: Tensor) -> dict[str, Tensor]:
    """Some pairs of a padded batch, as narrow as they allow."""
    rows = torch.cat([pairs, pairs + len(batch["input_ids"]) // 2])
    width = int(batch["attention_mask"][rows].sum(1).max())
    padded = {name: batch[name][rows, :width] for name in ("input_ids", "attention_mask", "completion_mask")}
    return padded | {name: batch[name][pairs] for name in COLUMNS if name in batch}


def parts(batch: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """(share of the batch's pairs, part) of a batch; the shares add up to 1."""
    divided = batch.get("parts")
    if divided is None:
        return [(1.0, batch)]
    return [(len(part["input_ids"]) / len(batch["input_ids"]), part) for part in divided]


@contextmanager
def merged(metrics: dict[str, list[float]], batch: dict[str, Any]) -> Iterator[None]:
    """Make one value of what the parts of a batch append to each metric: the value of the undivided batch."""
    before = {name: len(values) for name, values in metrics.items()}
    yield
    divided = [part for _, part in parts(batch)]
    if len(divided) == 1:
        return
    tokens = torch.stack([part["completion_mask"][:, 1:].sum(1).view(2, -1).sum(1) for part in divided]).tolist()
    weights = {
        "all": [sum(counts) for counts in tokens],
        "chosen": [counts[0] for counts in tokens],
        "rejected": [counts[1] for counts in tokens],
        "pairs": [len(part["input_ids"]) for part in divided],
    }
    for name, values in metrics.items():
        added = values[before.get(name, 0) :]
        if len(added) == len(divided):  # `num_tokens` is a total so far, and replaced each time
            by = weights[TOKEN_MEANS.get(name, "pairs")]
            mean = sum(value * weight for value, weight in zip(added, by, strict=True)) / sum(by)
            values[before.get(name, 0) :] = [mean]
