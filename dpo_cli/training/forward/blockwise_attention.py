"""Causal attention in bfloat16 on a CPU: plain products, a block of queries at a time, over the keys that it can see.

torch's own kernel there is no faster in bfloat16 than in float32, and slower on the way back, which is most of its
time. As in FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691) the way back computes the probabilities again.
In float32 torch's kernel is the faster one, and below `LEAST` scores always. Reads and writes no files.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # queries
LEAST = 2**15  # scores of a head
COLUMNS = 3  # of bfloat16's 8 bits, to hold the 24 of a number in float32


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of the last tokens of `key`, each up to itself, with scores in float32 and products in value's type.

    Args:
        query: (1, heads, tokens, size) float32.
        key: (1, key heads, shared + tokens, size) float32.
        value: as key, of any size, in bfloat16; in float32 all is computed in that.
        scale: factor of the scores; None: size ** -0.5.

    Returns:
        (1, heads, tokens, size of value) of value's type.
    """
    _, heads, tokens, size = query.shape
    grouped = query.reshape(key.shape[1], heads // key.shape[1], tokens, size)
    output: Tensor = _Blockwise.apply(grouped * (scale or size**-0.5), key[0], value[0])  # type: ignore[no-untyped-call]
    return output.flatten(0, 1)[None]


class _Blockwise(torch.autograd.Function):
    """(key heads, groups, tokens, size) of scaled queries, (key heads, shared + tokens, size) of keys and of values.

    Keys and values may differ in size.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = value.new_empty(*query.shape[:3], value.shape[2])
        log_sums = torch.empty_like(query[..., 0])
        needs_gradient = any(ctx.needs_input_grad)
        for start, end, last in _blocks(query, key):
            scores = _masked_scores(query[:, :, start:end], key[:, :last])
            probabilities = scores.softmax(-1)
            if needs_gradient:
                sums = scores.amax(-1) - probabilities.amax(-1).log()
                log_sums[:, :, start:end] = sums.view_as(log_sums[:, :, start:end])
            of_block = probabilities.to(value.dtype) @ value[:, :last]
            output[:, :, start:end] = of_block.view_as(output[:, :, start:end])
        if needs_gradient:
            ctx.save_for_backward(query.to(value.dtype), key.to(value.dtype), value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As the paper's section 2.3.2: dV = P' dO, dS = P (dO V' - rowsum(dO O)), dQ = dS K, dK = dS' Q."""
        query, key, value, output, log_sums = ctx.saved_tensors
        size, value_size = key.shape[2], value.shape[2]
        of_query = torch.empty_like(query, dtype=torch.float32)
        of_key, of_value = (torch.zeros_like(states, dtype=torch.float32) for states in (key, value))
        query = _subtracting(query, log_sums)
        gradient = _subtracting(gradient, (gradient.float() * output.float()).sum(-1))
        key, value = (F.pad(states, (0, COLUMNS), value=1.0) for states in (key, value))
        for start, end, last in _blocks(query, key):
            # Log-probabilities but for rounding, by which e to a large one could be infinite: so softmax, not exp.
            probabilities = _masked_scores(query[:, :, start:end], key[:, :last]).softmax(-1)
            of_output = gradient[:, :, start:end].flatten(1, 2)
            of_scores = (of_output @ value[:, :last].mT).mul_(probabilities)
            of_value[:, :last] += probabilities.mT @ of_output[..., :value_size]
            of_query[:, :, start:end] = (of_scores @ key[:, :last, :size]).view_as(of_query[:, :, start:end])
            of_key[:, :last] += of_scores.mT @ query[:, :, start:end, :size].flatten(1, 2)
        return of_query, of_key, of_value.to(value.dtype)


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[int, int, int]]:
    """Start and end of each block of queries, and the end of its keys; blocks are alike in length."""
    tokens, shared = query.shape[2], key.shape[1] - query.shape[2]
    count = max(1, round(tokens / BLOCK))
    for block in range(count):
        start, end = block * tokens // count, (block + 1) * tokens // count
        yield start, end, shared + end


def _masked_scores(query: Tensor, key: Tensor) -> Tensor:
    """Scores (key heads, groups * block, keys); those of the keys behind a query are -inf."""
    scores = query.flatten(1, 2) @ key.mT
    block = query.shape[2]
    scores.view(*query.shape[:3], key.shape[1])[..., -block:] += _behind(block, scores.dtype)
    return scores


@functools.lru_cache(maxsize=64)
def _behind(size: int, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), -torch.inf, dtype=dtype).triu(1)


def _subtracting(states: Tensor, constant: Tensor) -> Tensor:
    """States whose product with those that have ones behind them is less by a constant a row, before it is rounded.

    The constant takes COLUMNS columns, each of what is left of it where the one before is rounded.
    """
    columns, left = [], -constant
    for _ in range(COLUMNS):
        columns.append(left.to(states.dtype))
        left = left - columns[-1].float()
    return torch.cat([states, torch.stack(columns, -1)], -1)
