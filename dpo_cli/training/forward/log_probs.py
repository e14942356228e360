"""Log-probabilities of tokens through an output head, each position's logits made once and kept nowhere.

DPO needs one gradient of the head's input, that of log p(target), and it is known in the forward already:
`d log p(y) / dh = W[y] - sum_v p_v W[v]`, as the head itself is frozen under LoRA. So the forward keeps that (N, H)
and the backward is one multiplication; where TRL's chunked function makes the logits twice. The same sum gives the
entropy, `H = log Z - h . sum_v p_v W[v]`.

A head in bfloat16 makes logits in bfloat16, and at 20, a usual height, those are multiples of 1/8. So a product adds
itself to what is there already, minus the target's logit, before it is rounded: what counts are the logits near the
top, and their distance from the target's is small. The log-probabilities of a real model come 2.5 times nearer to
float32's so.

Reads and writes no files. Not covered, and left to TRL's function: CUDA (its Triton kernel reads each tile of logits
once), a trained head, biases, scaled or soft-capped logits, a float32 head under autocast.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

TILE = 2**24  # logits held at once: 64 MB; half as many of bfloat16, beside their exponentials in float32
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
    exact = weight.dtype == hidden.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if (
        frozen and bias is None and softcap is None and hidden.device.type == "cpu"
        and (exact or weight.dtype == torch.bfloat16)
    ):  # fmt: skip
        with torch.autocast("cpu", enabled=False):
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
        ctx.dtype = hidden.dtype
        count, vocabulary = len(hidden), len(weight)
        rounds = weight.dtype != torch.float32
        states = hidden.to(weight.dtype)
        rows = max(1, min(count, TILE // (2 if rounds else 1) // vocabulary))
        logits = states.new_empty(rows, vocabulary)
        exponentials = torch.empty(rows, vocabulary) if rounds else logits
        own, top, total, expected = (torch.empty(count) for _ in range(4))
        # What is subtracted from all logits of a row, before they are rounded.
        origin = (states.float() * weight[targets].float()).sum(-1).to(weight.dtype) if rounds else None
        squared = torch.empty(count) if squares else None
        needs_grad = ctx.needs_input_grad[0]
        mean_embedding = torch.empty_like(hidden, dtype=torch.float32) if needs_grad else None
        for start in range(0, count, rows):
            part = slice(start, min(start + rows, count))
            tile, weights = logits[: part.stop - part.start], exponentials[: part.stop - part.start]
            if origin is None:
                torch.mm(states[part], weight.t(), out=tile)
            else:
                torch.addmm(tile.copy_(origin[part, None].neg()), states[part], weight.t(), out=tile)
            own[part] = tile.gather(1, targets[part, None])[:, 0]
            top[part] = tile.amax(-1)
            weighted = tile.clone() if metrics and not needs_grad else None
            torch.sub(tile, top[part, None], out=weights).exp_()
            torch.sum(weights, -1, out=total[part])
            if squared is not None:
                squared[part] = weights.square().sum(-1)
            if mean_embedding is not None:
                mean_embedding[part] = torch.mm(tile.copy_(weights) if rounds else weights, weight)
            elif weighted is not None:
                expected[part] = (weighted * weights).sum(-1)

        log_z = top + total.log()
        if mean_embedding is not None:
            mean_embedding /= total[:, None]
            ctx.save_for_backward(weight[targets].float().sub_(mean_embedding))
        if squared is not None:
            squared = squared.log() - 2 * total.log()
            ctx.mark_non_differentiable(squared)
        if not metrics:
            return own - log_z, None, None, None, squared
        expected = expected / total if mean_embedding is None else (states * mean_embedding).sum(-1)
        if origin is not None and mean_embedding is not None:
            expected -= origin
        is_top1 = own >= top
        ctx.mark_non_differentiable(is_top1)
        mean_logits = states.float() @ weight.mean(0, dtype=torch.float32)
        return own - log_z, log_z - expected, mean_logits, is_top1, squared

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return (None if grad is None else (direction * grad[:, None]).to(ctx.dtype)), None, None, None, None
