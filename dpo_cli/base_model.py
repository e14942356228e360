"""A base model on disk: where it is, what it is, and what would keep it from being trained or served.

Reads config.json, the tokenizer's files and the headers of the weights; the bytes of the weights once, for NaN and for
the fingerprint, which are remembered in the user's cache by path, size, time and inode. Needs no torch. Not covered:
what only loading shows (`model_loading.py`), and weights in the format of before torch 1.6.
"""

import hashlib
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.errors import UserError
from dpo_cli.pickled import check_finite_pickled, is_legacy, read_pickled
from dpo_cli.weights import Tensor, check_finite, check_no_pointer, read_header

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json", "vocab.txt")
HASHED = (".json", ".jinja", ".model", ".safetensors", ".bin", ".pt")
REMEMBERED = 500  # files
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")  # their weights are (in, out): fan_in_fan_out


class Base(Struct, kw_only=True):
    """A base model that is on this machine.

    `shapes` are the weights by name; empty where the files are of before torch 1.6. `quantised` is the method with
    which its weights are stored, if they are.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, Tensor]
    quantised: str | None

    @property
    def model_type(self) -> str:
        """As config.json names it."""
        return str(self.config.get("model_type"))

    @property
    def positions(self) -> int | None:
        """The longest row that the model has positions for, in tokens; None: no limit is known."""
        text = self.config.get("text_config") or self.config
        found = text.get("max_position_embeddings") or text.get("n_positions")
        return found if isinstance(found, int) else None


def absolute(path: str) -> Path:
    """Absolute, since vLLM takes a relative path that it can't find for a Hub id."""
    return Path(path).expanduser().absolute()


def find_base(base: str) -> Path | None:
    """The base's files where they are on this machine: a folder, or the Hub cache's snapshot. Downloads nothing."""
    folder = absolute(base)
    if folder.is_dir():
        return folder
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cached = absolute(os.environ.get("HF_HUB_CACHE") or f"{home}/hub") / f"models--{base.replace('/', '--')}"
    main = cached / "refs" / "main"
    return cached / "snapshots" / main.read_text().strip() if main.is_file() else None


def check_base(base: str, tokenizer: bool = True) -> Base | None:
    """Check a base model as far as its files tell; None: it is not on this machine.

    Args:
        base: folder or Hub id.
        tokenizer: whether it must have one.

    Raises:
        UserError: what is missing or damaged, by file.
    """
    folder = find_base(base)
    if folder is None:
        return None
    found = _check(folder, *_stamps(folder))
    if tokenizer:
        _check_tokenizer(folder, found.shapes)
    return found


@cache
def _check(folder: Path, *_: Any) -> Base:
    config = _read_config(folder)
    shapes = _read_shapes(folder)
    for file in _weights_files(folder):
        _check_finite(file)
    quantised = config.get("quantization_config") or config.get("compression_config") or {}
    method = quantised.get("quant_method") if isinstance(quantised, dict) else None
    if method == "bitsandbytes" and quantised.get("load_in_8bit"):
        method = "bitsandbytes, 8 bits"
    return Base(folder=folder, config=config, shapes=shapes, quantised=method)


def _stamps(folder: Path) -> list[tuple[str | int, ...]]:
    """What changes when a file of a model folder is replaced."""
    return [_stamp(file) for file in sorted(folder.iterdir()) if file.suffix in HASHED]


def _stamp(file: Path) -> tuple[str | int, ...]:
    about = file.stat()
    return str(file), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        nested = sorted(folder.glob("*/config.json"))
        if (folder / "adapter_config.json").is_file():
            hint = "this is an adapter: its adapter_config.json names its base"
        else:
            hint = f"there is one in {nested[0].parent}" if nested else "--set model.base=FOLDER, or a Hub id"
        raise UserError("no config.json: not a model", where=str(folder), hint=hint)
    check_no_pointer(file)
    config = read_object(file)
    if not isinstance(config.get("model_type"), str):
        raise UserError("names no model_type: not a transformers model", where=str(file))
    if isinstance(config.get("auto_map"), dict):
        code = next(iter(config["auto_map"].values()))
        if any((folder / f"{str(one).partition('.')[0]}.py").is_file() for one in config["auto_map"].values()):
            raise UserError(
                f"the model needs code of its own ({code}), which is not run here",
                where=str(file),
                hint="use a version of the model that transformers itself knows, without auto_map in config.json",
            )
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "n_embd", "n_layer", "n_head"):
        if key in text and (not isinstance(text[key], int) or isinstance(text[key], bool) or text[key] <= 0):
            raise UserError(f"{key} is {text[key]!r}, which is no size", where=str(file))
    return config


def _read_shapes(folder: Path) -> dict[str, Tensor]:
    """Every weight by name.

    Raises:
        UserError: no weights, a shard that is missing, a pointer, or a file that is cut short.
    """
    files = _weights_files(folder)
    index = next((folder / name for name in (WEIGHTS[1], WEIGHTS[3]) if (folder / name).is_file()), None)
    if index is not None and not (index.name == WEIGHTS[3] and any(folder.glob("*.safetensors"))):
        check_no_pointer(index)
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict):
            raise UserError("has no weight_map", where=str(index))
        files = [folder / str(name) for name in sorted(set(named.values()))]
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"weights are missing: {', '.join(missing[:3])}" + (" and more" if missing[3:] else ""),
                where=str(folder),
                hint="copy or download the model again",
            )
    if not files:
        raise UserError("no weights: neither *.safetensors nor pytorch_model.bin", where=str(folder))
    shapes: dict[str, Tensor] = {}
    for file in files:
        shapes |= _tensors(file)
    return shapes


def _weights_files(folder: Path) -> list[Path]:
    """The files that hold a base's weights, safetensors before others, as transformers chooses."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _tensors(file: Path) -> dict[str, Tensor]:
    """What a file holds, by name; of one in the format of before torch 1.6 nothing is known."""
    if file.suffix != ".bin":
        return read_header(file)
    check_no_pointer(file)
    return {} if is_legacy(file) else read_pickled(file)


def _check_tokenizer(folder: Path, shapes: dict[str, Tensor]) -> None:
    there = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not there:
        raise UserError(
            "no tokenizer: none of " + ", ".join(TOKENIZERS[:3]),
            where=str(folder),
            hint="copy the tokenizer's files from the model that it was made from",
        )
    for file in there:
        check_no_pointer(file)
    fast = folder / "tokenizer.json"
    if not fast.is_file():
        return
    vocabulary = read_object(fast).get("model", {})
    if not isinstance(vocabulary, dict) or not isinstance(vocabulary.get("vocab"), dict | list):
        raise UserError("has no vocabulary", where=str(fast))
    added = read_object(fast).get("added_tokens") or []
    ids = vocabulary["vocab"].values() if isinstance(vocabulary["vocab"], dict) else range(len(vocabulary["vocab"]))
    last = max([*ids, *(one.get("id", 0) for one in added if isinstance(one, dict))], default=-1)
    rows = next((one.shape[0] for name, one in shapes.items() if re.search(EMBEDDING, name) and one.shape), None)
    if rows is not None and last >= rows:
        raise UserError(
            f"the tokenizer has tokens up to {last}, and the embedding {rows} rows",
            where=str(fast),
            hint="resize the model's embedding to the tokenizer (resize_token_embeddings) and save both",
        )


EMBEDDING = r"(embed_tokens|embed_in|wte|word_embeddings)\.weight$"


def chat_template(folder: Path) -> str | None:
    """The chat template that transformers saved in a folder, in either of its places."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
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


def fingerprint(folder: Path) -> str:
    """Hash of a model folder: of each file its name and whole content."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in HASHED and file.is_file():
            digest.update(f"{file.name}:{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """Hash of the weights alone, by which two copies of one base are known whatever their folders are called."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Hash of a file, read once as long as its path, size, time and inode stay the same."""
    return str(_remember(file, "sha256", lambda: _sha256(file)))


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check_finite(file: Path) -> None:
    """Refuse weights with NaN or infinity; what was found finite is not read again."""

    def look() -> bool:
        if file.suffix != ".bin":
            check_finite(file, read_header(file))
        elif not is_legacy(file):
            check_finite_pickled(file)
        return True

    _remember(file, "finite", look)


def _remember(file: Path, what: str, compute: Any) -> Any:
    """What was computed of a file as it is now; kept in the user's cache where that can be written."""
    key = f"{what}:{':'.join(map(str, _stamp(file)))}"
    store = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nothing-dpo" / "files.json"
    known = _read_store(store)
    if key not in known:
        value = compute()
        known = dict(list(_read_store(store).items())[-REMEMBERED:]) | {key: value}
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            temporary = store.with_name(f"{store.name}.{os.getpid()}")
            temporary.write_bytes(msgspec.json.encode(known))
            temporary.replace(store)
        except OSError:  # a home that can't be written: it is computed each time
            pass
    return known[key]


def _read_store(store: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(store.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return {}
