"""KL(policy || reference) in the policy's own words: completions sampled at temperature 1, then the exact sum.

At each position of a sampled completion the sum goes over the whole vocabulary, so the estimate is exact but for the
choice of prompts and samples. Each model reads a prompt once, for sampling and for the sum; both go on from there by
the same products, so that the KL of equal models is 0. Reads and writes nothing. Not covered: completions beyond the
length asked for.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from dpo_cli.data.records import content_id
from dpo_cli.engines._batch import RunningAnswer, RunningSequence, SlotBatch, choose, uniforms_of
from dpo_cli.engines._engine import Request, Sampling
from dpo_cli.engines._unpadded import complete, keeps_states


class ReadPrompt(NamedTuple):
    """A prompt that a model has read: `cache` holds its keys and values, `logits` (1, vocabulary) say what follows.

    Of a model whose layers keep a state, which can't be gone on from by several tokens, there are neither.
    """

    ids: list[int]
    cache: DynamicCache | None
    logits: Tensor | None


class SampledKl:
    """KL(policy || reference) on completions of some prompts, one a prompt, that the policy samples.

    What the reference makes of the prompts never changes; on a CPU, where reading them takes long, it is kept.

    Args:
        model: the policy.
        reference: context whose value is the reference.
        prompts: token ids.
        tokens: longest completion.
        stops: tokens that end one.
        seed: of the draws, which are the same each time and none from the generator that training uses.
        autocast: the precision of training.
        may_stop: called at every token and every prompt.
    """

    def __init__(
        self,
        model: Any,
        reference: Callable[[], AbstractContextManager[Any]],
        prompts: list[list[int]],
        tokens: int,
        stops: set[int],
        seed: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        may_stop: Callable[[], object] = lambda: None,
    ) -> None:
        self.model = model
        self.reference = reference
        self.prompts = prompts
        self.tokens = tokens
        self.stops = frozenset(stops)
        self.seeds = [int(content_id(seed, number), 16) for number in range(len(prompts))]
        self.autocast = autocast
        self.may_stop = may_stop
        self._kept: list[ReadPrompt] = []

    def measure(self) -> tuple[list[list[int]], list[float]]:
        """The policy's completions, each to a stop token or `tokens`, and the KL on each of them in nats."""
        with self._computing(self.model):
            read = self._read(self.model)
            completions = self._sample(self.model, read)
            return completions, self._nats(read, completions)

    def nats(self, completions: list[list[int]]) -> list[float]:
        """KL on each of these completions of the prompts, in nats."""
        with self._computing(self.model):
            return self._nats(self._read(self.model), completions)

    def of_reference(self) -> list[list[int]]:
        """What the reference samples by the same draws."""
        with self.reference() as reference, self._computing(reference):
            return self._sample(reference, self._read_by_reference(reference))

    @contextmanager
    def _computing(self, model: Any) -> Iterator[None]:
        with torch.no_grad(), self.autocast(), _precise_head(model):
            yield

    def _read(self, model: Any) -> list[ReadPrompt]:
        read = []
        for ids in self.prompts:
            self.may_stop()
            if keeps_states(model):
                read.append(ReadPrompt(ids, None, None))
                continue
            cache = DynamicCache()  # without the model's configuration, every layer keeps all columns
            row = torch.tensor([ids], device=model.device)
            output = model(input_ids=row, past_key_values=cache, use_cache=True, logits_to_keep=1)
            read.append(ReadPrompt(ids, cache, output.logits[:, -1]))
        return read

    def _read_by_reference(self, reference: Any) -> list[ReadPrompt]:
        read = self._kept or self._read(reference)
        if reference.device.type == "cpu":
            self._kept = read
        return read

    def _sample(self, model: Any, read: list[ReadPrompt]) -> list[list[int]]:
        if keeps_states(model):
            return [self._sample_alone(model, *one) for one in zip(self.prompts, self.seeds, strict=True)]
        settings = Sampling(
            temperature=1.0, top_p=1.0, max_tokens=self.tokens, frequency_penalty=0.0, seed=0, batch_size=len(read)
        )
        batch = SlotBatch(model, self.stops, settings, widest=max(map(len, self.prompts)))
        answers = [RunningAnswer(Request(id="", prompt=[], have=[], need=1), ids) for ids in self.prompts]
        for answer, seed, prompt in zip(answers, self.seeds, read, strict=True):
            assert prompt.cache is not None and prompt.logits is not None
            batch.seat([[RunningSequence(answer, 0, seed, self.tokens)]], prompt.cache, prompt.logits)
        while batch.rows:
            self.may_stop()
            batch.step()
        return [answer.tokens[0] for answer in answers]

    def _sample_alone(self, model: Any, prompt: list[int], seed: int) -> list[int]:
        def draw(logits: Tensor, counts: Tensor, uniforms: Tensor) -> Tensor:
            self.may_stop()
            return choose(logits, uniforms, 1.0, 1.0)

        return complete(model, prompt, uniforms_of(seed, self.tokens)[None], self.tokens, self.stops, draw)[0]

    def _nats(self, read: list[ReadPrompt], completions: list[list[int]]) -> list[float]:
        with self.reference() as reference, self._computing(reference):
            other = self._read_by_reference(reference)
        found = []
        for ours, theirs, completion in zip(read, other, completions, strict=True):
            self.may_stop()
            policy = _log_probs(self.model, ours, completion)
            with self.reference() as reference, _precise_head(reference):
                held_against = _log_probs(reference, theirs, completion)
            found.append((policy.exp() * (policy - held_against)).sum().double().item())
        return found


def _log_probs(model: Any, prompt: ReadPrompt, completion: list[int]) -> Tensor:
    """Log-probabilities at each token of a completion: (tokens, vocabulary), float32. `prompt` stays as it is."""
    if prompt.cache is None or prompt.logits is None:
        ids = torch.tensor([prompt.ids + completion], device=model.device)
        logits = model(input_ids=ids, logits_to_keep=len(completion) + 1, use_cache=False).logits[0, :-1]
        return _normalized(logits)
    logits = prompt.logits
    if len(completion) > 1:
        ids = torch.tensor([completion[:-1]], device=model.device)
        output = model(input_ids=ids, past_key_values=prompt.cache, use_cache=True, logits_to_keep=ids.shape[1])
        prompt.cache.crop(-ids.shape[1])
        logits = torch.cat([logits, output.logits[0]])
    return _normalized(logits)


def _normalized(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)


@contextmanager
def _precise_head(model: Any) -> Iterator[None]:
    """Make logits in float32 on a CPU: those of bfloat16, multiples of 1/8 at 20, are 1e-3 nats of KL from themselves.

    On a GPU, where a second copy of the head may not fit, they stay as they are.
    """
    head = model.get_output_embeddings()
    precise = "forward" in head.__dict__ or head.weight.is_cuda or head.weight.dtype == torch.float32
    if type(head) is not torch.nn.Linear or precise:
        yield
        return
    weight, bias = head.weight.float(), None if head.bias is None else head.bias.float()

    def forward(states: Tensor) -> Tensor:
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
