"""SFT's packed forward against TRL's own: losses, gradients, metrics, evaluation, parts, fallbacks."""

import pytest
import torch
from datasets import Dataset
from packing import VOCABULARY, Gradients, assert_equal, configuration, outcome, rows, tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from dpo_cli.training.encode import IGNORED
from dpo_cli.training.forward import collator, packed

torch.set_num_threads(1)

# A prompt and a completion of one token, none of a prompt's, and rows of odd lengths.
LENGTHS = [(9, 5), (20, 8), (1, 3), (7, 1), (5, 9), (12, 6), (4, 1), (0, 6)]


def demonstrations(lengths=LENGTHS):
    made = []
    for row in rows([(prompt, completion, 1) for prompt, completion in lengths]):
        ids = row["prompt_ids"] + row["chosen_ids"]
        labels = [IGNORED] * len(row["prompt_ids"]) + row["chosen_ids"]
        made.append({"input_ids": ids, "labels": labels})
    return made


class Plain(SFTTrainer):
    """TRL's trainer; rows come encoded, and are taken in their order."""

    def _prepare_dataset(self, dataset, *_, **__):
        return dataset

    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Packed(packed.PackedSteps, Plain):
    """The same with our steps."""


def make(kind, folder, config, **arguments):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
    data = Dataset.from_list(demonstrations())
    settings = {"model": get_peft_model(model, settings), "train_dataset": data, "eval_dataset": data}
    few = {
        "bf16": False, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": len(LENGTHS),
        "per_device_eval_batch_size": len(LENGTHS), "max_length": None, "gradient_checkpointing": False,
        "learning_rate": 0.0, "max_steps": 1, "logging_steps": 1, "max_grad_norm": 0.0, "disable_tqdm": True,
        "save_strategy": "no", "optim": "sgd",
    }  # fmt: skip
    trainer = kind(
        args=SFTConfig(output_dir=str(folder), **few | arguments), processing_class=tokenizer(),
        callbacks=[gradients := Gradients()], **settings,
    )  # fmt: skip
    trainer.gradients = gradients
    return trainer


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3Text"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 3},
    ],
    ids=str,
)
def test_sft_comes_to_what_trl_comes_to(tmp_path, name, arguments):
    config = configuration(name, **({} if name == "Llama" else {"head_dim": 16}))
    theirs = outcome(make(Plain, tmp_path, config, **arguments))
    trainer = make(Packed, tmp_path, config, **arguments)
    assert packed.enable(trainer) is None
    assert_equal(outcome(trainer), theirs)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
@pytest.mark.parametrize("pack", [True, False])
def test_a_divided_batch_comes_to_what_trls_undivided_one_does(tmp_path, budget, pack):
    config = configuration("Llama") if pack else configuration("Granite", logits_scaling=8.0)
    theirs = outcome(make(Plain, tmp_path, config))
    trainer = make(Packed, tmp_path, config)
    assert (packed.enable(trainer, budget) is None) == pack
    assert_equal(outcome(trainer), theirs)
    divided = [part for _, part in collator.micro_batches(trainer.data_collator(demonstrations()))]
    assert len(divided) in {1: [len(LENGTHS)], 40: range(3, 7), 10_000: [1]}[budget]


def test_only_what_is_scored_meets_the_head(tmp_path, monkeypatch):
    trainer = make(Packed, tmp_path, configuration("Llama"))
    assert packed.enable(trainer) is None
    scored = []
    score = packed.score
    monkeypatch.setattr(
        packed, "score", lambda hidden, *rest, **more: scored.append(len(hidden)) or score(hidden, *rest, **more)
    )
    batch = trainer.data_collator(demonstrations())
    trainer.compute_loss(trainer.model, batch)
    assert scored == [sum(completion for _, completion in LENGTHS) - 1]  # the first token of a row is not predicted
    assert batch["input_ids"].max() < VOCABULARY
