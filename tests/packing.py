"""TRL's DPO trainer and ours over the same odd pairs and the same tiny models of several architectures."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers import models as architectures
from trl import DPOConfig, DPOTrainer

from dpo_cli.training.forward import packed

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def configuration(name: str, **changes: Any) -> Any:
    """A tiny configuration of an architecture; heads are grouped."""
    return getattr(architectures, f"{name}Config")(**SIZES | changes)


def rows(lengths: list[tuple[int, int, int]], begins_alike: int = 0, seed: int = 0) -> list[dict[str, list[int]]]:
    """Pairs of random tokens: (prompt, chosen, rejected) lengths; completions begin with the same tokens."""
    random_ = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [random_.randrange(3, VOCABULARY) for _ in range(count)]

    made = []
    for prompt, chosen, rejected in lengths:
        row = {"prompt_ids": tokens(prompt), "chosen_ids": tokens(chosen), "rejected_ids": tokens(rejected)}
        alike = min(begins_alike, chosen, rejected)
        row["rejected_ids"][:alike] = row["chosen_ids"][:alike]
        made.append(row)
    return made


# Chosen shorter and longer than rejected; completions and a prompt of one token; one the beginning of the other.
PAIRS = [
    *rows([(9, 5, 7), (20, 8, 2), (1, 3, 6), (7, 9, 1), (5, 1, 1)]),
    *rows([(12, 6, 4), (4, 1, 6), (6, 3, 3)], begins_alike=3, seed=1),
]


class Plain(DPOTrainer):
    """TRL's trainer; rows come encoded, and are taken in their order."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Packed(packed.PackedSteps, Plain):
    """The same with our steps."""


class Gradients(TrainerCallback):
    """Keeps the gradient of each step as one vector a parameter."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{number}": number for number in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), pad_token="t0", bos_token="t1", eos_token="t2"
    )


def make(
    kind: type[DPOTrainer], folder: Path, config: Any, pairs: list[dict[str, list[int]]] = PAIRS, lora: bool = True,
    load: Callable[[], Any] | None = None, **arguments: Any,
) -> Any:  # fmt: skip
    """A trainer whose policy has moved away from its reference, which is a frozen copy of its start.

    `load` makes the base where it is no random model of this configuration.
    """
    torch.manual_seed(0)
    model = load() if load else AutoModelForCausalLM.from_config(config)
    if lora:
        settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, settings)
    settings = {
        "bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": len(pairs),
        "per_device_eval_batch_size": len(pairs), "max_length": None, "gradient_checkpointing": False,
        "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "max_grad_norm": 0.0, "disable_tqdm": True,
        "save_strategy": "no", "optim": "sgd",
    }  # fmt: skip
    data = Dataset.from_list(pairs)
    trainer = kind(
        model=model, ref_model=None if lora else AutoModelForCausalLM.from_config(config), train_dataset=data,
        args=DPOConfig(output_dir=str(folder), **settings | arguments), eval_dataset=data,
        processing_class=tokenizer(), callbacks=[gradients := Gradients()],
    )  # fmt: skip
    trainer.gradients = gradients
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=noise).to(parameter.device)
    return trainer


def outcome(trainer: Any) -> dict[str, Any]:
    """Loss and metrics of one step and one evaluation, and the step's gradient."""
    trainer.train()
    trainer.evaluate()
    clocks = ("runtime", "per_second", "flos", "epoch", "train_loss", "tokens")
    logged = {
        name: value
        for row in trainer.state.log_history
        for name, value in row.items()
        if not any(clock in name for clock in clocks) or name == "num_tokens"
    }
    return {"logged": logged, "gradient": trainer.gradients.steps[0]}


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Losses and metrics within 1e-5, each parameter's gradient within 2e-5 of its norm."""
    assert ours["logged"].keys() == theirs["logged"].keys()
    for name, value in theirs["logged"].items():
        assert abs(ours["logged"][name] - value) <= 1e-5 * max(1.0, abs(value)), name
    assert ours["gradient"].keys() == theirs["gradient"].keys() != set()
    for name, value in theirs["gradient"].items():
        assert (ours["gradient"][name] - value).norm() <= 2e-5 * value.norm() + 1e-9, name
