"""Attention in blocks, bfloat16's on a CPU, against torch's own kernel in float64 and in bfloat16."""

import pytest
import torch
import torch.nn.functional as F

from dpo_cli.training.forward import attention, blockwise_attention

# Tokens, shared tokens, heads, key heads; size of values, where it is not that of keys.
SHAPES = [(300, 0, 9, 3), (130, 200, 4, 4), (1, 60, 4, 1), (64, 1, 2, 2), (257, 43, 6, 2), (200, 30, 4, 2, 24)]
SCALE = 0.25  # by which nothing is rounded


def results(attend, states, gradient):
    """The output and the gradients of queries, keys and values."""
    states = [state.detach().requires_grad_() for state in states]
    output = attend(*states)
    return [output.detach(), *torch.autograd.grad(output, states, gradient.to(output.dtype))]


def by_torch(query, key, value):
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=SCALE, enable_gqa=query.shape[1] > key.shape[1]
    )


def by_blocks(query, key, value):
    return blockwise_attention.attend(query, key, value, SCALE)


def errors(found, exact):
    return [((one.double() - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]


def states_of(tokens, shared, heads, key_heads, value_size=32):
    torch.manual_seed(0)
    keys = key_heads, shared + tokens
    sizes = (heads, tokens, 32), (*keys, 32), (*keys, value_size), (heads, tokens, value_size)
    *states, gradient = (torch.randn(1, *size) for size in sizes)
    return states, gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float32_it_is_torchs_attention(shape):
    states, gradient = states_of(*shape)
    exact = results(by_torch, [state.double() for state in states], gradient)
    assert max(errors(results(by_blocks, states, gradient), exact)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_in_bfloat16_it_is_about_as_near_as_torchs_kernel(shape):
    """That rounds no scores on the way back. A whole model's gradient shows little of it: `test_precision.py`."""
    states, gradient = states_of(*shape)
    exact = results(by_torch, [state.double() for state in states], gradient)
    query, key, value = states
    ours = errors(results(by_blocks, [query, key, value.bfloat16()], gradient), exact)
    theirs = errors(results(by_torch, [state.bfloat16() for state in states], gradient), exact)
    assert max(ours) < 0.015
    assert ours[0] < 1.3 * theirs[0] and max(ours[1:]) < 2.5 * max(theirs[1:]), (ours, theirs)


def test_scores_in_the_tens_of_thousands_come_to_finite_gradients():
    """Qwen2's key biases make such scores. Where they are rounded, e to what they then differ by would be infinite."""
    (query, key, value), gradient = states_of(140, 20, 2, 2)
    found = results(by_blocks, [200 * query, 200 * key, value.bfloat16()], gradient)
    exact = results(by_torch, [200 * query.double(), 200 * key.double(), value.double()], gradient)
    assert errors(found, exact)[0] < 0.01
    assert all(one.isfinite().all() and one.norm() < 2 * other.norm() for one, other in zip(found, exact, strict=True))


@pytest.mark.parametrize(("dtype", "lengths", "blockwise"), [
    (torch.bfloat16, (300, 280, 200), 1),  # rejected's own 80 tokens see 280: torch's kernel
    (torch.bfloat16, (90, 80, 50), 0),
    (torch.float32, (300, 280, 200), 0),
])  # fmt: skip
def test_long_rows_in_bfloat16_on_a_cpu_go_through_it_and_all_come_to_the_same(dtype, lengths, blockwise, monkeypatch):
    calls = []
    attend = blockwise_attention.attend
    monkeypatch.setattr(blockwise_attention, "attend", lambda *given: calls.append(1) or attend(*given))
    segments = attention.pair_segments(*(torch.tensor([length]) for length in lengths))
    states, _ = states_of(int(segments["query_ends"][-1]), 0, 4, 2)
    packing = {"segments": segments}
    query, key, value = (state.to(dtype) for state in states)
    found, _ = attention.forward(None, query, key, value, None, scaling=SCALE, packing=packing)
    exact = attention.split_attention(*(state.double() for state in (query, key, value)), segments, SCALE)
    assert len(calls) == blockwise
    assert max(errors([found], [exact])) < (4e-3 if blockwise else 1e-6)
