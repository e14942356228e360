"""Batches on the CPU: padded as TRL pads them, planned as packed rows, divided by tokens.

A packed row holds several examples without padding. Of a pair it holds `[prompt, chosen, rejected]`, where the prompt
is whatever chosen and rejected begin with in common; of a demonstration, prompt and completion. The plan says where
each of its tokens comes from and where each log-probability goes. Reads and writes no files. Not covered: images.
"""

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from dpo_cli.training import distributed
from dpo_cli.training.encode import IGNORED
from dpo_cli.training.forward import attention
from dpo_cli.training.losses import COLUMNS

TOKEN_MEANS = {  # metrics that TRL averages over the tokens of these rows; all others are means over pairs
    "entropy": "all", "kl": "all", "logits/chosen": "chosen", "mean_token_accuracy": "chosen",
    "logits/rejected": "rejected",
}  # fmt: skip


class Packing(TypedDict, total=False):
    """A padded batch of `rows` rows and `width` columns, as one row of T tokens of which N are scored.

    tokens: (T,) index of each token in the flattened batch.
    positions: (1, T) position of each token in its own row.
    scored: (N,) index among T of the token that predicts.
    targets: (N,) index of what it predicts, in the flattened (rows, width - 1).
    segments: how the row divides, for attention.
    reference: (N,) log-probabilities of the reference, where they are known.
    routed: index among T of each token of the padded batch, where a router is to be balanced over them.
    """

    tokens: Tensor
    positions: Tensor
    scored: Tensor
    targets: Tensor
    segments: attention.Segments
    reference: Tensor
    routed: Tensor


class Size(NamedTuple):
    """Token counts of one example: its longest row, its packed row, and the completion of each of its rows."""

    longest: int
    packed: int
    scored: tuple[int, ...]


def plan_pairs(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, whole: bool = False) -> Packing:
    """Plan the packing of a right-padded batch, chosen rows before rejected rows; each is (2 * pairs, width).

    `whole` keeps the last token of each row, which predicts nothing, for a router that counts all of them.
    """
    rows, width = input_ids.shape
    at = torch.arange(width)
    lengths = attention_mask.sum(1) - (0 if whole else 1)
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
    routed: Packing = {"routed": places[attention_mask.bool()]} if whole else {}
    return routed | {
        "tokens": cells[kept],
        "positions": at.expand_as(kept)[kept][None],
        "scored": places[:, :-1][predicted],
        "targets": predicted.flatten().nonzero()[:, 0],
        "segments": attention.pair_segments(chosen, rejected, shared),
    }


def plan_rows(input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor, whole: bool = False) -> Packing:
    """Plan the packing of a right-padded batch of demonstrations; each is (rows, width); `whole` as in `plan_pairs`."""
    rows, width = input_ids.shape
    at = torch.arange(width)
    lengths = attention_mask.sum(1) - (0 if whole else 1)
    kept = at < lengths[:, None]
    starts = (lengths.cumsum(0) - lengths)[:, None]
    predicted = completion_mask[:, 1:].bool()
    routed: Packing = {"routed": (starts + at)[attention_mask.bool()]} if whole else {}
    return routed | {
        "tokens": torch.arange(rows * width).view(rows, width)[kept],
        "positions": at.expand_as(kept)[kept][None],
        "scored": (starts + at)[:, :-1][predicted],
        "targets": predicted.flatten().nonzero()[:, 0],
        "segments": attention.row_segments(lengths),
    }


def row_key(ids: Sequence[int], completion_start: int) -> str:
    """Content hash of one row: its token ids, and the index at which its completion begins."""
    return hashlib.sha256(array("i", [completion_start, *ids]).tobytes()).hexdigest()[:32]


def row_keys(batch: Mapping[str, Any]) -> list[str]:
    """Content hashes of the rows of a padded batch on the CPU."""
    lengths = batch["attention_mask"].sum(1).tolist()
    prompts = (batch["attention_mask"] - batch["completion_mask"]).sum(1).tolist()
    return [
        row_key(ids[:length], prompt)
        for ids, length, prompt in zip(batch["input_ids"].tolist(), lengths, prompts, strict=True)
    ]


def divide(sizes: Sequence[Size], budget: int, pack: bool) -> list[list[int]]:
    """Indices of examples, longest first, in groups of at most `budget` tokens, one example at least.

    Args:
        sizes: of each example.
        budget: tokens.
        pack: whether tokens count as packed; else with their padding.
    """
    groups: list[list[int]] = []
    for example in sorted(range(len(sizes)), key=lambda example: -sizes[example].longest):
        grown = [*groups[-1], example] if groups else [example]
        padded = sum(len(sizes[one].scored) for one in grown) * sizes[grown[0]].longest
        if groups and (sum(sizes[one].packed for one in grown) if pack else padded) <= budget:
            groups[-1] = grown
        else:
            groups.append([example])
    return groups


def divide_further(groups: list[list[int]], count: int) -> list[list[int]]:
    """`count` groups of the same examples: the fullest ones are halved until there are so many."""
    while len(groups) < count:
        fullest = max(range(len(groups)), key=lambda number: len(groups[number]))
        group = groups[fullest]
        groups[fullest : fullest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


@dataclass
class Dividing:
    """Mixed into one of TRL's collators, before it: plans the packing, and divides a batch into micro-batches.

    Of several processes each makes equally many micro-batches of its batch, since they wait for each other in each.

    Args:
        tokens_per_batch: most tokens in a forward; a batch with more is divided. None: it never is.
        pack: False where the model is left to TRL's forward; tokens then count with their padding.
        whole: keep each row's last token, for the router of a mixture of experts.
    """

    tokens_per_batch: int | None = None
    pack: bool = True
    whole: bool = False

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate examples; a batch that is divided holds its parts, whole batches each, under `micro_batches`.

        Beside them stand `order`, the index in the batch of each of their examples, and `weights`: what a
        micro-batch's metrics count, by the kind of their mean, summed over all processes.
        """
        batch = self.padded(examples)
        if self.tokens_per_batch is None:
            return self.planned(batch)
        sizes = self.sizes(batch)
        everywhere = distributed.gather(sizes)
        divided = [divide(theirs, self.tokens_per_batch, self.pack) for theirs in everywhere]
        most = max(map(len, divided))
        divided = [divide_further(groups, most) for groups in divided]
        groups = divided[everywhere.index(sizes)]
        batch["micro_batches"] = [self.planned(self.pick(batch, torch.tensor(group))) for group in groups]
        batch["order"] = torch.tensor([example for group in groups for example in group])
        counts = [self.weights([sizes[example] for example in group])["examples"] for group in groups]
        batch["shares"] = [count / max(1, sum(counts)) for count in counts]
        batch["weights"] = [
            self.weights(
                [theirs[example] for theirs, group in zip(everywhere, column, strict=True) for example in group]
            )
            for column in zip(*divided, strict=True)
        ]
        return batch

    def padded(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch as TRL makes it, neither planned nor divided."""
        batch: dict[str, Any] = super().torch_call(examples)  # type: ignore[misc]
        return batch | {name: torch.tensor([row[name] for row in examples]) for name in COLUMNS if name in examples[0]}

    def sizes(self, batch: dict[str, Tensor]) -> list[Size]:
        """Sizes of the examples of a batch."""
        raise NotImplementedError

    def pick(self, batch: dict[str, Tensor], examples: Tensor) -> dict[str, Tensor]:
        """Some examples of a batch, as narrow as they allow."""
        raise NotImplementedError

    def planned(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its packing."""
        raise NotImplementedError

    def weights(self, sizes: Sequence[Size]) -> dict[str, int]:
        """What the metrics of these examples count, by the kind of their mean: tokens of some rows, or examples."""
        raise NotImplementedError


@dataclass
class PairCollator(Dividing, DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator of preference pairs, planned and divided.

    Args:
        reference: row key -> log-probabilities of the reference at the row's completion tokens.
    """

    reference: Mapping[str, Tensor] | None = None

    def sizes(self, batch: dict[str, Tensor]) -> list[Size]:
        """Sizes of the pairs; what chosen and rejected begin with in common is packed once."""
        chosen, rejected = batch["attention_mask"].sum(1).chunk(2)
        shared = torch.eq(*batch["input_ids"].chunk(2)).long().cumprod(1).sum(1).minimum(chosen).minimum(rejected)
        scored = batch["completion_mask"][:, 1:].sum(1).view(2, -1).t().tolist()
        longest, packed = torch.maximum(chosen, rejected).tolist(), (chosen + rejected - shared).tolist()
        return [Size(*size[:2], tuple(size[2])) for size in zip(longest, packed, scored, strict=True)]

    def pick(self, batch: dict[str, Tensor], examples: Tensor) -> dict[str, Tensor]:
        """Some pairs of a batch, as narrow as they allow."""
        rows = torch.cat([examples, examples + len(batch["input_ids"]) // 2])
        return _narrow(batch, rows) | {name: batch[name][examples] for name in COLUMNS if name in batch}

    def planned(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its packing, and with the reference's log-probabilities where all are known."""
        if self.pack:
            packing = plan_pairs(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], self.whole)
            if self.reference is not None:
                known = [self.reference.get(key) for key in row_keys(batch)]
                if None not in known:
                    packing["reference"] = torch.cat(known)  # type: ignore[arg-type]
            batch["packing"] = packing
        return batch

    def weights(self, sizes: Sequence[Size]) -> dict[str, int]:
        """Completion tokens of all, of chosen and of rejected rows, and pairs."""
        chosen, rejected = (sum(size.scored[side] for size in sizes) for side in (0, 1))
        return {"all": chosen + rejected, "chosen": chosen, "rejected": rejected, "examples": len(sizes)}


@dataclass
class DemonstrationCollator(Dividing, DataCollatorForLanguageModeling):  # type: ignore[misc]
    """TRL's collator of demonstrations with labels, planned and divided."""

    def sizes(self, batch: dict[str, Tensor]) -> list[Size]:
        """Sizes of the demonstrations."""
        lengths = batch["attention_mask"].sum(1).tolist()
        scored = (batch["labels"][:, 1:] != IGNORED).sum(1).tolist()
        return [Size(length, length, (count,)) for length, count in zip(lengths, scored, strict=True)]

    def pick(self, batch: dict[str, Tensor], examples: Tensor) -> dict[str, Tensor]:
        """Some demonstrations of a batch, as narrow as they allow."""
        return _narrow(batch, examples)

    def planned(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its packing."""
        if self.pack:
            batch["packing"] = plan_rows(
                batch["input_ids"], batch["attention_mask"], batch["labels"] != IGNORED, self.whole
            )
        return batch

    def weights(self, sizes: Sequence[Size]) -> dict[str, int]:
        """Completion tokens, for every metric."""
        tokens = sum(size.scored[0] for size in sizes)
        return dict.fromkeys(("all", "chosen", "examples"), tokens)


def _narrow(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a padded batch, as narrow as they allow."""
    width = int(batch["attention_mask"][rows].sum(1).max())
    names = ("input_ids", "attention_mask", "completion_mask", "labels")
    return {name: batch[name][rows, :width] for name in names if name in batch}


def micro_batches(batch: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """(share of the batch's examples, micro-batch) of a batch; the shares add up to 1."""
    if "micro_batches" not in batch:
        return [(1.0, batch)]
    return list(zip(batch["shares"], batch["micro_batches"], strict=True))


@contextmanager
def merged_metrics(metrics: dict[str, list[Any]], batch: dict[str, Any]) -> Iterator[None]:
    """Make one value of what micro-batches append to each metric: the value of the undivided batch."""
    before = {name: len(values) for name, values in metrics.items()}
    yield
    weights = batch.get("weights", [])
    if len(weights) < 2:
        return
    for name, values in metrics.items():
        added = values[before.get(name, 0) :]
        if len(added) == len(weights):  # `num_tokens` is a total so far, and replaced each time
            by = [weight[TOKEN_MEANS.get(name, "examples")] for weight in weights]
            mean = sum(value * weight for value, weight in zip(added, by, strict=True)) / max(1, sum(by))
            values[before.get(name, 0) :] = [mean]
