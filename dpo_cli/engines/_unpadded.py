"""Completions of models whose layers keep a state instead of keys and values: linear attention, state space, hybrids.

Such a state can't be cut into columns, moved between slots or masked, as the batch of `transformers.py` does with keys
and values. So the completions of one prompt are sampled together, all of one length and without padding, and prompts
one after the other; by the same draws as there. Reads and writes nothing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

# Layers whose cache is keys and values, which `transformers.py` lays out itself.
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}

Choose = Callable[[Tensor, Tensor, Tensor], Tensor]


def keeps_states(network: Any) -> bool:
    """Whether a model has layers that keep something else than keys and values."""
    config = getattr(network, "config", None)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ()) if config is not None else set()
    return bool(kinds - ATTENTION) or bool(getattr(network, "_is_stateful", False))


class _Cache(DynamicCache):  # type: ignore[misc]
    """A cache that knows its length where no layer keeps keys, of which transformers would read it."""

    seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the cache has taken in."""
        try:
            return int(super().get_seq_length(layer_idx))
        except ValueError:
            return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys, offset) of an attention mask, which no layer without keys looks at."""
        try:
            sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        except ValueError:
            sizes = self.seen + query_length, 0
        return sizes


def complete(
    network: Any, prompt: list[int], uniforms: Tensor, limit: int, ends: frozenset[int], choose: Choose
) -> list[list[int]]:
    """Completions of one prompt, each up to and with a token that ends it.

    Args:
        network: the model.
        prompt: token ids.
        uniforms: (completions, tokens), the draws of each.
        limit: most tokens of a completion.
        ends: tokens that end one.
        choose: (logits, counts of each token so far, draws) -> next tokens; each has a row a completion.
    """
    rows, device = len(uniforms), network.device
    cache = _Cache(config=network.config)
    ids = torch.tensor([prompt] * rows, device=device)
    counts: Tensor | None = None
    written: list[list[int]] = [[] for _ in range(rows)]
    going = set(range(rows))
    for step in range(limit):
        output = network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.seen += ids.shape[1]
        logits = output.logits[:, -1].float()
        counts = torch.zeros_like(logits) if counts is None else counts
        tokens = choose(logits, counts, uniforms[:, step].to(device))
        counts.scatter_add_(1, tokens[:, None], counts.new_ones(rows, 1))
        for row, token in enumerate(tokens.tolist()):
            if row in going:
                written[row].append(token)
                if token in ends:
                    going.discard(row)
        if not going:
            break
        ids = tokens[:, None]
    return written
