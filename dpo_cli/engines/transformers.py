"""Completions in this process: base model and LoRA adapter from disk, for a machine without a server.

Reads the model folders; writes nothing. A prompt is prefilled once and its key-value cache repeated for its
completions; a finished sequence leaves the batch at once and another prompt takes its place. Penalty, temperature and
top-p are vLLM's, in vLLM's order. In float32 a completion depends on its prompt, its index and the seed alone, never
on what else is in the batch; bfloat16 rounds differently in another batch, so there this holds for most tokens only.

Models with linear attention go by `_unpadded.py`. Not covered: several devices, encoder-decoder models.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging

from dpo_cli.adapter import is_model, read_adapter
from dpo_cli.base_model import check_base
from dpo_cli.config.settings import Config, GenerateSection, ModelSection
from dpo_cli.data.records import Message, Tool, Usage, content_id
from dpo_cli.data.thinking import opening
from dpo_cli.engines import _unpadded
from dpo_cli.engines._engine import Request, Sampled, Sampling, sampling
from dpo_cli.model_loading import attach, can_merge, load_network, load_tokenizer, merged
from dpo_cli.progress import Progress

GREEDY = 1e-5  # vLLM's: a lower temperature is zero
REFILL = 4  # prompts join when a quarter of the batch is free: a prefill of few rows wastes its overhead


class Model(Struct):
    """A loaded model with what is needed to sample from it."""

    network: Any
    tokenizer: Any
    ends: frozenset[int]
    context: int
    template: dict[str, Any] = {}
    thinking: str | None = None

    def encode(self, prompt: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """Token ids of a prompt under the base model's chat template, up to where the assistant begins."""
        how = {"tools": tools, "add_generation_prompt": True, "return_dict": False, **self.template}
        if self.thinking == "strip":
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, **how)
            text = text.removesuffix(opening(text))
            stripped: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            return stripped
        ids: list[int] = self.tokenizer.apply_chat_template(prompt, **how)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of a completion, without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def sample(requests: list[Request], config: Config, deliver: Callable[[Sampled], None], progress: Progress) -> None:
    """Sample from the base model with the SFT adapter, as `[model]` and `[generate]` say.

    Raises:
        UserError: no base model or no adapter there.
    """
    model = load(config.model.base, config.model.adapter, config.model)
    run(model, requests, config.generate, deliver, progress)


def load(
    base: str,
    adapter: str | None,
    section: ModelSection | None = None,
    device: str | None = None,
    merge: bool | None = None,
) -> Model:
    """Load a base model, with or without a LoRA adapter, or a whole model in the adapter's place.

    Args:
        base: folder or Hub id.
        adapter: folder that PEFT or `train` wrote; unset: the base alone.
        section: the chat template and its variables; unset: the base's own.
        device: unset: CUDA where there is one. bfloat16 where CUDA has it, float32 on the CPU.
        merge: add the adapter to the base's weights, which is faster; unset: in float32 only, since rounding the sum
            to bfloat16 would lose the small changes that DPO makes.

    Raises:
        UserError: either is missing or damaged, they don't fit each other, or the tokenizer has no chat template.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    section = section or ModelSection(base=base, chat_template_kwargs={})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    if device.startswith("cuda"):
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if adapter is not None and is_model(Path(adapter)):
        base, adapter = adapter, None
    found = check_base(base)
    tokenizer = load_tokenizer(base, section)
    if adapter is not None:
        read_adapter(Path(adapter), base, section.same_base)
    network = load_network(base, dtype)
    if adapter is not None:
        network = attach(network, Path(adapter))
        quantised = found is not None and found.quantised is not None
        if merge if merge is not None else dtype == torch.float32 and not quantised and can_merge(network):
            network = merged(network)
    network.requires_grad_(False).eval().to(device)

    ends = network.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    context = getattr(network.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
    return Model(network, tokenizer, frozenset(ends), context, section.chat_template_kwargs, section.thinking)


def run(
    model: Model,
    requests: list[Request],
    settings: GenerateSection,
    deliver: Callable[[Sampled], None],
    progress: Progress,
) -> None:
    """Sample every request, at most `settings.batch_size` sequences at once.

    `deliver` gets each request once, when its last sequence is finished: longest prompts first. A prompt that leaves
    no room in the model's context is delivered with an error; one that leaves less than max_tokens gets what is left.
    """
    chosen = sampling(settings)
    waiting = _plan(model, requests, chosen, deliver)
    if not waiting:
        return
    if _unpadded.keeps_states(model.network):
        _run_unpadded(model, waiting, chosen, deliver)
        return
    batch = _Batch(model, chosen, widest=len(waiting[-1][0].answer.prompt))
    with torch.inference_mode():
        while waiting or batch.rows:
            free = chosen.batch_size - len(batch.rows)
            if free * REFILL >= chosen.batch_size:
                joining = []
                while waiting and len(waiting[-1]) <= free:
                    joining.append(waiting.pop())
                    free -= len(joining[-1])
                if joining:
                    batch.join(joining)
                    progress.update(0, in_flight=len(batch.rows))
            for answer in batch.step():
                deliver(answer.sampled(model))


def _run_unpadded(
    model: Model, waiting: list[list["_Row"]], settings: Sampling, deliver: Callable[[Sampled], None]
) -> None:
    """As `run`, a prompt at a time."""

    def draw(logits: Tensor, counts: Tensor, uniforms: Tensor) -> Tensor:
        return choose(logits - settings.frequency_penalty * counts, uniforms, settings.temperature, settings.top_p)

    with torch.inference_mode():
        for group in reversed(waiting):
            answer, limit = group[0].answer, group[0].limit
            uniforms = torch.stack([_uniforms(row.seed, settings.max_tokens) for row in group])
            written = _unpadded.complete(model.network, answer.prompt, uniforms, limit, model.ends, draw)
            for row, tokens in zip(group, written, strict=True):
                answer.tokens[row.index] = tokens
                answer.reasons[row.index] = "stop" if tokens[-1] in model.ends else "length"
            if all(answer.reasons):
                deliver(answer.sampled(model))


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


class _Answer:
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


class _Row(Struct):
    """One sequence: the `index`-th of its request, with room for `limit` tokens."""

    answer: _Answer
    index: int
    seed: int
    limit: int

    @property
    def length(self) -> int:
        return len(self.answer.prompt) + len(self.answer.tokens[self.index])


def _plan(
    model: Model, requests: list[Request], settings: Sampling, deliver: Callable[[Sampled], None]
) -> list[list[_Row]]:
    """Rows that are prefilled together, the longest prompt last; what can't be sampled is delivered with its error."""
    groups = []
    for request in requests:
        prompt = model.encode(request.prompt, request.tools)
        if len(prompt) >= model.context:
            error = f"the prompt has {len(prompt)} tokens, the model's context {model.context}"
            deliver(Sampled(id=request.id, texts=[], finish_reasons=[], usage=Usage(), error=error))
            continue
        answer = _Answer(request, prompt)
        limit = min(settings.max_tokens, model.context - len(prompt))
        rows = [
            _Row(answer, index, int(content_id(settings.seed, request.id, len(request.have) + index), 16), limit)
            for index in range(request.need)
        ]
        groups += [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
    return sorted(groups, key=lambda rows: len(rows[0].answer.prompt))


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


class _Batch:
    """The sequences in flight, aligned to the right: every row's newest token stands in column `high - 1`.

    `rows` fills the first slots. `state` holds one row a slot: `logits` (vocabulary) of its next token, `counts`
    (vocabulary) of the tokens in its completion, `uniforms` (max_tokens) its own randomness.
    """

    def __init__(self, model: Model, settings: Sampling, widest: int) -> None:
        self.model = model
        self.settings = settings
        self.device = model.network.device
        self.widest = self.high = widest
        self.columns = widest + settings.max_tokens + settings.max_tokens // 2  # the half spares most shifts
        self.rows: list[_Row] = []
        self.state: dict[str, Tensor] = {}
        self.cache: Cache | None = None

    def join(self, groups: list[list[_Row]]) -> None:
        """Prefill each group's prompt once and give each of its sequences a slot."""
        prompts = [group[0].answer.prompt for group in groups]
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = self._mask(list(map(len, prompts)), width)
        cache = DynamicCache()  # without the model's configuration, every layer keeps all columns
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), cache)
        if self.cache is None:
            self._allocate(cache, logits)
            assert self.cache is not None

        rows = [row for group in groups for row in group]
        slots = slice(len(self.rows), len(self.rows) + len(rows))
        source = torch.tensor([i for i, group in enumerate(groups) for _ in group], device=self.device)
        for layer, prefilled in zip(self.cache.layers, cache.layers, strict=True):
            for room, states in zip(layer.rooms, (prefilled.keys, prefilled.values), strict=True):
                room[slots, :, self.high - width : self.high] = states[source]
        self.state["logits"][slots] = logits[source]
        self.state["counts"][slots] = 0
        self.state["uniforms"][slots] = torch.stack([_uniforms(row.seed, self.settings.max_tokens) for row in rows]).to(
            self.device
        )
        self.rows += rows

    def step(self) -> list[_Answer]:
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
            if token not in self.model.ends and len(written) < row.limit:
                going.append(slot)
                continue
            row.answer.reasons[row.index] = "stop" if token in self.model.ends else "length"
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
        output = self.model.network(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
