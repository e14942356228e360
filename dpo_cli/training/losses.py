"""Losses of pairs that TRL does not compute: with score gaps, and with a weight for each pair.

Reads the log-probabilities that TRL's own forward has left, so that a part more costs nothing, and writes nothing.
`train.loss_type`, `loss_weights`, `beta`, `label_smoothing` and `ld_alpha` are TRL's; where no pair has a weight and
no loss asks for scores, TRL computes the loss itself. Of its losses those in `PAIRED` are here again, since a weight
belongs to a pair and TRL returns their mean.

A gap counts in units of the mean gap of the pairs that are trained on: judges' scales differ. It is a difference of
scores, or of places: the share of all completions that a score is above. Places are what a win rate is made of: of all
policies at a KL, the one whose log-ratio is linear in the place wins most often (arXiv:2406.00832).
Not covered: WPO weights (`use_weighting`) together with these.
"""

import hashlib
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

import torch
from msgspec import Struct
from torch import Tensor
from torch.nn import functional

from dpo_cli.config.settings import TrainSection
from dpo_cli.errors import UserError
from dpo_cli.training.encode import EncodedRow

GAPS, WEIGHTS = COLUMNS = "score_gaps", "pair_weights"  # of a batch: (pairs,)


class Margins(Struct):
    """What the loss of a pair is made of, each of shape (pairs,).

    `reward` is beta times the difference of the log-ratios, `chosen` and `rejected` are log-ratios in nats; the lengths
    are of completions, in tokens; `target` is `offset_alpha` times the gap.
    """

    beta: float
    smoothing: float
    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    chosen_nll: Tensor
    target: Tensor

    @property
    def reward(self) -> Tensor:
        """Reward of the chosen side over that of the rejected one, Section 4 of arXiv:2305.18290."""
        return self.beta * (self.chosen - self.rejected)

    @property
    def mean_difference(self) -> Tensor:
        """Difference of the log-ratios of a token, in nats."""
        return self.chosen / self.chosen_tokens - self.rejected / self.rejected_tokens


def sigmoid(of: Margins) -> Tensor:
    """ODPO, Eq. 6 of arXiv:2402.10571: the reward margin is to exceed the target. Without one: DPO."""
    return -functional.logsigmoid(of.reward - of.target)


def robust(of: Margins) -> Tensor:
    """Robust DPO (arXiv:2403.00409) with the same offset."""
    margin = of.reward - of.target
    right, flipped = functional.logsigmoid(margin), functional.logsigmoid(-margin)
    return -((1 - of.smoothing) * right - of.smoothing * flipped) / (1 - 2 * of.smoothing)


def hinge(of: Margins) -> Tensor:
    """SLiC (arXiv:2305.10425) with the same offset."""
    return torch.relu(1 + of.target - of.reward)


def ipo(of: Margins) -> Tensor:
    """IPO, Eq. 17 of arXiv:2310.12036, of log-ratios a token as in TRL; it has a target of its own."""
    return (of.mean_difference - 1 / (2 * of.beta)) ** 2


def sigmoid_norm(of: Margins) -> Tensor:
    """DPO with length-normalised log-ratios, with the same offset."""
    return -functional.logsigmoid(of.beta * of.mean_difference - of.target)


def rebel(of: Margins) -> Tensor:
    """REBEL, Eq. 3 of arXiv:2404.16767: the reward margin is to equal the target, neither more nor less."""
    return (of.reward - of.target) ** 2


PAIRED: dict[str, Callable[[Margins], Tensor]] = {
    "sigmoid": sigmoid,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "rebel": rebel,
}
WITH_OFFSET = {"sigmoid", "robust", "hinge", "sigmoid_norm", "rebel"}
SFT = "sft"
OURS = {"rebel"}  # TRL does not know them


class PairLoss:
    """The weighted sum of the losses of `[train]`, for a batch of pairs that has scores or weights.

    Args:
        section: settings; `check` has passed them.
        offset_alpha: what a pair of the mean gap must gain, in reward.
        rows: the pairs that are trained on.

    Raises:
        UserError: there is an offset, and a pair has no gap, or none has one above 0.
    """

    def __init__(self, section: TrainSection, offset_alpha: float, rows: Sequence[EncodedRow]) -> None:
        self.types = loss_types(section)
        self.type_weights = section.loss_weights or [1.0] * len(self.types)
        self.smoothing, self.ld_alpha = section.label_smoothing, section.ld_alpha
        self.mean_weight = fmean(row.weight for row in rows)
        self.places = places(rows) if section.gap_by == "rank" else None
        self.offset = offset_alpha / self._mean_gap(rows) if offset_alpha else 0.0

    def __call__(
        self, policy: Tensor, reference: Tensor, mask: Tensor, beta: float, columns: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of a batch.

        Args:
            policy: (2 * pairs, tokens) log-probabilities, chosen before rejected, 0 outside the completions.
            reference: the same.
            mask: (2 * pairs, tokens), which tokens are of completions.
            beta: strength of the pull towards the reference.
            columns: `pair_weights` and, where there is an offset, `score_gaps`, each (pairs,).
        """
        differences = (policy - reference).float()
        if self.ld_alpha is not None:
            differences = differences * length_desensitised(mask, self.ld_alpha)
        chosen, rejected = differences.sum(1).chunk(2)
        chosen_tokens, rejected_tokens = mask.sum(1).clamp(min=1).chunk(2)
        weight = columns[WEIGHTS]  # a batch without them would be a batch of another collator
        of = Margins(
            beta=beta,
            smoothing=self.smoothing,
            chosen=chosen,
            rejected=rejected,
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            chosen_nll=-(policy * mask).float().sum(1).chunk(2)[0],
            target=self.offset * columns[GAPS] if self.offset else torch.zeros_like(chosen),
        )
        total = chosen.new_zeros(())
        for name, type_weight in zip(self.types, self.type_weights, strict=True):
            if name == SFT:  # TRL's: a mean over the tokens of the chosen side
                part = (weight * of.chosen_nll).sum() / (weight * of.chosen_tokens).sum()
            else:
                part = (weight * PAIRED[name](of)).mean()
            total = total + type_weight * part
        return total

    def columns(self, rows: Sequence[EncodedRow]) -> dict[str, list[float]]:
        """The columns of a dataset that the loss reads; weights of the pairs that are trained on have a mean of 1."""
        found = {WEIGHTS: [row.weight / self.mean_weight for row in rows]}
        if self.offset:
            found[GAPS] = [self.gap(row) or 0.0 for row in rows]
        return found

    def gap(self, row: EncodedRow) -> float | None:
        """How much better the chosen side is: by score, or by place from 0 to 1; None where that is not known."""
        if self.places is None:
            return row.gap
        if row.scores is None:
            return None
        chosen, rejected = (_place(score, self.places) for score in row.scores)
        return chosen - rejected

    def _mean_gap(self, rows: Sequence[EncodedRow]) -> float:
        gaps = [gap for gap in map(self.gap, rows) if gap is not None]
        if len(gaps) < len(rows):
            what = "score_gap" if self.places is None else "chosen_score and rejected_score"
            raise UserError(
                f"{len(rows) - len(gaps)} of {len(rows)} pairs have no {what}, which the offset needs",
                where="train.offset_alpha",
                hint="pairs made by nothing-dpo pair have them; --set train.offset_alpha=0 does without",
            )
        if not fmean(gaps) > 0:
            raise UserError("the pairs' mean gap is not above 0", where="train.offset_alpha", hint=_PLAIN)
        return fmean(gaps)


def places(rows: Sequence[EncodedRow]) -> list[float]:
    """The scores of all completions that are in pairs, each completion once, ascending."""
    scores = {}
    for row in rows:
        for completion, score in zip(row.completions, row.scores or (), strict=False):
            ids = array("i", [len(row.prompt), *row.prompt, *completion])
            scores[hashlib.sha256(ids.tobytes()).digest()] = score
    return sorted(scores.values())


def _place(score: float, among: Sequence[float]) -> float:
    """The share of scores that one is above, its equals counted half."""
    return (bisect_left(among, score) + bisect_right(among, score)) / (2 * len(among))


def length_desensitised(mask: Tensor, ld_alpha: float) -> Tensor:
    """Factor of each token, (2 * pairs, tokens): 1 up to the shorter side's length, `ld_alpha` beyond (LD-DPO).

    Eq. 10 of arXiv:2409.06411.
    """
    position = mask.cumsum(1)
    shorter = torch.minimum(*mask.sum(1).chunk(2)).repeat(2)[:, None]
    return torch.where(position <= shorter, 1.0, ld_alpha)


def loss_types(section: TrainSection) -> list[str]:
    """The losses that are added up."""
    return [section.loss_type] if isinstance(section.loss_type, str) else list(section.loss_type)


def trl_settings(section: TrainSection) -> dict[str, object]:
    """Keyword arguments of TRL's DPOConfig for the loss; what TRL does not know stands as `sigmoid`."""
    known = ["sigmoid" if name in OURS else name for name in loss_types(section)]
    return {
        "beta": section.beta,
        "loss_type": known,
        "loss_weights": section.loss_weights,
        "label_smoothing": section.label_smoothing,
        "ld_alpha": section.ld_alpha,
        "use_weighting": section.use_weighting,
    }


def make(section: TrainSection, rows: Sequence[EncodedRow]) -> PairLoss | None:
    """The loss of pairs with scores or weights; None where TRL computes the loss itself.

    Raises:
        UserError: the settings don't go together, or pairs lack what they ask for.
    """
    types = loss_types(section)
    alpha = section.offset_alpha
    if alpha is None:
        alpha = 1.0 if "rebel" in types else 0.0
    check(section, types, alpha)
    weighted = any(row.weight != 1.0 for row in rows)
    if not (alpha or weighted or OURS & set(types)):
        return None
    if section.use_weighting:
        raise UserError("WPO weights go with TRL's own losses only", where="train.use_weighting", hint=_PLAIN)
    if other := next((name for name in types if name not in PAIRED and name != SFT), None):
        what = "an offset" if alpha else "pairs with weights"
        raise UserError(f"{other} does not take {what}", where="train.loss_type", hint=f"one of: {', '.join(PAIRED)}")
    return PairLoss(section, alpha, rows)


_PLAIN = "--set train.offset_alpha=0 --set pair.weights=none, or without train.use_weighting"


def check(section: TrainSection, types: Sequence[str], alpha: float) -> None:
    """Refuse settings that don't go together.

    Raises:
        UserError: they don't.
    """
    if not types:
        raise UserError("no loss", where="train.loss_type", hint="--loss-type sigmoid")
    if section.loss_weights is not None and len(section.loss_weights) != len(types):
        raise UserError(
            f"{len(section.loss_weights)} weights for {len(types)} losses ({', '.join(types)})",
            where="train.loss_weights",
            hint="one weight a loss, in their order",
        )
    if alpha and not WITH_OFFSET & set(types):
        raise UserError(f"{'+'.join(types)} takes no offset", where="train.offset_alpha", hint="--loss-type sigmoid")
    if not alpha and "rebel" in types:
        raise UserError("rebel needs scores", where="train.offset_alpha", hint="--set train.offset_alpha=1")


def of_margins(margins: Tensor, smoothing: float = 0.0) -> Tensor:
    """The sigmoid loss of each pair from its reward margin, (pairs,): Eq. 7 of arXiv:2305.18290, labels smoothed."""
    return -(1 - smoothing) * functional.logsigmoid(margins) - smoothing * functional.logsigmoid(-margins)
