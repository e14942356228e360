"""Count the tokens of a text with the base model's tokenizer, where that is at hand.

Reads the tokenizer's files, never the network. Not covered: models of the Hub that are only in its cache.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


def token_counter(base: str) -> Callable[[str], int] | None:
    """What counts tokens; None where transformers or the model's folder, or a tokenizer in it, is missing.

    Args:
        base: folder of the base model; a Hub id is none.
    """
    if not (Path(base) / "tokenizer_config.json").is_file() or find_spec("transformers") is None:
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
