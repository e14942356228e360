"""What lies beside a model's weights: its tokenizer, chat template and generation settings, and what damages them.

Reads their files; writes nothing and needs neither torch nor transformers. Not covered: what only loading shows.
"""

from pathlib import Path
from typing import Any

import msgspec

from dpo_cli.errors import UserError
from dpo_cli.models.weights import check_no_pointer

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")  # JSON objects, if there


def check_tokenizer(folder: Path, rows: int | None) -> None:
    """Check what tokenises and samples beside a model's weights, as far as its files tell.

    Args:
        folder: the model's.
        rows: of its embedding, if that is known.

    Raises:
        UserError: what is missing or damaged, by file.
    """
    there = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not there:
        raise UserError(
            "no tokenizer: none of " + ", ".join(TOKENIZERS[:3]),
            where=str(folder),
            hint="copy the tokenizer's files from the model that it was made from",
        )
    for file in [*there, *(folder / name for name in SETTINGS)]:
        if file.exists():
            check_no_pointer(file)
    _check_settings(folder)
    chat_template(folder)
    fast = folder / "tokenizer.json"
    if not fast.is_file():
        return
    vocabulary = read_object(fast).get("model", {})
    if not isinstance(vocabulary, dict) or not isinstance(vocabulary.get("vocab"), dict | list):
        raise UserError("has no vocabulary", where=str(fast))
    added = read_object(fast).get("added_tokens") or []
    words = vocabulary["vocab"]
    numbers = words.values() if isinstance(words, dict) else range(len(words))
    if not isinstance(added, list) or not all(isinstance(one, dict) for one in added):
        raise UserError("added_tokens are no tokens", where=str(fast))
    ids = [*numbers, *(one.get("id", 0) for one in added)]
    if not all(isinstance(one, int) for one in ids):
        raise UserError("has tokens without a number", where=str(fast))
    last = max(ids, default=-1)
    if rows is not None and last >= rows:
        raise UserError(
            f"the tokenizer has tokens up to {last}, and the embedding {rows} rows",
            where=str(fast),
            hint="resize the model's embedding to the tokenizer (resize_token_embeddings) and save both",
        )


def _check_settings(folder: Path) -> None:
    """Refuse settings that are no objects, or whose numbers are none."""
    found = {name: read_object(folder / name) for name in SETTINGS if (folder / name).is_file()}
    longest = found.get(SETTINGS[0], {}).get("model_max_length")
    if longest is not None and (not isinstance(longest, int | float) or isinstance(longest, bool)):
        raise UserError(f"model_max_length is {longest!r}, which is no number", where=str(folder / SETTINGS[0]))
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = found.get(SETTINGS[2], {}).get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(not isinstance(one, int) or isinstance(one, bool) for one in ids):
            raise UserError(f"{key} is {value!r}, which is no token", where=str(folder / SETTINGS[2]))


def chat_template(folder: Path) -> str | None:
    """The chat template that transformers saved in a folder, in either of its places."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        check_no_pointer(file)
        try:
            return file.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"not UTF-8: {error.reason} at byte {error.start}", where=str(file)) from None
    settings = folder / "tokenizer_config.json"
    template = read_object(settings).get("chat_template") if settings.is_file() else None
    return template if isinstance(template, str) else None


def read_object(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises:
        UserError: it can't be read, or is no JSON object.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, RecursionError) as error:
        raise UserError(f"not a JSON object: {error}", where=str(path)) from None
