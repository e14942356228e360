"""Sizes of bases that are not on this machine: from a table, or from their config.json alone on the Hub.

The table holds what the config.json of well-known instruct models says, so that `inspect plan` works for their ids
without a network, and before 6 GB are downloaded. Reads nothing else, writes only the Hub's cache.
"""

import re
from pathlib import Path

from dpo_cli.errors import UserError
from dpo_cli.models.base_model import find_base
from dpo_cli.training.plan import Shape, read_shape

FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings",
)  # fmt: skip
SIZES = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, True),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, True),
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "meta-llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "llama-3.3-70b": (8192, 28672, 80, 64, 8, 128, 128256, False),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 64, 151936, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 128, 151936, True),
    "qwen2.5-3b": (2048, 11008, 36, 16, 2, 128, 151936, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, False),
    "qwen2.5-14b": (5120, 13824, 48, 40, 8, 128, 152064, False),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, 128, 152064, False),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936, True),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936, True),
    "qwen3-8b": (4096, 12288, 36, 32, 8, 128, 151936, False),
    "smollm2-135m": (576, 1536, 30, 9, 3, 64, 49152, True),
    "smollm2-360m": (960, 2560, 32, 15, 5, 64, 49152, True),
    "smollm2-1.7b": (2048, 8192, 24, 32, 32, 64, 49152, True),
    "mistral-7b-instruct-v0.3": (4096, 14336, 32, 32, 8, 128, 32768, False),
    "mistral-7b-v0.3": (4096, 14336, 32, 32, 8, 128, 32768, False),
}
_VARIANT = re.compile(r"-(instruct|it|base|chat)(-\d{4})?$")


def shape_of(base: str) -> tuple[Shape, str]:
    """Sizes of a base, and where they are from.

    Raises:
        UserError: it is not on this machine, nor in the table, nor can its config.json be had.
    """
    folder = find_base(base)
    if folder is not None:
        return read_shape(folder), "its config.json"
    name = base.rpartition("/")[2].lower()
    known = name if name in SIZES else _VARIANT.sub("", name)
    if known in SIZES:
        return Shape(**dict(zip(FIELDS, SIZES[known], strict=True))), f"what is known of {known}"  # type: ignore[arg-type]
    return read_shape(_fetch_config(base)), "its config.json, fetched alone"


def _fetch_config(base: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(base, "config.json")).parent
    except Exception as error:  # of many kinds: no such id, no access, no network, no library
        raise UserError(
            f"the base model is not on this machine, and its config.json can't be had: {' '.join(str(error).split())}",
            where=base,
            hint="set model.base to a folder, or HF_TOKEN to a key that may read it",
        ) from None
