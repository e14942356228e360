"""The sequences that are sampled together: prefilled, drawn from, moved up where others have ended.

Reads and writes nothing. Not covered: layers that keep a state instead of keys and values; see `_unpadded.py`.
"""

from typing import Any

import torch
from msgspec import Struct
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from dpo_cli.data.records import Usage
from dpo_cli.engines._engine import Request, Sampled, Sampling
from dpo_cli.engines._model import Model

GREEDY = 1e-5  # vLLM's: a lower temperature is zero
OVERHEAD = {"cpu": 32, "cuda": 512}  # what a forward costs beside its tokens: about as much as so many more


def cheapest_cuts(lengths: list[int], overhead: int) -> list[int]:
    """Where to cut a row of prompts into forwards, each padded to its longest, so that all cost least.

    Args:
        lengths: tokens of each prompt, longest first.
        overhead: what a forward costs beside its cells, in tokens.

    Returns:
        The end of each part.
    """
    best, begin = [0], [0]  # cost of the first so many, and where their last part begins
    for end in range(1, len(lengths) + 1):
        costs = [best[start] + overhead + lengths[start] * (end - start) for start in range(end)]
        best.append(min(costs))
        begin.append(costs.index(best[-1]))
    cuts = [len(lengths)]
    while begin[cuts[-1]]:
        cuts.append(begin[cuts[-1]])
    return cuts[::-1]


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Next tokens: inverse transform sampling from the tempered nucleus.

    Args:
        logits: (batch, vocabulary), penalties applied.
        uniforms: (batch,), float64 in [0, 1), each sequence's own.
        temperature: zero takes the likeliest token.
        top_p: the likeliest tokens that together reach this mass are kept (arXiv:1904.09751), at least one.

    Returns:
        (batch,)
    """
    if temperature < GREEDY:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        ranked, order = probabilities.sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= top_p
        beyond[:, 0] = False
        probabilities = probabilities.masked_fill(beyond.scatter(-1, order, beyond), 0)
    mass = probabilities.cumsum(-1, dtype=torch.float64)
    chosen = torch.searchsorted(mass, uniforms[:, None] * mass[:, -1:], right=True).squeeze(-1)
    return chosen.clamp(max=logits.shape[-1] - 1)


class RunningAnswer:
    """One request and what its sequences have given so far."""

    def __init__(self, request: Request, prompt: list[int]) -> None:
        self.request = request
        self.prompt = prompt
        self.tokens: list[list[int]] = [[] for _ in range(request.need)]
        self.reasons = [""] * request.need

    def sampled(self, model: Model) -> Sampled:
        return Sampled(
            id=self.request.id,
            texts=[model.decode(tokens) for tokens in self.tokens],
            finish_reasons=self.reasons,
            usage=Usage(input=len(self.prompt), output=sum(map(len, self.tokens))),
        )


class RunningSequence(Struct):
    """One sequence: the `index`-th of its request, with room for `limit` tokens."""

    answer: RunningAnswer
    index: int
    seed: int
    limit: int

    @property
    def length(self) -> int:
        return len(self.answer.prompt) + len(self.answer.tokens[self.index])


class _SlotLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in slots that are allocated once: (slots, heads, columns, dimension).

    A step writes its column in place. DynamicLayer would copy the whole cache, which took half of the time.
    """

    def __init__(self, like: DynamicLayer, slots: int, columns: int) -> None:
        super().__init__()
        self.rooms = [
            states.new_zeros(slots, states.shape[1], columns, states.shape[3]) for states in (like.keys, like.values)
        ]
        self.is_initialized = True

    def show(self, rows: int, low: int, high: int) -> None:
        """Let attention see these rows and columns."""
        self.span = rows, low, high
        self.keys, self.values = (room[:rows, :, low:high] for room in self.rooms)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the newest column; returns all that is seen."""
        rows, low, high = self.span
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:rows, :, high : high + 1] = states
        self.show(rows, low, high + 1)
        return self.keys, self.values


class SlotBatch:
    """The sequences in flight, aligned to the right: every row's newest token stands in column `high - 1`.

    `rows` fills the first slots. `state` holds one row a slot: `logits` (vocabulary) of its next token, `counts`
    (vocabulary) of the tokens in its completion, `uniforms` (max_tokens) its own randomness.
    """

    def __init__(self, network: Any, ends: frozenset[int], settings: Sampling, widest: int) -> None:
        self.network = network
        self.ends = ends
        self.settings = settings
        self.device = network.device
        self.overhead = OVERHEAD.get(self.device.type, OVERHEAD["cuda"])
        self.widest = self.high = widest
        self.columns = widest + settings.max_tokens + settings.max_tokens // 2  # the half spares most shifts
        self.rows: list[RunningSequence] = []
        self.state: dict[str, Tensor] = {}
        self.cache: Cache | None = None

    def fills_a_forward(self, group: list[RunningSequence]) -> bool:
        """Whether a prompt is so long that its prefill wastes little when it is alone."""
        return len(group[0].answer.prompt) >= 4 * self.overhead

    def join(self, groups: list[list[RunningSequence]]) -> None:
        """Prefill prompts, in as many forwards as cost least, and give each sequence a slot; longest prompts first."""
        start = 0
        for end in cheapest_cuts([len(group[0].answer.prompt) for group in groups], self.overhead):
            self._prefill(groups[start:end])
            start = end

    def _prefill(self, groups: list[list[RunningSequence]]) -> None:
        """Prefill each group's prompt once, padded to the longest."""
        prompts = [group[0].answer.prompt for group in groups]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = self._mask(list(map(len, prompts)), width)
        cache = DynamicCache()  # without the model's configuration, every layer keeps all columns
        self.seat(groups, cache, self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache))

    def seat(self, groups: list[list[RunningSequence]], cache: Cache, logits: Tensor) -> None:
        """Give each sequence a slot with a copy of what its group's prompt was read to.

        Args:
            groups: sequences of one prompt each.
            cache: keys and values of the prompts, aligned to the right; a row a group.
            logits: (groups, vocabulary) of what follows them.
        """
        if self.cache is None:
            self._allocate(cache, logits)
            assert self.cache is not None
        rows = [row for group in groups for row in group]
        slots = slice(len(self.rows), len(self.rows) + len(rows))
        source = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=self.device)
        width = cache.get_seq_length()
        for layer, prefilled in zip(self.cache.layers, cache.layers, strict=True):
            for room, states in zip(layer.rooms, (prefilled.keys, prefilled.values), strict=True):
                room[slots, :, self.high - width : self.high] = states[source]
        self.state["logits"][slots] = logits[source]
        self.state["counts"][slots] = 0
        self.state["uniforms"][slots] = torch.stack(
            [uniforms_of(row.seed, self.settings.max_tokens) for row in rows]
        ).to(self.device)
        self.rows += rows

    def step(self) -> list[RunningAnswer]:
        """Draw one token for every sequence; returns the requests that this finished."""
        settings, count = self.settings, len(self.rows)
        drawn = torch.tensor([len(row.answer.tokens[row.index]) for row in self.rows], device=self.device)
        counts = self.state["counts"][:count]
        tokens = choose(
            self.state["logits"][:count] - settings.frequency_penalty * counts,
            self.state["uniforms"][:count].gather(1, drawn[:, None]).squeeze(1),
            settings.temperature,
            settings.top_p,
        )
        counts.scatter_add_(1, tokens[:, None], counts.new_ones(count, 1))

        going, finished = [], []
        for slot, (row, token) in enumerate(zip(self.rows, tokens.tolist(), strict=True)):
            written = row.answer.tokens[row.index]
            written.append(token)
            if token not in self.ends and len(written) < row.limit:
                going.append(slot)
                continue
            row.answer.reasons[row.index] = "stop" if token in self.ends else "length"
            if all(row.answer.reasons):
                finished.append(row.answer)
        self._advance(going, tokens)
        return finished

    def _advance(self, going: list[int], tokens: Tensor) -> None:
        """Let the finished rows go and compute the next logits of the others."""
        assert self.cache is not None
        slots = self._compact(going)
        if not self.rows:
            return
        if self.high == self.columns:
            self._shift()
        lengths = [row.length for row in self.rows]
        for layer in self.cache.layers:
            layer.show(len(self.rows), self.high + 1 - max(lengths), self.high)
        positions = torch.tensor(lengths, device=self.device)[:, None] - 1
        mask = self._mask(lengths, max(lengths))
        self.state["logits"][: len(self.rows)] = self._forward(tokens[slots][:, None], mask, positions, self.cache)
        self.high += 1

    def _compact(self, going: list[int]) -> list[int]:
        """Move the last rows into the slots that became free; returns the old slot of each new one."""
        assert self.cache is not None
        count = len(going)
        kept = set(going)
        holes = [slot for slot in range(count) if slot not in kept]
        movers = [slot for slot in going if slot >= count]
        slots = list(range(count))
        for hole, mover in zip(holes, movers, strict=True):
            slots[hole] = mover
        if holes:
            low = self.high - max(row.length for row in self.rows)
            seen = [room[:, :, max(low, 0) : self.high] for layer in self.cache.layers for room in layer.rooms]
            for tensor in (*self.state.values(), *seen):
                tensor[holes] = tensor[movers]
        self.rows = [self.rows[slot] for slot in slots]
        return slots

    def _shift(self) -> None:
        """Move what is seen to the left end, where the columns of finished rows were."""
        assert self.cache is not None
        width = max(row.length for row in self.rows) - 1
        high = max(width, self.widest)
        for layer in self.cache.layers:
            for room in layer.rooms:
                room[:, :, high - width : high] = room[:, :, self.high - width : self.high].clone()
        self.high = high

    def _allocate(self, cache: DynamicCache, logits: Tensor) -> None:
        slots, vocabulary = self.settings.batch_size, logits.shape[-1]
        self.cache = Cache(layers=[_SlotLayer(layer, slots, self.columns) for layer in cache.layers])
        self.state = {
            "logits": logits.new_zeros(slots, vocabulary, dtype=torch.float32),
            "counts": logits.new_zeros(slots, vocabulary, dtype=torch.float32),
            "uniforms": logits.new_zeros(slots, self.settings.max_tokens, dtype=torch.float64),
        }

    def _mask(self, lengths: list[int], columns: int) -> Tensor:
        """(rows, columns), 1 where a row that ends in the last column has a token."""
        starts = columns - torch.tensor(lengths, device=self.device)
        return (torch.arange(columns, device=self.device) >= starts[:, None]).long()

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits of the next token, (rows, vocabulary); appends to the cache."""
        output = self.network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def uniforms_of(seed: int, count: int) -> Tensor:
    """The randomness of one sequence: (count,), float64 in [0, 1)."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
