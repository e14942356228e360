"""Completions in this process: base model and LoRA adapter from disk, for a machine without a server.

Reads the model folders; writes nothing. A prompt is prefilled once and its key-value cache repeated for its
completions; a finished sequence leaves the batch at once and another prompt takes its place. Penalty, temperature and
top-p are vLLM's, in vLLM's order. In float32 a completion depends on its prompt, its index and the seed alone, never
on what else is in the batch; bfloat16 rounds differently in another batch, so there this holds for most tokens only.

Models with linear attention go by `_unpadded.py`. Not covered: several devices, encoder-decoder models.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils import logging

from dpo_cli.adapter import is_model, read_adapter
from dpo_cli.config.settings import Config, GenerateSection, ModelSection
from dpo_cli.data.records import Usage, content_id
from dpo_cli.engines import _unpadded
from dpo_cli.engines._batch import RunningAnswer, RunningSequence, SlotBatch, choose, uniforms_of
from dpo_cli.engines._engine import Request, Sampled, Sampling, sampling
from dpo_cli.engines._model import Model
from dpo_cli.model_loading import attach, can_merge, load_network, load_tokenizer, merged
from dpo_cli.models.base_model import check_base
from dpo_cli.progress import Progress

REFILL = 4  # short prompts join when a quarter of the batch is free: a prefill of few tokens wastes its overhead


def sample(requests: list[Request], config: Config, deliver: Callable[[Sampled], None], progress: Progress) -> None:
    """Sample from the base model with the SFT adapter, as `[model]` and `[generate]` say.

    Raises:
        UserError: no base model or no adapter there.
    """
    model = load(config.model.base, config.model.adapter, config.model, bf16=config.generate.bf16)
    run(model, requests, config.generate, deliver, progress)


def load(
    base: str,
    adapter: str | None,
    section: ModelSection | None = None,
    device: str | None = None,
    merge: bool | None = None,
    bf16: bool | None = None,
) -> Model:
    """Load a base model, with or without a LoRA adapter, or a whole model in the adapter's place.

    Args:
        base: folder or Hub id.
        adapter: folder that PEFT or `train` wrote; unset: the base alone.
        section: the chat template and its variables; unset: the base's own.
        device: unset: CUDA where there is one.
        merge: add the adapter to the base's weights, which is faster; unset: in float32 only, since rounding the sum
            to bfloat16 would lose the small changes that DPO makes.
        bf16: bfloat16 or float32; unset: bfloat16 where CUDA has it, float16 where it has not, float32 on the CPU.

    Raises:
        UserError: either is missing or damaged, they don't fit each other, or the tokenizer has no chat template.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    section = section or ModelSection(base=base, chat_template_kwargs={})
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    if bf16 is not None:
        dtype = torch.bfloat16 if bf16 else torch.float32
    elif device.startswith("cuda"):
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
    batch = SlotBatch(model.network, model.ends, chosen, widest=len(waiting[-1][0].answer.prompt))
    with torch.inference_mode():
        while waiting or batch.rows:
            free = chosen.batch_size - len(batch.rows)
            if free * REFILL >= chosen.batch_size or (waiting and batch.fills_a_forward(waiting[-1])):
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
    model: Model, waiting: list[list[RunningSequence]], settings: Sampling, deliver: Callable[[Sampled], None]
) -> None:
    """As `run`, a prompt at a time."""

    def draw(logits: Tensor, counts: Tensor, uniforms: Tensor) -> Tensor:
        return choose(logits - settings.frequency_penalty * counts, uniforms, settings.temperature, settings.top_p)

    with torch.inference_mode():
        for group in reversed(waiting):
            answer, limit = group[0].answer, group[0].limit
            uniforms = torch.stack([uniforms_of(row.seed, settings.max_tokens) for row in group])
            written = _unpadded.complete(model.network, answer.prompt, uniforms, limit, model.ends, draw)
            for row, tokens in zip(group, written, strict=True):
                answer.tokens[row.index] = tokens
                answer.reasons[row.index] = "stop" if tokens[-1] in model.ends else "length"
            if all(answer.reasons):
                deliver(answer.sampled(model))


def _plan(
    model: Model, requests: list[Request], settings: Sampling, deliver: Callable[[Sampled], None]
) -> list[list[RunningSequence]]:
    """Rows that are prefilled together, the longest prompt last; what can't be sampled is delivered with its error."""
    groups = []
    for request in requests:
        prompt = model.encode(request.prompt, request.tools)
        if len(prompt) >= model.context:
            error = f"the prompt has {len(prompt)} tokens, the model's context {model.context}"
            deliver(Sampled(id=request.id, texts=[], finish_reasons=[], usage=Usage(), error=error))
            continue
        answer = RunningAnswer(request, prompt)
        limit = min(settings.max_tokens, model.context - len(prompt))
        rows = [
            RunningSequence(
                answer, index, int(content_id(settings.seed, request.id, len(request.have) + index), 16), limit
            )
            for index in range(request.need)
        ]
        groups += [rows[start : start + settings.batch_size] for start in range(0, len(rows), settings.batch_size)]
    return sorted(groups, key=lambda rows: len(rows[0].answer.prompt))
