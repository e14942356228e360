"""Recipes by name: settings that win over the defaults and lose to everything else. Data only."""

from typing import Any

# What the guide that a preset is from says of it, and what came of it here.
NOTES = {
    "l4": "A LoRA adapter of rank 32 on a 3B model: 5e-6, beta 0.1, one epoch, 16 pairs a step. The guide's 20 steps "
    "of warmup are 35% of its 919 pairs' 58 steps; here warmup is a tenth of the steps.",
    "l4-qlora": "The same with the base in 4 bits, for a card or a base that bfloat16 does not fit.",
    "rank1": "A fresh rank-1 adapter: 5e-7, 100 steps of 8 pairs. So low a rate hardly moves an adapter: on a tiny "
    "model the held-out margin was 1e-6 and its interval held 0, which the gates call not shown: raise the rate.",
    "lora16": "A fresh rank-16 adapter on the attention's modules: 5e-5, a higher rate than for all weights.",
    "full": "All weights: 5e-7, a tenth warmup, weight decay 0.01, 1,024 tokens.",
    "conservative": "1e-6, three epochs, at most 1,000 steps, evaluated and saved every 100. The guide's 100 steps of "
    "warmup are a tenth of those 1,000, which is what is set: a shorter run would be warmup for the most part.",
    "demo": "What `nothing-dpo demo` runs: a tiny model that is made on the spot.",
    "demo-base": "What `nothing-dpo demo --base` runs, on a small instruct model of yours.",
}

# `l4` is the recipe of the defaults: one L4, an SFT adapter of rank 32 on a 3B model.
PRESETS: dict[str, dict[str, Any]] = {
    "l4": {},
    "l4-qlora": {"train.load_in_4bit": True, "train.bf16": True, "train.gradient_checkpointing": True},
    "rank1": {
        "model.adapter": None, "train.r": 1, "train.lora_alpha": 1.0,
        "train.target_modules": ["o_proj", "v_proj", "up_proj", "down_proj"], "train.learning_rate": 5e-7,
        "train.max_steps": 100, "train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4,
        "train.merge": True,
        "sft.r": 1, "sft.lora_alpha": 1.0, "sft.target_modules": ["o_proj", "v_proj", "up_proj", "down_proj"],
        "sft.num_train_epochs": 3.0,
    },
    "lora16": {
        "model.adapter": None, "train.r": 16, "train.lora_alpha": 32.0, "train.lora_dropout": 0.05,
        "train.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "train.learning_rate": 5e-5,
    },
    "full": {
        "train.full": True, "train.learning_rate": 5e-7, "train.warmup_ratio": 0.1, "train.weight_decay": 0.01,
        "train.max_length": 1024,
    },
    "conservative": {
        "train.learning_rate": 1e-6, "train.num_train_epochs": 3, "train.steps_at_most": 1000,
        "train.warmup_ratio": 0.1, "train.weight_decay": 0.01, "train.max_grad_norm": 1.0, "train.max_length": 1024,
        "train.gradient_checkpointing": True, "train.eval_steps": 100, "train.save_steps": 100,
    },
    "demo": {
        "model.base": "base", "model.adapter": "adapters/sft", "model.dpo_adapter": "adapters/dpo",
        "model.name": "spin", "model.dpo_name": "spin-dpo",
        "generate.engine": "transformers", "generate.n": 4, "generate.max_tokens": 96,
        "generate.temperature": 1.0, "generate.frequency_penalty": 0.0, "generate.batch_size": 64,
        "judge.judge": "function", "judge.function": "dpo_cli.demo.score:voices",
        "sft.learning_rate": 3e-3, "sft.per_device_train_batch_size": 16, "sft.per_device_eval_batch_size": 32,
        "sft.gradient_accumulation_steps": 1, "sft.warmup_steps": 5, "sft.r": 8, "sft.lora_alpha": 16.0,
        "sft.eval_steps": 100, "sft.save_steps": 100,
        "train.learning_rate": 1.5e-3, "train.beta": 0.3, "train.per_device_train_batch_size": 8,
        "train.per_device_eval_batch_size": 16, "train.gradient_accumulation_steps": 1, "train.warmup_steps": 5,
        "train.logging_steps": 5, "train.eval_steps": 100, "train.save_steps": 100,
        "gate.kl_limit": 0.2,  # lines learnt by heart: to prefer one costs more than in a model that can rephrase
        "evaluate.prompts": "data/heldout.jsonl", "evaluate.samples": 2,
    },
    # The same chain on a small instruct model of yours, HuggingFaceTB/SmolLM2-135M-Instruct for one.
    "demo-base": {
        "model.adapter": "adapters/sft", "model.dpo_adapter": "adapters/dpo",
        "model.name": "spin", "model.dpo_name": "spin-dpo",
        "generate.engine": "transformers", "generate.n": 4, "generate.max_tokens": 72,
        "generate.temperature": 1.0, "generate.frequency_penalty": 0.0, "generate.batch_size": 32,
        "judge.judge": "function", "judge.function": "dpo_cli.demo.score:voices",
        "sft.learning_rate": 2e-3, "sft.num_train_epochs": 2.0, "sft.per_device_train_batch_size": 8,
        "sft.per_device_eval_batch_size": 8, "sft.gradient_accumulation_steps": 1, "sft.warmup_steps": 3,
        "sft.r": 16, "sft.lora_alpha": 32.0, "sft.save_steps": 16,
        "sft.logging_steps": 4, "sft.eval_steps": 100, "sft.max_length": 512,
        "train.learning_rate": 5e-5, "train.beta": 0.1, "train.num_train_epochs": 2.0,
        "train.per_device_train_batch_size": 4, "train.per_device_eval_batch_size": 8,
        "train.gradient_accumulation_steps": 1, "train.warmup_steps": 3, "train.max_length": 512,
        "train.logging_steps": 4, "train.eval_steps": 100, "train.save_steps": 100,
        "gate.retreat": True,  # a few held-out pairs can't choose among checkpoints; the KL limit is kept all the same
        "evaluate.prompts": "data/heldout.jsonl", "evaluate.samples": 2, "evaluate.kl_prompts": 16,
    },
}  # fmt: skip
