"""A base model small enough for two cores: tokenizer and Llama, made from text, saved like any other.

Writes an ordinary model folder, so that training, sampling and vLLM load it by their real loading code.
"""

import random
from pathlib import Path

from dpo_cli.progress import Progress

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def make_base(
    folder: Path,
    texts: list[str],
    *,
    vocabulary: int = 768,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    context: int = 2048,
    seed: int = 0,
) -> Path:
    """Save a byte-level BPE tokenizer trained on `texts`, and a randomly initialised Llama, in `folder`.

    hidden / heads must be a width that vLLM has kernels for; on a CPU 32, 64, 80, 96, 112 or 128.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|pad|>", "<|start|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|start|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def pretrain(
    folder: Path,
    texts: list[str],
    progress: Progress,
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    seed: int = 0,
) -> None:
    """Teach the model in `folder` to continue `texts`: next-token loss on whole texts, one cycle of learning rate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    rows = [tokenizer(tokenizer.bos_token + text + tokenizer.eos_token)["input_ids"] for text in texts]
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    draw = random.Random(seed)
    tokens = 0
    progress.begin("pretrain", steps)
    try:
        for step in range(1, steps + 1):
            batch = tokenizer.pad({"input_ids": draw.sample(rows, batch_size)}, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            loss = network(**batch, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            tokens += int(batch["attention_mask"].sum())
            progress.update(step, tokens=tokens, loss=loss.item())
    finally:
        progress.end()
    network.save_pretrained(folder)
