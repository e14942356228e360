"""What can go wrong in DPO training, how it looks, and which setting mends it: one table, one guide.

The guards name their findings by the keys of `REMEDIES`; `inspect run --explain` shows the entries that apply to a
run, or everything. Data only; reads and writes nothing.
"""

from typing import Any

from msgspec import Struct


class Remedy(Struct, frozen=True):
    """One fault: what shows it, what causes it, what to change, in the order in which to try."""

    symptom: str
    causes: tuple[str, ...]
    remedies: tuple[str, ...]


class Rule(Struct, frozen=True):
    """One line of the hyperparameter guide: values of a setting, what they do, when to use them."""

    setting: str
    values: str
    effect: str
    use: str


REMEDIES = {
    "step_zero": Remedy(
        "before the first update the loss is not ln 2, or a margin not 0: policy and reference differ",
        ("the reference is the base model, or another adapter", "dropout is on", "precision"),
        ("name the SFT adapter as model.adapter, and nothing else", "set train.lora_dropout = 0",
         "set train.bf16 = false"),
    ),
    "tokens": Remedy(
        "training and serving, or the SFT adapter, see different tokens",
        ("another chat template", "BOS doubled by the server", "a template that does not end the turn"),
        ("serve the base with its own chat template: serve-config", "train the SFT adapter by that template",
         "set model.chat_template_kwargs to what the server uses"),
    ),
    "kl_limit": Remedy(
        "the policy's own text has left the reference's by more than kl_limit nats a token",
        ("learning rate too high", "beta too low", "too many steps"),
        ("halve train.learning_rate", "double train.beta", "halve train.max_steps"),
    ),
    "margin_stalls": Remedy(
        "held-out margins have stopped rising",
        ("the judge's preferences are weak or inconsistent", "learning rate too low", "beta too high"),
        ("raise pair.min_gap and look at inspect pairs", "raise train.learning_rate with care",
         "lower train.beta, to 0.08 say", "train longer"),
    ),
    "chosen_falls": Remedy(
        "held-out chosen completions become less likely than under the reference",
        ("chosen and rejected share most of their text", "learning rate too high",
         "chosen is unlike what the policy samples"),
        ("halve train.learning_rate", "raise train.beta", "make pairs from the policy's own samples"),
    ),
    "one_sided": Remedy(
        "the margin comes from rejected completions alone: both rewards fall, rejected faster",
        ("rejected is easy to tell by its form", "learning rate too high"),
        ("raise train.beta", "halve train.learning_rate", "look at what tells the pairs apart: inspect pairs --stats"),
    ),
    "length_drift": Remedy(
        "the policy's samples are much longer or shorter than the reference's",
        ("chosen is longer, or shorter, than rejected in most pairs", "beta too low"),
        ("balance the lengths of the pairs", "raise train.beta", "use train.loss_type = sigmoid_norm"),
    ),
    "loss_spike": Remedy(
        "the training loss jumps far above its recent level",
        ("learning rate too high", "batch too small", "gradient clipping too loose", "warmup too short"),
        ("halve train.learning_rate", "double train.gradient_accumulation_steps", "set train.max_grad_norm = 0.5",
         "double train.warmup_steps"),
    ),
    "nan": Remedy(
        "the loss is not a number",
        ("learning rate far too high", "overflow in the number format"),
        ("divide train.learning_rate by ten", "set train.bf16 = false", "set train.max_grad_norm = 0.5"),
    ),
    "out_of_memory": Remedy(
        "the card's memory does not suffice",
        ("batch too large", "rows too long", "no gradient checkpointing"),
        ("set train.tokens_per_batch, or halve it",
         "lower train.per_device_train_batch_size and raise train.gradient_accumulation_steps",
         "set train.gradient_checkpointing = true", "lower train.max_length", "set train.bf16 = true",
         "use --preset l4-qlora"),
    ),
    "no_effect": Remedy(
        "evaluate finds the DPO adapter no better than the SFT adapter, or too timid",
        ("the SFT adapter has not learnt the task", "learning rate too low", "beta too high",
         "rejected is too much like chosen"),
        ("train the SFT adapter first: train --stage sft", "raise train.learning_rate with care", "lower train.beta",
         "raise pair.min_gap and generate.temperature, for pairs that differ"),
    ),
    "too_conservative": Remedy(
        "the policy writes almost as the reference does",
        ("beta too high", "learning rate too low", "rejected is too much like chosen"),
        ("lower train.beta", "raise train.learning_rate: train --auto finds one", "add more diverse chosen completions",
         "raise pair.min_gap, for pairs that differ"),
    ),
    "loss_rises": Remedy(
        "the training loss rises steadily",
        ("learning rate too high", "warmup too short", "pairs contradict each other"),
        ("halve train.learning_rate", "set train.warmup_ratio = 0.2", "look at the pairs: inspect pairs --lint"),
    ),
    "forgetting": Remedy(
        "the model has lost what it could do besides",
        ("beta too low", "too many steps", "pairs of one kind alone"),
        ("raise train.beta", "halve train.learning_rate", "add pairs of the other abilities",
         "evaluate --scales 0.5,1 --pick, for a point nearer to the SFT adapter",
         "train an adapter instead of --set train.full=true"),
    ),
}  # fmt: skip

# The tables of the guides that the presets are from, and one published warning.
GUIDE = (
    Rule("train.learning_rate", "1e-7 to 5e-7", "very conservative", "all weights, large models, rank 1"),
    Rule("train.learning_rate", "5e-7 to 1e-6", "standard for all weights", "most full fine-tuning"),
    Rule("train.learning_rate", "1e-6 to 5e-6", "fast for all weights", "small models, strong data, an SFT adapter"),
    Rule("train.learning_rate", "5e-6 to 5e-5", "standard for LoRA", "a fresh adapter can take 5e-5"),
    Rule("train.learning_rate", "5e-6, published", "GSM8K lost 11.4 points (beta 0.1, LoRA, 1 to 1.5B)",
         "1e-6 lost 1 point: set evaluate.general and gate.forgetting where such an ability must stay"),
    Rule("train.beta", "0.01", "very aggressive", "a strong preference that outweighs what else the model can do"),
    Rule("train.beta", "0.05", "weak pull to the reference", "a clear preference signal"),
    Rule("train.beta", "0.1", "standard", "most runs; raise it as KL nears the limit, lower it if progress is slow"),
    Rule("train.beta", "0.15 to 0.3", "strong pull", "when other abilities must stay"),
    Rule("train.beta", "0.5", "conservative", "the base's abilities must be kept"),
    Rule("train.beta", "1.0", "hardly any change", "slight steering"),
    Rule("effective batch", "4 to 8", "fast, less stable", "few pairs, experiments"),
    Rule("effective batch", "16 to 32", "standard", "most runs"),
    Rule("effective batch", "64 and more", "slow, more stable", "many pairs"),
)  # fmt: skip


def shown_by(events: list[dict[str, Any]]) -> list[str]:
    """Faults that a run's events name, in the order of the table; a check that was passed is none."""
    told = [event for event in events if not event.get("ok")]
    seen = {event.get("event") for event in told} | {event.get("reason") for event in told}
    return [name for name in REMEDIES if name in seen]


def advice(name: str) -> str:
    """The first remedies of a fault, on one line."""
    return "; ".join(REMEDIES[name].remedies[:2])
