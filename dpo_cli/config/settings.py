"""Every setting of every stage: its default, bounds and description, each written once.

Where a value comes from is `config.py`'s matter.
"""

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from dpo_cli.config.field_types import Count, NonNegative, Positive, Seconds, Share
from dpo_cli.config.field_types import description as _doc
from dpo_cli.config.remote_settings import GkeSection, ModalSection, ServeSection

SEED = 42
MIN_GAP = 1.0  # of a judge's ten points
WARMUP = 0.1  # of a run's steps, where nothing is set
MIN_REWARD_GAP = 0.2  # of a rollout's reward, which goes from 0 to 1; as in the NeMo Gym guide to DPO

Orders: TypeAlias = Annotated[int, Meta(ge=1, le=8)] | Literal["full", "auto"]
Tracker = Literal["none", "wandb", "trackio", "tensorboard"]
SkipBad = Annotated[
    bool, Meta(description="Leave out rows that can't be read, and write them to rejected-rows.jsonl in the data.")
]
Columns = Annotated[
    str | None, Meta(description="What columns mean, ROLE=COLUMN,…: prompt=question,chosen=good,system=…,ignore=note.")
]
Strategy = Literal["auto", "best-worst", "all", "adjacent", "mu-2sigma", "same-prompt", "stratified"]
PairWeights = Literal["none", "prompt", "gap"]
Match = Literal["exact", "judge"]
KlAction = Literal["halve_lr", "raise_beta", "rollback", "stop"]
MaxUsd = Annotated[
    NonNegative | None, Meta(description="Most dollars that this run may spend on new calls; the next counts anew.")
]
Thinking = Literal["keep", "strip", "empty"]
# Of transformers' schedules, those that need no settings of their own.
Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]
InitLoraWeights: TypeAlias = bool | Literal["gaussian", "orthogonal"]
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "rebel",
]


class ModelSection(Struct, kw_only=True):
    """The base model, its adapters and their served names."""

    base: Annotated[str, _doc("Base model: a folder or a Hub id.")] = "meta-llama/Llama-3.2-3B-Instruct"
    adapter: Annotated[str | None, _doc("SFT adapter folder; none: train a fresh LoRA, reference = base.")] = (
        "adapters/nothing-gpt"
    )
    dpo_adapter: Annotated[str, _doc("DPO adapter folder: what train writes.")] = "adapters/nothing-gpt-dpo"
    name: Annotated[str, _doc("Name under which the SFT adapter is served.")] = "seinfeld"
    dpo_name: Annotated[str, _doc("Name under which the DPO adapter is served.")] = "seinfeld-dpo"
    adapter_into_base: Annotated[
        bool, _doc("Fold the SFT adapter into a new base; DPO then trains a fresh LoRA on that, its reference.")
    ] = False
    same_base: Annotated[bool, _doc("The base is the adapter's own, whatever its adapter_config.json calls it.")] = (
        False
    )
    chat_template: Annotated[str | None, _doc("Chat template file, for all stages; unset: the base's own.")] = None
    thinking: Annotated[
        Thinking | None,
        _doc("Thinking, where the template opens it or leaves it out: keep, strip, empty; unset: refused."),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any], _doc("Variables of the chat template; Llama 3.2's would otherwise insert today's date.")
    ] = msgspec.field(default_factory=lambda: {"date_string": "26 Jul 2024"})


class GenerateSection(Struct, kw_only=True):
    """Prompts to completions."""

    prompts: Annotated[str, _doc("Prompts: a file (JSON, CSV, parquet …), or a folder that holds val.jsonl.")] = "data"
    skip_bad: SkipBad = False
    columns: Columns = None
    engine: Annotated[str, _doc("Where completions come from.")] = "endpoint"
    url: Annotated[str | None, _doc("OpenAI-compatible endpoint that serves the adapters.")] = None
    n: Annotated[Count, _doc("Completions a prompt.")] = 3
    temperature: Annotated[NonNegative | None, _doc("Sampling temperature; none: not sent.")] = 0.9
    top_p: Annotated[Share | None, _doc("Nucleus mass; sent, since servers have other defaults; none: not sent.")] = 1.0
    max_tokens: Annotated[Count | None, _doc("Longest completion, in tokens; none: not sent.")] = 256
    frequency_penalty: Annotated[
        float | None, _doc("Penalty for tokens that already stand in the completion; none: not sent.")
    ] = 0.5
    seed: Annotated[int | None, _doc("Seed; completion i of a prompt is the same on every run; none: not sent.")] = SEED
    choices: Annotated[
        Count | Literal["all"] | None, _doc("Most completions that a request asks for, as its n; none: n is not sent.")
    ] = "all"
    system_role: Annotated[
        Literal["system"] | None, _doc("Role of system prompts; none: not sent, they open the first user message.")
    ] = "system"
    extra_body: Annotated[
        dict[str, Any], _doc("JSON of more fields of each request: top_k, min_p, stop, provider routing.")
    ] = msgspec.field(default_factory=dict)
    keep_lines: Annotated[str | None, _doc("Keep only the lines that match this pattern.")] = None
    concurrency: Annotated[Count, _doc("Most requests in flight; it adapts below that.")] = 256
    timeout: Annotated[Seconds, _doc("Seconds to wait for one reply.")] = 300.0
    batch_size: Annotated[Count, _doc("Sequences at once, engine transformers.")] = 32
    bf16: Annotated[
        bool | None, _doc("bfloat16, engine transformers; unset: on a GPU that has it. Completions differ by it.")
    ] = None
    price: Annotated[str | None, _doc("IN,CACHED,OUT in dollars per million tokens.")] = None
    max_usd: MaxUsd = None
    contrast: Annotated[bool, _doc("Two completions a prompt, from a good and a bad system prompt.")] = False
    good_system: Annotated[str, _doc("System prompt of the good one.")] = "Give an accurate and helpful answer."
    bad_system: Annotated[str, _doc("System prompt of the bad one.")] = (
        "Give an answer that is vague, unhelpful or slightly wrong, without saying so."
    )
    contrast_url: Annotated[str | None, _doc("Endpoint of an external model that gives both.")] = None
    contrast_model: Annotated[str | None, _doc("Model that gives both; unset: model.name.")] = None


class JudgeSection(Struct, kw_only=True):
    """Completions to judgments."""

    judge: Annotated[str, _doc("Who ranks the completions.")] = "llm"
    model: Annotated[str | list[str], _doc("Judge model; repeated, or with commas: a panel.")] = "gpt-5.4-mini"
    url: Annotated[str, _doc("OpenAI-compatible endpoint of the judge.")] = "https://api.openai.com/v1"
    function: Annotated[str | None, _doc("module:callable for --judge function.")] = None
    reward_model: Annotated[str | None, _doc("Folder or Hub id of a scoring model for --judge reward-model.")] = None
    batch_size: Annotated[Count, _doc("Completions at once, --judge reward-model.")] = 8
    against: Annotated[str | None, _doc("judgments.jsonl of another judge, for --judge human to compare with.")] = None
    rubric: Annotated[str | None, _doc("File that replaces the default rubric; each ## section is scored apart.")] = (
        None
    )
    orders: Annotated[Orders, _doc("Orders that show the candidates: 1 to 8, full, auto (a 3rd if two conflict).")] = 2
    votes: Annotated[
        Count | None, _doc("Votes of each model, in place of judge.orders: shifted orders, their reversals, repeats.")
    ] = None
    seed: Annotated[int, _doc("Seed of the orders.")] = SEED
    reasoning_effort: Annotated[str | None, _doc("Reasoning effort, for judges that reason; none: not sent.")] = "low"
    response_format: Annotated[
        Literal["json_schema", "json_object"] | None, _doc("Form in which replies are asked for; none: not sent.")
    ] = "json_schema"
    extra_body: Annotated[
        dict[str, Any], _doc("JSON of more fields of each request: chat_template_kwargs, provider routing.")
    ] = msgspec.field(default_factory=dict)
    max_tokens: Annotated[Count | None, _doc("Longest reply, reasoning included, in tokens; none: not sent.")] = 2048
    price: Annotated[str | None, _doc("IN,CACHED,OUT in dollars per million tokens, of the tier that is used.")] = None
    max_usd: MaxUsd = None
    flex: Annotated[bool, _doc("OpenAI's flex tier: half the price, and slow.")] = False
    batch: Annotated[bool, _doc("OpenAI's Batch API: half the price, within a day.")] = False
    wait: Annotated[bool, _doc("Wait for the batches; else send them, and take them in with a later run.")] = True
    batch_queue_tokens: Annotated[Count, _doc("Input tokens that may wait in batches; your tier's limit.")] = 2_000_000
    concurrency: Annotated[Count, _doc("Most requests in flight; it adapts below that.")] = 64
    timeout: Annotated[Seconds, _doc("Seconds to wait for one reply.")] = 300.0

    @property
    def models(self) -> list[str]:
        """Every judge model, once, in an order that does not depend on how they were written."""
        given = [self.model] if isinstance(self.model, str) else self.model
        return sorted({name.strip() for text in given for name in text.split(",")} - {""})


class PairSection(Struct, kw_only=True):
    """Judgments, scored rollouts or imported pairs to preference pairs."""

    strategy: Annotated[
        Strategy, _doc("Which completions are paired; auto: best-worst, from six completions on mu-2sigma.")
    ] = "auto"
    weights: Annotated[
        PairWeights, _doc("What a pair counts in training: the same, its prompt's share, or its score gap.")
    ] = "none"
    min_gap: Annotated[
        NonNegative | None,
        _doc(f"Least score gap; unset: {MIN_GAP:g} for judgments, {MIN_REWARD_GAP:g} for rollouts, none for imports."),
    ] = None
    max_pairs_per_prompt: Annotated[
        Count | None, _doc("Most pairs a prompt, those of the largest gap first; unset: all.")
    ] = None
    max_pairs: Annotated[Count, _doc("Most pairs in all, --strategy stratified.")] = 10_000
    high: Annotated[
        float, _doc("Least score of a chosen side, --strategy stratified; 0 is the lowest judged, 1 the highest.")
    ] = 0.7
    low: Annotated[float, _doc("Greatest score of a rejected side, so scaled; rewards are taken as they stand.")] = 0.4
    margin_column: Annotated[bool, _doc("Also write the score gap as `margin`, which reward trainers read.")] = False
    require_consistent: Annotated[bool, _doc("Drop a pair that any order inverts.")] = True
    length_control: Annotated[bool, _doc("Pair by scores without the part that is linear in length.")] = False
    val_share: Annotated[Share, _doc("Share of the prompts that go to val.jsonl.")] = 0.1
    skip_bad: SkipBad = False
    columns: Columns = None
    seed: Annotated[int, _doc("Seed of the split.")] = SEED


class TrainingSection(Struct, kw_only=True):
    """What both training stages have in common; TRL's and PEFT's own names."""

    columns: Columns = None
    learning_rate: Annotated[NonNegative, _doc("Peak learning rate.")] = 5e-6
    num_train_epochs: Annotated[Positive, _doc("Passes over the rows.")] = 1.0
    max_steps: Annotated[int, _doc("Optimizer steps, whatever num_train_epochs says; -1: as it says.")] = -1
    steps_at_most: Annotated[Count | None, _doc("Cap on the optimizer steps that num_train_epochs makes.")] = None
    per_device_train_batch_size: Annotated[Count, _doc("Rows a forward.")] = 4
    per_device_eval_batch_size: Annotated[Count, _doc("Rows a forward in evaluation.")] = 2
    gradient_accumulation_steps: Annotated[Count, _doc("Forwards an optimizer step.")] = 4
    max_length: Annotated[Count, _doc("Longest prompt plus completion, in tokens.")] = 2048
    tokens_per_batch: Annotated[
        Count | None, _doc("Most tokens a forward; a step's rows are divided by it, like lengths together.")
    ] = None
    batch_per_gpu: Annotated[
        bool, _doc("Rows a step are for each GPU; else for all together, so that more GPUs train the same.")
    ] = False
    bf16: Annotated[
        bool | None,
        _doc("bfloat16 compute; unset: on a GPU that has it, and from 50 million weights on on a CPU that has it."),
    ] = None
    gradient_checkpointing: Annotated[
        bool | None, _doc("Trade time for memory at the same loss; unset: on a GPU that needs it.")
    ] = None
    lr_scheduler_type: Annotated[Schedule, _doc("Learning rate schedule.")] = "cosine"
    warmup_steps: Annotated[
        Annotated[int, Meta(ge=0)] | None, _doc(f"Warmup, in optimizer steps; unset: {WARMUP:.0%} of the run's.")
    ] = None
    warmup_ratio: Annotated[Share | None, _doc("Warmup as a share of the steps; wins over the steps.")] = None
    weight_decay: Annotated[NonNegative, _doc("Weight decay.")] = 0.0
    max_grad_norm: Annotated[NonNegative, _doc("Gradient clipping norm.")] = 1.0
    logging_steps: Annotated[Count, _doc("Steps between two metric lines.")] = 10
    eval_steps: Annotated[Count, _doc("Steps between two evaluations.")] = 25
    save_steps: Annotated[Count, _doc("Steps between two checkpoints.")] = 25
    save_total_limit: Annotated[int, Meta(ge=2), _doc("Checkpoints kept; the best is always among them.")] = 3
    seed: Annotated[int, _doc("Seed of shuffling and initialisation.")] = SEED
    r: Annotated[Count, _doc("LoRA rank of a fresh adapter.")] = 32
    lora_alpha: Annotated[NonNegative, _doc("LoRA alpha of a fresh adapter.")] = 64
    lora_dropout: Annotated[Share, _doc("LoRA dropout of a fresh adapter.")] = 0.0
    target_modules: Annotated[str | list[str], _doc("LoRA targets of a fresh adapter.")] = "all-linear"
    use_rslora: Annotated[bool, _doc("Scale a fresh adapter by alpha / sqrt(r) instead of alpha / r.")] = False
    use_dora: Annotated[bool, _doc("DoRA for a fresh adapter; vLLM serves it merged only (push --merge).")] = False
    init_lora_weights: Annotated[
        InitLoraWeights, _doc("How a fresh adapter begins; true: B is zero, so that it changes nothing yet.")
    ] = True
    load_in_4bit: Annotated[bool, _doc("Base weights in 4 bits: NF4, double quantisation, bfloat16 compute.")] = False
    allow_cpu: Annotated[bool, _doc("Train on the CPU though a card was asked for, or the base is large.")] = False
    report_to: Annotated[Tracker | None, _doc("Tracker; unset: wandb where WANDB_API_KEY is set and it is there.")] = (
        None
    )


class TrainSection(TrainingSection, kw_only=True):
    """Preferences to the DPO adapter."""

    beta: Annotated[Positive, _doc("Strength of the pull towards the reference.")] = 0.1
    loss_type: Annotated[
        LossType | Annotated[list[LossType], Meta(min_length=1)],
        _doc("TRL loss type, or rebel; several are added up by their loss_weights."),
    ] = "sigmoid"
    loss_weights: Annotated[list[float] | None, _doc("Weight of each loss, where there are several; unset: 1.")] = None
    offset_alpha: Annotated[
        NonNegative | None,
        _doc("Reward that a pair of the mean gap must gain (ODPO, rebel); unset: 0, with rebel 1."),
    ] = None
    gap_by: Annotated[
        Literal["rank", "score"], _doc("What that gap is of: places among all completions, or scores as they stand.")
    ] = "rank"
    ld_alpha: Annotated[Share | None, _doc("Weight of tokens beyond the shorter side's length (LD-DPO); unset: 1.")] = (
        None
    )
    use_weighting: Annotated[bool, _doc("Weight pairs by how likely the policy makes both sides (WPO).")] = False
    label_smoothing: Annotated[Share, _doc("Assumed share of flipped labels.")] = 0.0
    kl_prompts: Annotated[int, Meta(ge=0), _doc("Held-out prompts on which each evaluation measures KL.")] = 8
    kl_tokens: Annotated[Count, _doc("Longest completion sampled for that, in tokens.")] = 64
    full: Annotated[bool, _doc("Train every weight, the adapter folded in, against a frozen copy.")] = False
    keep_reference: Annotated[
        bool | None, _doc("Keep the reference's log-probabilities on disk; unset: where rows come up twice.")
    ] = None
    curriculum: Annotated[bool, _doc("First epoch from the largest score gap to the smallest.")] = False
    merge: Annotated[bool, _doc("Also save the base with the adapter folded in, and check it.")] = False


class SftSection(TrainingSection, kw_only=True):
    """`train --stage sft`: the adapter that DPO starts from."""

    learning_rate: Annotated[NonNegative, _doc("Peak learning rate.")] = 3e-5


class GateSection(Struct, kw_only=True):
    """What a DPO run must not do, and what is done about it."""

    confidence: Annotated[
        float, Meta(gt=0.5, lt=1), _doc("Level of the intervals that gates ask for, of training and evaluation.")
    ] = 0.95
    kl_limit: Annotated[Positive, _doc("Most KL(policy || reference) of the policy's own text, in nats a token.")] = 0.1
    kl_actions: Annotated[
        list[KlAction], _doc("What each evaluation over the limit sets off, the first one first; then the run stops.")
    ] = msgspec.field(default_factory=lambda: ["halve_lr", "raise_beta", "rollback", "stop"])
    retreat: Annotated[
        bool, _doc("Stop at the first evaluation over the limit, and scale the adapter back to exactly the limit.")
    ] = False
    forgetting: Annotated[
        NonNegative,
        _doc("Nats a token that evaluate's forgetting texts may become less likely; 0.1 is a tenth more perplexity."),
    ] = 0.1
    adaptive_beta: Annotated[bool, _doc("Steer beta towards kl_target at each evaluation.")] = False
    kl_target: Annotated[Positive, _doc("KL that adaptive_beta aims at, in nats a token.")] = 0.05
    patience: Annotated[
        int, Meta(ge=0), _doc("Evaluations without a better held-out margin until the run ends; 0: all.")
    ] = 5
    step_zero_tolerance: Annotated[
        NonNegative, _doc("Most that the first loss may be off ln 2, and a first margin off 0, in nats.")
    ] = 1e-3
    token_rows: Annotated[
        int, Meta(ge=0), _doc("Rows that must be the same tokens on the server and by the SFT adapter's template.")
    ] = 10
    loss_spike: Annotated[Positive, _doc("Training loss over the median of the logs before that is a spike.")] = 1.5
    chosen_falls: Annotated[
        NonNegative, _doc("Nats that a chosen completion may become less likely, before that is a fault.")
    ] = 1.0
    length_drift: Annotated[
        Positive, _doc("Length of the policy's samples over the reference's, or the inverse, that is a drift.")
    ] = 1.5
    nan_rollbacks: Annotated[
        int, Meta(ge=0), _doc("Rollbacks, each to a tenth of the rate, before a loss that is no number ends the run.")
    ] = 1
    smaller_batch: Annotated[bool, _doc("Halve the rows a forward where memory lacks; a step keeps its rows.")] = True


class PlanSection(Struct, kw_only=True):
    """What `inspect plan` reckons with."""

    gpu_memory_gb: Annotated[Positive, _doc("Memory that the card can really give; of an L4's 24 GB.")] = 23.6
    gpu_tflops: Annotated[Positive, _doc("Dense bfloat16 peak of the card; an L4's.")] = 121.0
    utilization: Annotated[Share, _doc("Share of that peak that training reaches; assumed, not measured.")] = 0.35
    modal_usd_per_hour: Annotated[NonNegative, _doc("Price of the card on Modal.")] = 0.80
    gke_usd_per_hour: Annotated[NonNegative, _doc("Price of a node with the card on GKE.")] = 0.71
    max_usd: Annotated[Positive | None, _doc("Dollars that a rented run may cost; it saves and ends with 4.")] = None
    max_hours: Annotated[Positive | None, _doc("Hours that it may hold its cards; likewise.")] = None


class EvaluateSection(Struct, kw_only=True):
    """Policy against reference on held-out prompts."""

    prompts: Annotated[str | None, _doc("Held-out prompts; unset: the prompts of val.jsonl.")] = None
    skip_bad: SkipBad = False
    columns: Columns = None
    samples: Annotated[Count, _doc("Completions a prompt and adapter.")] = 1
    kl_prompts: Annotated[int, Meta(ge=0), _doc("Prompts on which KL is measured; 0: none.")] = 32
    kl_by_endpoint: Annotated[
        bool, _doc("Also by an endpoint, one request at a time; vLLM on a CPU dies of it beside others.")
    ] = False
    rate: Annotated[bool, _doc("Also have each completion rated by itself, from 1 to 10.")] = True
    general: Annotated[
        str | None, _doc("Prompt-completion rows of what must not be forgotten; measured on base and adapters here.")
    ] = None
    forgetting_rows: Annotated[
        int, Meta(ge=0), _doc("Rows of those, and of what SFT held out, that are measured; 0: none.")
    ] = 64
    gate: Annotated[
        str | list[str] | None, _doc("win-rate>X, or length-controlled-win-rate>X: what the interval must clear.")
    ] = None
    max_usd: MaxUsd = None
    match: Annotated[Match, _doc("How --quiz tells what is right: exact, or judge where it is not exactly that.")] = (
        "exact"
    )
    bootstrap: Annotated[Count, _doc("Bootstrap resamples, by prompt.")] = 2000
    seed: Annotated[int, _doc("Seed of sampling and bootstrap.")] = SEED

    @property
    def gates(self) -> list[str]:
        """Every gate."""
        return [self.gate] if isinstance(self.gate, str) else self.gate or []


class RunSection(Struct, kw_only=True):
    """`nothing-dpo run`: the whole chain."""

    rounds: Annotated[Count, _doc("Rounds; each starts from the adapter of the one before, its reference.")] = 1
    prompts: Annotated[
        list[str], _doc("Prompts of each round, a file or folder a round; none: generate.prompts in every round.")
    ] = msgspec.field(default_factory=list)
    old_pairs: Annotated[bool, _doc("Train on the pairs of the rounds before as well.")] = False
    max_usd: Annotated[
        NonNegative | None,
        _doc("Most dollars for completions and judgments over all rounds and attempts; unset: none."),
    ] = None
    max_failed: Annotated[Share, _doc("Share of a stage's prompts that may fail; above it the chain stops.")] = 0.0


class Config(Struct, kw_only=True):
    """Every setting of every stage."""

    data: Annotated[str, _doc("Folder of completions, judgments and pairs.")] = "data/dpo"
    runs: Annotated[str, _doc("Folder of training runs.")] = "runs"
    model: ModelSection = msgspec.field(default_factory=ModelSection)
    generate: GenerateSection = msgspec.field(default_factory=GenerateSection)
    judge: JudgeSection = msgspec.field(default_factory=JudgeSection)
    pair: PairSection = msgspec.field(default_factory=PairSection)
    train: TrainSection = msgspec.field(default_factory=TrainSection)
    sft: SftSection = msgspec.field(default_factory=SftSection)
    gate: GateSection = msgspec.field(default_factory=GateSection)
    plan: PlanSection = msgspec.field(default_factory=PlanSection)
    evaluate: EvaluateSection = msgspec.field(default_factory=EvaluateSection)
    run: RunSection = msgspec.field(default_factory=RunSection)
    serve: ServeSection = msgspec.field(default_factory=ServeSection)
    gke: GkeSection = msgspec.field(default_factory=GkeSection)
    modal: ModalSection = msgspec.field(default_factory=ModalSection)
