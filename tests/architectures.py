"""Tiny models of the architectures that people bring, by transformers' own configurations, with one tokenizer."""

import shutil
from pathlib import Path
from typing import Any

from adapters import TEXTS

from dpo_cli.demo.tiny import make_base

# The names of Llama's sizes, which most configurations share.
COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
}  # fmt: skip
HYBRID: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
# model_type -> what its configuration needs besides, or instead; None takes one of Llama's sizes away.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5_text": HYBRID,
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 16, "hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 16, "layer_types": ["sliding_attention",
                    "full_attention"]},
    "mistral": {"sliding_window": 16},
    "phi3": {"original_max_position_embeddings": 512, "head_dim": None},
    "olmo2": {"head_dim": None},
    "granite": {"head_dim": None},
    "smollm3": {"no_rope_layers": [1, 0], "head_dim": None},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, **dict.fromkeys(COMMON)},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0],
                    "interleave_moe_layer_step": 1, "attention_chunk_size": 64},
}  # fmt: skip
# The linear layers that an adapter of few modules goes to, where they have other names than Llama's.
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "o_proj"],
}


def make(folder: Path, kind: str, **changes: Any) -> Path:
    """A base of a model type in `folder`, with random weights, its own generation settings and our chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer_from = folder.with_name("tokenizer")
    if not tokenizer_from.exists():
        make_base(tokenizer_from, TEXTS * 4, vocabulary=400)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(tokenizer_from / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {key: value for key, value in (COMMON | ARCHITECTURES[kind] | changes).items() if value is not None}
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **ends, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Save an adapter with random weights of the size that training makes, none of them zero, by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(task_type="CAUSAL_LM", **settings)
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad and ("lora_B" in name or "embedding_B" in name or "lora_" not in name):
                value += 0.02 * torch.randn_like(value)
    model.save_pretrained(folder)
    return folder
