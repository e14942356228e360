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
from dpo_cli.models.pickled import check_finite_pickled, is_legacy, read_pickled
from dpo_cli.models.tokenizer_files import check_tokenizer, read_object
from dpo_cli.models.weights import FLOATS, Tensor, check_finite, check_no_pointer, read_header

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings", "n_embd", "n_layer", "n_head", "n_positions",
)  # fmt: skip
NULLABLE = ("num_key_value_heads", "max_position_embeddings", "intermediate_size")
EMBEDDING = r"(embed_tokens|embed_in|wte|word_embeddings)\.weight$"
LAYER = re.compile(r"(?:(?:model\.)?language_model\.)?(?:(?:model|transformer|gpt_neox)\.)*(?:layers|h)\.(\d+)\.")
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
        text = _text_config(self.config)
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
    if folder.is_file():
        raise UserError("a file, not the folder of a model", where=base, hint="--set model.base=FOLDER, or a Hub id")
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
    try:
        found = _check(folder, *_stamps(folder))
        if tokenizer:
            check_tokenizer(folder, embedding_rows(found.shapes))
    except OSError as error:  # no right to read it, or a link that leads nowhere
        raise UserError(f"can't be read: {error.strerror or error}", where=str(error.filename or folder)) from None
    return found


def embedding_rows(shapes: dict[str, Tensor]) -> int | None:
    """Rows of the input embedding; None: there is none by a known name."""
    return next((one.shape[0] for name, one in shapes.items() if re.search(EMBEDDING, name) and one.shape), None)


@cache
def _check(folder: Path, *_: Any) -> Base:
    config = read_config(folder)
    shapes = _read_shapes(folder)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            "holds an adapter beside the model, which transformers would put on it without a word",
            where=str(folder),
            hint="move adapter_config.json and the adapter's weights to a folder of their own",
        )
    for file in _weights_files(folder):
        _check_finite(file)
    quantised = config.get("quantization_config") or config.get("compression_config") or {}
    method = quantised.get("quant_method")
    if method is None:
        _check_sizes(folder, config, shapes)
    if method == "bitsandbytes" and quantised.get("load_in_8bit"):
        method = "bitsandbytes, 8 bits"
    return Base(folder=folder, config=config, shapes=shapes, quantised=method)


def _stamps(folder: Path) -> list[tuple[str | int, ...]]:
    """What changes when a file of a model folder is replaced."""
    return [_stamp(file) for file in sorted(folder.iterdir()) if file.suffix in HASHED]


def _stamp(file: Path) -> tuple[str | int, ...]:
    about = file.stat()  # a link that leads nowhere raises
    return str(file), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder.

    Raises:
        UserError: there is none, it is damaged, or asks for code of its own.
    """
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
    for key in ("text_config", "quantization_config", "compression_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise UserError(f"{key} is {config[key]!r}, which is no object", where=str(file))
    text = _text_config(config)
    for key in SIZES:
        value = text.get(key)
        if value is None and (key not in text or key in NULLABLE):
            continue
        values = value if isinstance(value, list) and value else [value]  # some have one for each layer
        if any(not isinstance(one, int) or isinstance(one, bool) or one <= 0 for one in values):
            raise UserError(f"{key} is {value!r}, which is no size", where=str(file))
    return config


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that is of the language model."""
    found: dict[str, Any] = config.get("text_config") or config
    return found


def _check_sizes(folder: Path, config: dict[str, Any], shapes: dict[str, Tensor]) -> None:
    """Refuse weights that are not those of config.json, as far as numbers of layers and tokens tell."""
    text, file = _text_config(config), str(folder / "config.json")
    for name, tensor in shapes.items():
        if name.endswith(".weight") and len(tensor.shape) == 2 and tensor.dtype not in FLOATS:
            raise UserError(
                f"{name} is of type {tensor.dtype}, and config.json has no quantization_config", where=str(folder)
            )
    named = "num_hidden_layers" if "num_hidden_layers" in text else "n_layer"
    layers = text.get(named)
    there = {int(found[1]) + 1 for name in shapes if (found := LAYER.match(name))}
    if isinstance(layers, int) and there and max(there) != layers and not text.get("num_nextn_predict_layers"):
        raise UserError(f"{named} is {layers}, and the weights have {max(there)} layers", where=file)
    rows, tokens = embedding_rows(shapes), text.get("vocab_size")
    if rows is not None and isinstance(tokens, int) and rows != tokens:
        raise UserError(f"vocab_size is {tokens}, and the embedding in the weights has {rows} rows", where=file)


def _read_shapes(folder: Path) -> dict[str, Tensor]:
    """Every weight by name.

    Raises:
        UserError: no weights, a shard that is missing, a pointer, or a file that is cut short.
    """
    files = _weights_files(folder)
    index = next((folder / name for name in (WEIGHTS[1], WEIGHTS[3]) if (folder / name).is_file()), None)
    if index is not None and not (index.name == WEIGHTS[3] and files[:1] and files[0].suffix != ".bin"):
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
        others = sorted(
            file.name for kind in ("*.safetensors", "*.gguf", "*.pth", "*.bin") for file in folder.glob(kind)
        )
        raise UserError(
            "no weights: neither model.safetensors nor pytorch_model.bin" + (f", but {others[0]}" if others else ""),
            where=str(folder),
            hint="save the model with transformers' save_pretrained, or download that form of it" if others else None,
        )
    shapes: dict[str, Tensor] = {}
    for file in files:
        shapes |= _tensors(file)
    return shapes


def _weights_files(folder: Path) -> list[Path]:
    """The files that hold a base's weights, as transformers chooses among those that there are."""
    for name, shards in ((WEIGHTS[0], "model-*.safetensors"), (WEIGHTS[2], "pytorch_model-*.bin")):
        if (folder / name).exists() or (folder / name).is_symlink():
            return [folder / name]
        if found := sorted(folder.glob(shards)):
            return found
    return []


def _tensors(file: Path) -> dict[str, Tensor]:
    """What a file holds, by name; of one in the format of before torch 1.6 nothing is known."""
    if file.suffix != ".bin":
        return read_header(file)
    check_no_pointer(file)
    return {} if is_legacy(file) else read_pickled(file)


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
