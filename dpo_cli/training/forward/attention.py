"""Attention over rows that hold `[prompt, chosen, rejected]` of several pairs, each prompt once, or several examples.

Chosen attends to its prompt and itself, rejected to the same prompt and itself, nobody to another example. Registered
with transformers as `shared_prefix`; calls without a packing (generation, plain forwards) go to its `sdpa`.

On a CPU each pair is two calls of scaled dot product attention. On CUDA that is measured once a card and shape
against one variable-length call for all pairs, and the faster one is used. The CUDA side was written against torch
2.13's source, with its calls checked on fake tensors; it has not been run on a card. Reads and writes no files. Not
covered: sliding windows, attention dropout, soft-capped scores, position biases.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo_cli.training.forward import blockwise_attention

NAME = "shared_prefix"


class Segments(TypedDict):
    """Where a packed row of T tokens divides; pair by pair `[shared, rest of chosen, rest of rejected]`.

    lengths: (tokens before rejected's own, shared tokens, rejected's own tokens) of each pair.
    keys: (K,) packed index of each key, for a variable-length call: pair by pair `[shared, chosen, shared, rejected]`;
        None where keys are the row as it stands.
    query_ends: (2 * pairs + 1,) int32, where chosen's and rejected's queries end among T; starts with 0.
    key_ends: (2 * pairs + 1,) int32, the same among K.
    most_queries: the longest run of queries.
    most_keys: the longest run of keys.
    """

    lengths: list[tuple[int, int, int]]
    keys: Tensor | None
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float | None], Tensor]


def pair_segments(chosen: Tensor, rejected: Tensor, shared: Tensor) -> Segments:
    """Divide a row of pairs by the lengths (pairs,) of prompt plus chosen, prompt plus rejected, and both alike."""
    own = rejected - shared
    starts = (chosen + own).cumsum(0) - (chosen + own)
    at = torch.arange(int(torch.maximum(chosen, rejected).max()))
    of_chosen, of_rejected = starts[:, None] + at, starts[:, None] + at + (chosen - shared)[:, None]
    of_rejected = torch.where(at < shared[:, None], of_chosen, of_rejected)
    key_lengths = torch.stack([chosen, rejected], 1)
    return {
        "lengths": list(zip(chosen.tolist(), shared.tolist(), own.tolist(), strict=True)),
        "keys": torch.stack([of_chosen, of_rejected], 1)[at < key_lengths[..., None]],
        "query_ends": _ends(torch.stack([chosen, own], 1)),
        "key_ends": _ends(key_lengths),
        "most_queries": int(torch.maximum(chosen, own).max()),
        "most_keys": int(key_lengths.max()),
    }


def row_segments(lengths: Tensor) -> Segments:
    """Divide a row of independent examples by their lengths (rows,)."""
    ends, longest = _ends(lengths), int(lengths.max())
    return {
        "lengths": [(length, 0, 0) for length in lengths.tolist()],
        "keys": None,
        "query_ends": ends,
        "key_ends": ends,
        "most_queries": longest,
        "most_keys": longest,
    }


def _ends(lengths: Tensor) -> Tensor:
    return F.pad(lengths.flatten().cumsum(0), (1, 0)).int()


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packing: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls.

    Args:
        module: the attention layer.
        query: (batch, heads, tokens, head size); batch is 1 where there is a packing.
        key: (batch, key heads, tokens, head size).
        value: as key.
        attention_mask: unused where there is a packing.
        scaling: factor of the scores.
        packing: from `collator.plan_pairs` or `plan_rows`; None for an ordinary call.
        **kwargs: what `sdpa` takes.
    """
    if packing is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output
    kernel = _kernel(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])
    if query.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            value = value if value.dtype == torch.bfloat16 else value.float()
            return kernel(query.float(), key.float(), value, packing["segments"], scaling), None
    return kernel(query, key, value, packing["segments"], scaling), None


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def split_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """Two calls a pair; (1, heads, T, size) -> (1, T, heads, size)."""
    sizes = [size for before, _, own in segments["lengths"] for size in (before, own)]
    queries, keys, values = (iter(torch.split(states, sizes, dim=2)) for states in (query, key, value))
    outputs = []
    for _, shared, own in segments["lengths"]:
        q, k, v = next(queries), next(keys), next(values)
        outputs.append(_causal(q, k, v, scale))
        q, own_k, own_v = next(queries), next(keys), next(values)
        if own:
            k, v = torch.cat([k[:, :, :shared], own_k], 2), torch.cat([v[:, :, :shared], own_v], 2)
            outputs.append(_causal(q, k, v, scale))
    return torch.cat([output.transpose(1, 2) for output in outputs], 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of the last tokens of `key`, each up to itself."""
    if value.dtype != query.dtype:  # bfloat16 on a CPU, where torch's kernel is no faster in it than in float32
        if query.shape[2] * key.shape[2] >= blockwise_attention.LEAST:
            return blockwise_attention.attend(query, key, value, scale)
        value = value.float()
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] == key.shape[2]:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=groups > 1)
    if not query.is_cuda:
        mask = _lower_right_mask(query.shape[2], key.shape[2])
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=groups > 1)
    from torch.nn.attention.bias import causal_lower_right

    if groups > 1:  # the kernels behind this bias take no grouped heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    bias = causal_lower_right(query.shape[2], key.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)


@functools.lru_cache(maxsize=64)  # every layer of a step asks for the same few
def _lower_right_mask(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """One FlashAttention call for all pairs; float16 and bfloat16 on CUDA only."""
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    if segments["keys"] is not None:
        keys, values = (states.index_select(0, segments["keys"]) for states in (keys, values))
    output = varlen_attn(
        queries,
        keys,
        values,
        segments["query_ends"],
        segments["key_ends"],
        segments["most_queries"],
        segments["most_keys"],
        scale=scale,
        window_size=(-1, 0),
        enable_gqa=queries.shape[1] != keys.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


@functools.cache
def _kernel(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> Kernel:
    """The fastest kernel that runs here; chosen once a process."""
    if device.type != "cuda":
        return split_attention
    times: dict[float, Kernel] = {}
    for kernel in (split_attention, varlen_attention):
        try:
            times[_time(kernel, device, dtype, heads, key_heads, size)] = kernel
        except (ImportError, RuntimeError, TypeError, ValueError):  # this card, dtype or torch has no such kernel
            continue
    return times[min(times)] if times else split_attention


def _time(kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> float:
    """Seconds that forward and backward take for four pairs of ordinary length."""
    lengths = torch.full((4,), 512)
    pairs = pair_segments(lengths, lengths, lengths // 2)
    assert pairs["keys"] is not None
    pairs["keys"] = pairs["keys"].to(device)
    pairs["query_ends"], pairs["key_ends"] = pairs["query_ends"].to(device), pairs["key_ends"].to(device)
    tokens = sum(before + own for before, _, own in pairs["lengths"])
    query, key, value = (
        torch.ones(1, count, tokens, size, device=device, dtype=dtype, requires_grad=True)
        for count in (heads, key_heads, key_heads)
    )
    best = float("inf")
    with torch.enable_grad():
        for _ in range(5):  # the first ones warm up
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            torch.autograd.backward(kernel(query, key, value, pairs, None).sum())
            torch.cuda.synchronize(device)
            best = min(best, time.perf_counter() - start)
    return best
