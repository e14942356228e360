"""KL(policy || reference) in the policy's own words: completions sampled at temperature 1, then the exact sum.

At each position of a sampled completion the sum goes over the whole vocabulary, so the estimate is exact but for the
choice of prompts and samples. Reads and writes nothing. Not covered: completions beyond the length asked for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from dpo_cli.engines._batch import choose
from dpo_cli.engines._unpadded import complete, keeps_states


@torch.no_grad()
def sample(
    model: Any,
    prompts: list[list[int]],
    tokens: int,
    pad: int,
    stops: set[int],
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    may_stop: Callable[..., bool],
) -> list[list[int]]:
    """One completion a prompt, to the stop token or `tokens`.

    Args:
        model: a causal language model.
        prompts: token ids.
        tokens: longest completion.
        pad: token for the padding, left of the prompts.
        stops: tokens that end a completion.
        seed: of the draws, which are the same each time and none from the generator that training uses.
        autocast: the precision of training.
        may_stop: called at every token.
    """
    if keeps_states(model):
        return _sample_unpadded(model, prompts, tokens, stops, seed, autocast, may_stop)
    width = max(map(len, prompts))
    padding = [width - len(prompt) for prompt in prompts]
    ids = [[pad] * left + prompt for left, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * left + [1] * (width - left) for left in padding]
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), autocast():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
            stopping_criteria=[may_stop],
        )
    return [_until(row, stops) for row in output[:, width:].tolist()]


def _sample_unpadded(
    model: Any,
    prompts: list[list[int]],
    tokens: int,
    stops: set[int],
    seed: int,
    autocast: Callable[[], AbstractContextManager[Any]],
    may_stop: Callable[..., bool],
) -> list[list[int]]:
    """As `sample`, a prompt at a time, for models that can't be padded."""
    draws = torch.rand(len(prompts), 1, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def draw(logits: torch.Tensor, counts: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        may_stop()
        return choose(logits, uniforms, 1.0, 1.0)

    with autocast():
        return [
            complete(model, prompt, uniforms, tokens, frozenset(stops), draw)[0]
            for prompt, uniforms in zip(prompts, draws, strict=True)
        ]


@torch.no_grad()
def kl(
    model: Any,
    reference: Callable[[], AbstractContextManager[Any]],
    prompts: list[list[int]],
    completions: list[list[int]],
    autocast: Callable[[], AbstractContextManager[Any]],
    may_stop: Callable[..., bool],
) -> list[float]:
    """KL of the two on each of these completions of the prompts, in nats.

    Args:
        model: the policy.
        reference: context whose value is the reference.
        prompts: token ids.
        completions: token ids, as `sample` gives them.
        autocast: the precision of training.
        may_stop: called at every prompt.
    """
    found = []
    with _precise_head(model):
        for prompt, completion in zip(prompts, completions, strict=True):
            may_stop()
            ids = torch.tensor([prompt + completion], device=model.device)
            policy = _next_token_log_probs(model, ids, len(completion), autocast)
            with reference() as other:
                held_against = _next_token_log_probs(other, ids, len(completion), autocast)
            found.append((policy.exp() * (policy - held_against)).sum().double().item())
    return found


@contextmanager
def _precise_head(model: Any) -> Iterator[None]:
    """Make logits in float32 on a CPU: those of bfloat16, multiples of 1/8 at 20, are 1e-3 nats of KL from themselves.

    On a GPU, where a second copy of the head may not fit, they stay as they are.
    """
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.weight.is_cuda or head.weight.dtype == torch.float32:
        yield
        return
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()

    def forward(states: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(states.float(), weight, bias)

    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        head.__dict__.pop("forward")


def per_token(nats: list[float], completions: list[list[int]]) -> tuple[float, float | None]:
    """Nats a token over all completions and its standard error (None for a single one), as a ratio of two means."""
    tokens, count = sum(map(len, completions)), len(nats)
    ratio = sum(nats) / tokens
    if count < 2:
        return ratio, None
    off = sum((own - ratio * len(completion)) ** 2 for own, completion in zip(nats, completions, strict=True))
    return ratio, math.sqrt(off * count / (count - 1)) / tokens


def mean_length(sequences: list[list[int]]) -> float:
    """Tokens a sequence."""
    return sum(map(len, sequences)) / len(sequences)


def _next_token_log_probs(
    model: Any, ids: torch.Tensor, count: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> torch.Tensor:
    """Log-probabilities of what followed: (count, vocabulary), float32, for the last `count` positions."""
    with autocast():
        logits = model(input_ids=ids, logits_to_keep=count + 1, use_cache=False).logits
    log_probs: torch.Tensor = logits[0, :-1].float().log_softmax(-1)
    return log_probs


def _until(ids: list[int], stops: set[int]) -> list[int]:
    """Up to and with the first stop token."""
    end = next((index for index, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
