"""What a training run will need, before it starts: steps, tokens, memory part by part, hours, dollars, and warnings.

Reads the base model's config.json and tokenizer.json and the rows; writes nothing and needs no torch. Memory is that
of one bfloat16 GPU at its largest forward: packed rows, each prompt once, or padded ones where the model can't be
packed. The bytes of activations were measured with hooks on saved tensors in layers of a 3B Llama and are scaled by
width. Hours come from counted operations and an assumed utilization. No GPU run has been compared with either. Not
covered: the experts of a mixture, several GPUs.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dpo_cli.config.settings import WARMUP, PlanSection, TrainingSection, TrainSection
from dpo_cli.errors import UserError
from dpo_cli.models.base_model import read_config
from dpo_cli.models.tokenizer_files import read_object

CHARACTERS_A_TOKEN = 3.5  # English, where there is no tokenizer to ask
TURN_TOKENS = 5  # what a chat template adds to a message
# Bytes a token and layer that the backward pass needs, packed, over hidden + intermediate size: 119.3 kB at 11,264.
ACTIVATION = 119.3e3 / (3072 + 8192)
PADDED = 143.9 / 119.3  # PEFT's own LoRA layers keep a float32 copy of their input besides
CONTEXT_GB = 0.8
HEAD_CHUNK = 32768  # of the vocabulary: TRL's, float32 logits of one chunk at a time
WARMUP_SHARE, FEW_PAIRS, LONGER_SHARE = 0.15, 500, 0.6
# Memory that cards really give, in GB, the smallest first.
CARDS = {"L4": 23.6, "L40S": 46.0, "A100-80GB": 81.0, "H100": 81.0, "H200": 141.0, "B200": 180.0}
LARGEST = "H200"
HIGH_RATE = {"lora": 1e-4, "full": 5e-6}  # at beta 0.1; lower betas bear less


class Shape(Struct, kw_only=True):
    """Sizes of a Llama-like model (Llama, Qwen, Gemma, Mistral, ...), under the names of its config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    model_type: str = ""
    sliding_window: int | None = None
    use_sliding_window: bool = True
    layer_types: list[str] | None = None
    attention_dropout: float = 0.0
    attn_logit_softcapping: float | None = None
    num_local_experts: int | None = None
    num_experts: int | None = None

    @property
    def ties(self) -> bool:
        """Whether the head is the embedding; Gemma's configurations leave it out, and tie."""
        return self.model_type.startswith("gemma") if self.tie_word_embeddings is None else self.tie_word_embeddings

    def why_padded(self, longest: int) -> str | None:
        """Why rows of up to `longest` tokens can't be packed, as `training/packed.py` would say; None: they can."""
        slides = self.layer_types is None or "sliding_attention" in self.layer_types
        if slides and self.use_sliding_window and self.sliding_window and self.sliding_window < longest:
            return f"attention slides over {self.sliding_window} tokens"
        if self.attn_logit_softcapping:
            return "attention scores are capped"
        return "attention dropout is on" if self.attention_dropout else None

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (inputs, outputs) of a layer's linear modules."""
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        queries, values = head * self.num_attention_heads, head * (self.num_key_value_heads or self.num_attention_heads)
        hidden, inner = self.hidden_size, self.intermediate_size
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, values),
            "v_proj": (hidden, values),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    def linear_parameters(self) -> int:
        """Weights of all layers."""
        return self.num_hidden_layers * sum(ins * outs for ins, outs in self.linears().values())

    def embedding_parameters(self) -> int:
        """Weights of the embedding and, unless tied, of the head."""
        return self.vocab_size * self.hidden_size * (1 if self.ties else 2)


class Plan(Struct, kw_only=True):
    """What a run will need.

    `trained` counts weights, `tokens` are those that go through the policy, `largest` those of the largest forward,
    `forward` says how it is laid out; `memory_gb` is by part, `usd` by backend; `sizes` says where the base's sizes are
    from.
    """

    pairs: int
    held_out: int
    steps: int
    trained: int
    warmup_share: float
    evaluations: int
    tokens: int
    longest: int
    largest: int
    forward: str
    checkpointing: bool
    too_long: int
    counted_by: str
    memory_gb: dict[str, float]
    total_gb: float
    card_gb: float
    fits: bool
    hours: float
    usd: dict[str, float]
    warnings: list[str]
    sizes: str = ""


class TokenLengths(Struct):
    """Token counts of one row: the prompt, and each completion."""

    prompt: int
    completions: list[int]

    def longest(self) -> int:
        """Of prompt plus completion."""
        return self.prompt + max(self.completions)

    def scored(self) -> int:
        """Of the completions."""
        return sum(self.completions)

    def packed(self) -> int:
        """Of all, the prompt once."""
        return self.prompt + self.scored()

    def padded(self) -> int:
        """Of all, each row with its prompt and as long as the longer one."""
        return len(self.completions) * self.longest()


def steps(section: TrainingSection, rows: int) -> int:
    """Optimizer steps, as transformers counts them."""
    if section.max_steps > 0:
        return section.max_steps
    batches = math.ceil(rows / section.per_device_train_batch_size)
    made = math.ceil(section.num_train_epochs * math.ceil(batches / section.gradient_accumulation_steps))
    return min(made, section.steps_at_most or made)


def capped_steps(section: TrainingSection, rows: int) -> int:
    """`max_steps` for transformers: set only where the epochs would make more steps than allowed."""
    capped = section.max_steps <= 0 and section.steps_at_most is not None
    return steps(section, rows) if capped else section.max_steps


def warmup_steps(section: TrainingSection, steps: int) -> int:
    """Steps until the learning rate is at its peak, of a run of so many."""
    if section.warmup_ratio is None and section.warmup_steps is not None:
        return section.warmup_steps
    return math.ceil(steps * (WARMUP if section.warmup_ratio is None else section.warmup_ratio))


def high_rate(section: TrainSection) -> float:
    """The learning rate above which `inspect plan` warns; a lower beta bears less."""
    return HIGH_RATE["full" if section.full else "lora"] * section.beta / 0.1


def read_shape(folder: Path) -> Shape:
    """Sizes from config.json.

    Raises:
        UserError: it is not there, or is no config.json of a Llama-like model.
    """
    file = folder / "config.json"
    try:
        config = read_object(file) if file.is_file() else read_config(folder)
        return msgspec.convert(config, Shape)
    except OSError as error:  # no right to look into the folder
        raise UserError(f"can't be read: {error.strerror or error}", where=str(folder)) from None
    except msgspec.MsgspecError as error:
        raise UserError(f"no sizes of a Llama-like model: {error}", where=str(file)) from None


def token_count_or_estimate(folder: Path) -> tuple[Callable[[str], int], str]:
    """How to count the tokens of a text, and what that is called; by characters where there is no tokenizer."""
    file = folder / "tokenizer.json"
    try:
        from tokenizers import Tokenizer
    except ImportError:
        file = Path()
    if not file.is_file():
        return (lambda text: math.ceil(len(text) / CHARACTERS_A_TOKEN)), f"characters / {CHARACTERS_A_TOKEN}"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library has no other kind
        raise UserError(f"not a tokenizer: {error}", where=str(file)) from None
    return (lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)), "the base's tokenizer"


def count(messages: Sequence[Any], tokens_of: Callable[[str], int]) -> int:
    """Tokens of messages, about: what a chat template puts around them is taken as the same for all."""
    return sum(tokens_of(message["content"]) + TURN_TOKENS for message in messages)


def make(
    section: TrainSection,
    plan: PlanSection,
    shape: Shape,
    adapter: int,
    lengths: Sequence[TokenLengths],
    held_out: Sequence[TokenLengths],
    counted_by: str,
) -> Plan:
    """Reckon a run of DPO.

    Args:
        section: settings of the run.
        plan: the card and its prices.
        shape: sizes of the base.
        adapter: weights of the adapter that is trained.
        lengths: of each pair, chosen before rejected, as they are before anything is shortened.
        held_out: the same for evaluation.
        counted_by: how.
    """
    cut, held = ([_shortened(row, section.max_length) for row in side] for side in (lengths, held_out))
    longest = max((row.longest() for row in cut), default=0)
    why = shape.why_padded(max([longest, *(row.longest() for row in held)]))
    largest, scored = largest_forward(section, cut, why is None)
    if section.gradient_checkpointing is None:  # where memory suffices, it would only cost time
        without = replace(section, gradient_checkpointing=False)
        needed = memory_gb(without, shape, adapter, largest, scored, why is None)
        section = replace(section, gradient_checkpointing=sum(needed.values()) > plan.gpu_memory_gb)
    made = steps(section, len(lengths))
    warmup = warmup_steps(section, made)
    passes = made * section.per_device_train_batch_size * section.gradient_accumulation_steps / max(len(lengths), 1)
    evaluations = math.ceil(made / section.eval_steps) if held_out else 0
    memory = memory_gb(section, shape, adapter, largest, scored, why is None)
    # Operations a parameter and token: 2 for the policy, 2 for the gradient of what came before, 2 for weights' own, 2
    # for checkpointing; and 2 for the reference, once where it is kept.
    steps_ops = 4 + (2 if section.full else 0) + (2 if section.gradient_checkpointing else 0)
    kept = section.keep_reference is not False and why is None
    ops = sum(
        (mine * times + 2 * (min(1.0, times) if kept else times)) * _multiplications(shape, side, why is None)
        for mine, times, side in ((steps_ops, passes, cut), (2, evaluations, held))
    )
    hours = ops / (plan.gpu_tflops * 1e12 * plan.utilization) / 3600
    result = Plan(
        pairs=len(lengths),
        held_out=len(held_out),
        steps=made,
        trained=shape.linear_parameters() + shape.embedding_parameters() if section.full else adapter,
        warmup_share=warmup / max(made, 1),
        evaluations=evaluations,
        tokens=round(passes * sum(_size(row, why is None) for row in cut)),
        longest=longest,
        largest=largest,
        forward="packed, each prompt once" if why is None else f"padded, since {why}",
        checkpointing=bool(section.gradient_checkpointing),
        too_long=sum(row.longest() > section.max_length for row in lengths),
        counted_by=counted_by,
        memory_gb=memory,
        total_gb=sum(memory.values()),
        card_gb=plan.gpu_memory_gb,
        fits=sum(memory.values()) <= plan.gpu_memory_gb,
        hours=hours,
        usd={"modal": hours * plan.modal_usd_per_hour, "gke": hours * plan.gke_usd_per_hour, "local": 0.0},
        warnings=[],
    )
    four_bit = replace(section, load_in_4bit=True, gradient_checkpointing=True)
    quantised = sum(memory_gb(four_bit, shape, adapter, largest, scored).values())
    result.warnings = list(_warnings(result, section, warmup, lengths, quantised))
    return result


def largest_forward(section: TrainSection, lengths: Sequence[TokenLengths], packs: bool) -> tuple[int, int]:
    """Tokens, and scored tokens, of the largest forward that these pairs can make."""
    pairs = sorted(lengths, key=lambda row: _size(row, packs), reverse=True)
    if section.tokens_per_batch is None:
        pairs = pairs[: section.per_device_train_batch_size]
        longest = max((row.longest() for row in pairs), default=0)
        return sum(map(TokenLengths.packed, pairs)) if packs else 2 * len(pairs) * longest, _scored(pairs)
    sizes = [_size(row, packs) for row in pairs]
    tokens = min(sum(sizes), max(section.tokens_per_batch, max(sizes, default=0)))
    return tokens, round(_scored(pairs) * tokens / max(1, sum(sizes)))


def _size(row: TokenLengths, packs: bool) -> int:
    """Tokens of a pair in a forward."""
    return row.packed() if packs else row.padded()


def _scored(pairs: Sequence[TokenLengths]) -> int:
    return sum(row.scored() for row in pairs)


def _shortened(row: TokenLengths, most: int) -> TokenLengths:
    return TokenLengths(row.prompt - max(0, row.longest() - most), row.completions)


def _multiplications(shape: Shape, rows: Sequence[TokenLengths], packs: bool) -> int:
    """Weights times the tokens that meet them, in one forward over all rows."""
    tokens = sum(_size(row, packs) for row in rows)
    return shape.linear_parameters() * tokens + shape.vocab_size * shape.hidden_size * _scored(rows)


def line(plan: Plan) -> str:
    """The plan in one line."""
    evaluations = f"{plan.evaluations} evaluation{'s' * (plan.evaluations != 1)}"
    return (
        f"plan: {plan.steps} steps on {plan.pairs} pairs ({plan.held_out} held out), {plan.tokens:,} tokens, "
        f"{plan.forward}, {evaluations}; on a GPU about {plan.total_gb:.1f} of {plan.card_gb:g} GB "
        f"and {duration(plan.hours)}, ${plan.usd['modal']:.2f}"
    )


def duration(hours: float) -> str:
    """Hours, or minutes where they are less than one."""
    if hours >= 1:
        return f"{hours:.1f} hours"
    return "less than a minute" if hours < 1 / 60 else f"{hours * 60:.0f} minutes"


def memory_gb(
    section: TrainSection,
    shape: Shape,
    adapter: int,
    tokens: int,
    scored: int,
    packs: bool = True,
) -> dict[str, float]:
    """Peak memory by part, in GB, with `tokens` in a forward, `scored` of them in completions, packed or padded."""
    linear, embedding, width = shape.linear_parameters(), shape.embedding_parameters(), shape.intermediate_size
    trained = linear + embedding if section.full else adapter
    four_bit = 4.127 / 8  # with double quantisation, arXiv:2305.14314
    weights = linear * four_bit + embedding * 2 if section.load_in_4bit else (linear + embedding) * 2
    layer = ACTIVATION * (1 if packs else PADDED) * (shape.hidden_size + width) * tokens
    if section.gradient_checkpointing is not False:
        activations = 2 * shape.hidden_size * tokens * shape.num_hidden_layers + layer
    else:
        activations = layer * shape.num_hidden_layers
    parts = {
        "weights": 4 * trained if section.full else weights,
        "adapter": 0 if section.full else 4 * trained,
        "reference": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": activations,
        "temporaries": 6 * tokens * width * 2,
        "logits": 4 * scored * min(shape.vocab_size, HEAD_CHUNK),
    }
    return {name: size / 1e9 for name, size in parts.items()} | {"context": CONTEXT_GB}


def _to_fit(plan: Plan, section: TrainSection, quantised_gb: float) -> str:
    """What makes a run fit: fewer tokens a forward, else 4-bit weights, else another card, else several."""
    moving = sum(plan.memory_gb[name] for name in ("activations", "temporaries", "logits"))
    resting = plan.total_gb - moving
    if resting < plan.card_gb:
        return (
            f"set train.tokens_per_batch to less than the {plan.largest:,} tokens of the largest forward, or "
            f"train.per_device_train_batch_size to less than {section.per_device_train_batch_size}"
        )
    said = f"{resting:.1f} GB are there before the first token"
    if not section.full and not section.load_in_4bit and quantised_gb < plan.card_gb:
        return f"{said}: --preset l4-qlora, with the base in 4 bits, needs {quantised_gb:.1f} GB"
    card = next((name for name, size in CARDS.items() if plan.total_gb <= size), None)
    if card is not None:
        return f"{said}: another card, such as {card} ({CARDS[card]:g} GB): --gpu {card}, and plan.gpu_memory_gb here"
    if section.full:
        count = math.ceil(plan.total_gb / CARDS[LARGEST])
        return f"{said}: several cards, which share all weights: --gpu {LARGEST} --gpus {count}"
    return f"{said}: no card holds it, and several do not help, since each holds the whole base: a smaller base"


def _warnings(
    plan: Plan, section: TrainSection, warmup: int, lengths: Sequence[TokenLengths], quantised_gb: float
) -> Any:
    """Each names the number to change."""
    if plan.warmup_share > WARMUP_SHARE and warmup > math.ceil(plan.steps * WARMUP):  # of few steps one is many
        now = f"now {section.warmup_ratio:g}" if section.warmup_ratio is not None else f"now {warmup} steps"
        yield f"warmup is {plan.warmup_share:.0%} of {plan.steps} steps: set train.warmup_ratio = {WARMUP:g}, {now}"
    high = high_rate(section)
    if section.learning_rate > high:
        yield (
            f"learning rate is high for beta {section.beta:g}: "
            f"set train.learning_rate to {high:.2g} or less, now {section.learning_rate:.2g}"
        )
    if plan.pairs < FEW_PAIRS:
        yield (
            f"{plan.pairs} pairs are few; {FEW_PAIRS} or more make a result that can be told from chance: "
            "more prompts, a larger generate.n or a smaller pair.min_gap"
        )
    longer = sum(row.completions[0] > row.completions[1] for row in lengths) / max(len(lengths), 1)
    if longer > LONGER_SHARE:
        yield (
            f"chosen is longer than rejected in {longer:.0%} of the pairs, so the policy may learn length: "
            "set pair.length_control = true and pair again"
        )
    if plan.too_long:
        yield (
            f"{plan.too_long} rows are longer than train.max_length = {section.max_length}: "
            f"their prompts lose their oldest part; the longest is {max(row.longest() for row in lengths)}"
        )
    if not plan.fits:
        yield f"{plan.total_gb:.1f} GB do not fit into {plan.card_gb:g} GB: {_to_fit(plan, section, quantised_gb)}"
