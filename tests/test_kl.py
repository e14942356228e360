"""KL on sampled completions against whole forwards of the same models, for every architecture."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, make
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from dpo_cli.engines._batch import choose, uniforms_of
from dpo_cli.training.kl import SampledKl, mean_length

PROMPTS = [[5 + (7 * row + 3 * at) % 300 for at in range(length)] for row, length in enumerate((30, 9, 17))]
TOKENS = 12


def measured(kind: str, folder: Any) -> tuple[Any, Any, SampledKl, list[int]]:
    """Policy, reference, what is measured of them, and how many prompts each has been given to read."""
    base = make(folder / kind, kind)
    policy, other = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() for _ in range(2))
    torch.manual_seed(1)
    with torch.no_grad():
        for value in policy.parameters():
            value.add_(0.1 * value.std() * torch.randn_like(value)) if value.numel() > 1 else None
    ends: list[int] = []
    for model in (policy, other):
        model.register_forward_pre_hook(
            lambda module, arguments, named: ends.append(named["input_ids"].shape[1]), with_kwargs=True
        )
    return policy, other, SampledKl(policy, lambda: nullcontext(other), PROMPTS, TOKENS, {7}, 3, nullcontext), ends


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_is_that_of_whole_forwards(kind, tmp_path):
    policy, other, sampled_kl, _ = measured(kind, tmp_path)
    completions, nats = sampled_kl.measure()
    assert mean_length(completions) > 4
    with torch.no_grad():
        for prompt, completion, seed, own in zip(PROMPTS, completions, sampled_kl.seeds, nats, strict=True):
            ids = torch.tensor([prompt + completion])
            where = slice(len(prompt) - 1, -1)
            ours, theirs = (model(input_ids=ids).logits[0, where] for model in (policy, other))
            drawn = choose(ours, uniforms_of(seed, TOKENS)[: len(completion)], 1.0, 1.0)
            assert drawn.tolist() == completion and 7 not in completion[:-1]
            expected = kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), reduction="sum", log_target=True).item()
            assert own == pytest.approx(expected, rel=1e-3) and own > 1e-4
    assert sampled_kl.nats(completions) == pytest.approx(nats, rel=1e-6)


def test_the_reference_reads_the_prompts_once(tmp_path):
    _, _, sampled_kl, lengths = measured("llama", tmp_path)
    first = sampled_kl.measure()
    reads = [[length for length in lengths if length in map(len, PROMPTS)]]
    lengths.clear()
    assert sampled_kl.measure() == first
    reads.append([length for length in lengths if length in map(len, PROMPTS)])
    once = list(map(len, PROMPTS))
    assert reads == [once * 2, once]
    lengths.clear()
    assert len(sampled_kl.of_reference()) == len(PROMPTS) and not set(lengths) & set(once)
