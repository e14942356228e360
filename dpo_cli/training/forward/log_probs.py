"""Log-probabilities of tokens through an output head, each position's logits made once and kept nowhere.

DPO needs one gradient of the head's input, that of log p(target), and it is known in the forward already:
`d log p(y) / dh = W[y] - sum_v p_v W[v]`, as the head itself is frozen under LoRA. So the forward keeps that (N, H)
and the backward is one multiplication; where TRL's chunked function makes the logits twice. The same sum gives the
entropy, `H = log Z - h . sum_v p_v W[v]`. Reads and writes no files. Not covered, and left to TRL's function: CUDA
(its Triton kernel reads each tile of logits once), a trained head, biases, scaled or soft-capped logits, autocast.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

TILE = 2**24  # logits held at once: 64 MB
VOCABULARY_CHUNK = 32768  # TRL's own
METRICS = ("log_probs", "entropy", "mean_logits", "is_top1")
SQUARES = "log_sum_sq_probs"


class TokenScores(NamedTuple):
    """What TRL's loss and metrics read, each of shape (N,); only `log_probs` has a gradient."""

    log_probs: Tensor
    entropy: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None
    log_sum_sq_probs: Tensor | None = None


def score(
    hidden: Tensor, head: Any, targets: Tensor, softcap: float | None, metrics: bool, squares: bool = False
) -> TokenScores:
    """Score `targets` (N,) from hidden states (N, H) through `head`, a linear layer of weight (V, H).

    Args:
        hidden: (N, H).
        head: the output embeddings.
        targets: (N,) token ids.
        softcap: Gemma's `final_logit_softcapping`.
        metrics: also the values that only metrics need.
        squares: also log sum_v p_v^2, by which WPO weighs a pair.
    """
    weight, bias = head.weight, head.bias
    frozen = not (weight.requires_grad and torch.is_grad_enabled())
    plain = bias is None and softcap is None and weight.dtype == hidden.dtype == torch.float32
    if frozen and plain and hidden.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return TokenScores(*_FrozenHead.apply(hidden, weight, targets, metrics, squares))  # type: ignore[no-untyped-call]
    outputs = (METRICS if metrics else METRICS[:1]) + (SQUARES,) * squares
    log_probs, entropy, squared, mean_logits, is_top1 = ChunkedLogProbFunction.apply(
        hidden, weight, bias, targets, 1.0, VOCABULARY_CHUNK, softcap, 1.0, outputs
    )
    return TokenScores(log_probs, entropy, mean_logits, is_top1, squared)


class _FrozenHead(torch.autograd.Function):
    """(hidden, weight, targets, metrics, squares) -> the fields of TokenScores."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, metrics: bool, squares: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        count, vocabulary = len(hidden), len(weight)
        rows = max(1, min(count, TILE // vocabulary))
        logits = hidden.new_empty(rows, vocabulary)
        top, total, expected = (hidden.new_empty(count) for _ in range(3))
        target = hidden.new_empty(count)
        squared = hidden.new_empty(count) if squares else None
        needs_grad = ctx.needs_input_grad[0]
        mean_embedding = torch.empty_like(hidden) if needs_grad else None
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            tile = logits[: part.stop - part.start]
            torch.mm(hidden[part], weight.t(), out=tile)
            target[part] = tile.gather(1, targets[part, None])[:, 0]
            torch.amax(tile, -1, out=top[part])
            weighted = tile.clone() if metrics and mean_embedding is None else None
            tile.sub_(top[part, None]).exp_()
            torch.sum(tile, -1, out=total[part])
            if squared is not None:
                squared[part] = tile.square().sum(-1)
            if mean_embedding is not None:
                torch.mm(tile, weight, out=mean_embedding[part])
            elif weighted is not None:
                torch.sum(weighted.mul_(tile), -1, out=expected[part])

        log_z = top + total.log()
        if mean_embedding is not None:
            mean_embedding /= total[:, None]
            ctx.save_for_backward(weight[targets].sub_(mean_embedding))
        if squared is not None:
            squared = squared.log() - 2 * total.log()
            ctx.mark_non_differentiable(squared)
        if not metrics:
            return target - log_z, None, None, None, squared
        expected = expected / total if mean_embedding is None else (hidden * mean_embedding).sum(-1)
        is_top1 = target >= top
        ctx.mark_non_differentiable(is_top1)
        return target - log_z, log_z - expected, hidden @ weight.mean(0), is_top1, squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (None if grad is None else direction * grad[:, None]), None, None, None, None
