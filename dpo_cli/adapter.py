"""A LoRA adapter on disk: what it is, and whether vLLM can load it.

Reads an adapter's adapter_config.json and weights and, where the base is a folder or in the Hub cache, the names and
shapes of the base's layers. Writes nothing and needs no torch. The rules are those of vLLM 0.32's own loader
(`vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`). Not covered: pickled adapters, and the layers of a base that
is not on this machine.
"""

import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from dpo_cli.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes

# Settings of PEFT that change what an adapter computes and that vLLM refuses, unless empty or false.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules saved beside the LoRA weights (modules_to_save)",
    "lora_bias": "biases on LoRA layers (lora_bias)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "replicated layers (layer_replication)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "use_qalora": "QALoRA (use_qalora)",
}
# Initialisations that leave the base's weights as they are; the others (PiSSA, OLoRA, ...) change them.
PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
BASE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # saved by PEFT, skipped by vLLM
FLOATS = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}  # bytes a number


class Tensor(Struct):
    """One entry of a safetensors header; offsets in bytes from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class Layer(Struct):
    """One adapted layer: its rank, and the shape of the base weight that it fits."""

    rank: int
    weight: list[int]


class Adapter(Struct, kw_only=True):
    """A LoRA adapter that vLLM can load.

    `rank` is the largest of all layers; `target_modules` are the names of the layers that the weights hold;
    `sha256` is that of the weights file; `notes` are for the user.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    target_modules: list[str]
    sha256: str
    notes: list[str]


def check_adapter(path: Path, base: str) -> Adapter:
    """Check that vLLM can load a LoRA adapter and that it belongs to the base.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors.
        base: folder or Hub id of the base model.

    Raises:
        UserError: the reason for which vLLM could not load it, or could only answer nonsense.
    """
    settings = _read_settings(path)
    _check_settings(settings, path)
    own_base = settings.get("base_model_name_or_path") or None
    if own_base and not _same_base(own_base, base):
        raise UserError(
            f"this adapter was trained on {own_base}, not on {base}",
            where=str(path),
            hint=f"BASE_MODEL={shlex.quote(own_base)}, if that is the base to serve",
        )

    weights = path / "adapter_model.safetensors"
    tensors = _read_header(weights)
    layers = _read_layers(tensors, weights)
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    for name, layer in layers.items():
        if layer.rank not in ranks and not _is_expert(name):
            raise UserError(f"{name} has rank {layer.rank}; adapter_config.json says {settings['r']}", where=str(path))
    _check_base_layers(layers, base, path)
    notes = [] if _check_values(tensors, weights) else ["changes nothing: every lora_B is zero"]
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Adapter(
        path=path,
        base=own_base,
        rank=max(ranks),
        alpha=settings.get("lora_alpha", 0),
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        sha256=digest,
        notes=notes,
    )


def absolute(path: str) -> Path:
    """Absolute, since vLLM takes a relative path that it can't find for a Hub id."""
    return Path(path).expanduser().absolute()


def find_base(base: str) -> Path | None:
    """The base's files where they are on this machine: a folder, or the Hub cache's snapshot. Downloads nothing."""
    folder = absolute(base)
    if folder.is_dir():
        return folder
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    cache = absolute(os.environ.get("HF_HUB_CACHE") or f"{home}/hub") / f"models--{base.replace('/', '--')}"
    main = cache / "refs" / "main"
    return cache / "snapshots" / main.read_text().strip() if main.is_file() else None


def chat_template(folder: Path) -> str | None:
    """The chat template that transformers saved in a folder, in either of its places."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text("utf-8")
    template: str | None = read_json_or_empty(folder / "tokenizer_config.json").get("chat_template")
    return template


def fingerprint(folder: Path) -> str:
    """Hash of a model folder: of each file its name, size and first and last MiB, as all of it takes long to read."""
    edge = 1 << 20
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".json", ".jinja", ".model", ".safetensors"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with file.open("rb") as handle:
            digest.update(handle.read(edge))
            handle.seek(max(size - edge, 0))
            digest.update(handle.read(edge))
    return digest.hexdigest()


def read_json_or_empty(path: Path) -> dict[str, Any]:
    """One JSON object; empty if there is no such file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(str(error), where=str(path)) from None


def _read_settings(path: Path) -> dict[str, Any]:
    file = path / "adapter_config.json"
    try:
        settings = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        inner = sorted(path.glob("*/adapter_config.json"))
        hint = f"there is one in {inner[0].parent}" if inner else None
        raise UserError("no adapter_config.json: not a LoRA adapter", where=str(path), hint=hint) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(str(error), where=str(file)) from None
    if (kind := settings.get("peft_type")) != "LORA":
        raise UserError(f"peft_type is {kind}: vLLM serves LORA alone", where=str(file))
    for rank in (settings.get("r"), *(settings.get("rank_pattern") or {}).values()):
        if not isinstance(rank, int) or not 0 < rank <= RANKS[-1]:
            raise UserError(f"rank {rank}: vLLM takes 1 to {RANKS[-1]}", where=str(file))
    return settings


def _check_settings(settings: dict[str, Any], path: Path) -> None:
    reasons = [reason for key, reason in UNSUPPORTED.items() if settings.get(key)]
    if settings.get("bias", "none") != "none":
        reasons.append(f"trained biases (bias = {settings['bias']})")
    init = settings.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        reasons.append(f"an initialisation that changes the base (init_lora_weights = {init})")
    if reasons:
        raise UserError(f"vLLM does not serve {', nor '.join(reasons)}", where=str(path / "adapter_config.json"))


def _same_base(one: str, other: str) -> bool:
    """Whether two names are one model: equal, the same folder, or copies of one repository under its name."""
    return one == other or absolute(one).resolve() == absolute(other).resolve() or _stem(one) == _stem(other)


def _stem(base: str) -> str:
    """`meta-llama/Llama-3.2-1B`, a Hub cache snapshot of it and a quantised mirror of it: `llama-3.2-1b`."""
    cached = re.search(r"models--.+?--([^/]+)", base)
    name = cached[1] if cached else base.rstrip("/").rpartition("/")[2]
    return re.sub(r"(-unsloth)?-bnb-\dbit$", "", name.lower())


def _read_header(path: Path) -> dict[str, Tensor]:
    """Names, types, shapes and places of the tensors of a safetensors file.

    Raises:
        UserError: no such file, another format, or a file that is cut short.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise UserError("not a safetensors file, or cut short", where=str(path))
            header = msgspec.json.decode(file.read(length), type=dict[str, Any])
    except FileNotFoundError:
        pickled = (path.parent / "adapter_model.bin").exists()
        hint = "adapter_model.bin is a pickle: save the adapter again with PEFT" if pickled else None
        raise UserError(f"no {path.name}", where=str(path.parent), hint=hint) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise UserError(str(error), where=str(path)) from None
    header.pop("__metadata__", None)
    try:
        tensors = msgspec.convert(header, dict[str, Tensor])
    except msgspec.ValidationError as error:
        raise UserError(f"not a safetensors header: {error}", where=str(path)) from None
    end = 8 + length + max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if end != size:
        raise UserError(f"{size} bytes instead of {end}: cut short, or still being written", where=str(path))
    return tensors


def _read_layers(tensors: dict[str, Tensor], path: Path) -> dict[str, Layer]:
    """The adapted layers by name, each from its pair of matrices: A (rank, in) and B (out, rank)."""
    pairs: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        if key.endswith(BASE_EMBEDDINGS):
            continue
        match = LORA_TENSOR.fullmatch(key)
        if match is None:
            raise UserError(f"{key} is no lora_A or lora_B, and vLLM knows no other", where=str(path))
        pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
        if match[3]:
            embeddings.add(match[1])
    if not pairs:
        raise UserError("no LoRA weights in it", where=str(path))
    layers = {}
    for name, pair in pairs.items():
        if len(pair) < 2:
            raise UserError(f"{name} has no lora_{'A' if 'B' in pair else 'B'}", where=str(path))
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{name}: lora_A {a} and lora_B {b} are no pair of matrices", where=str(path))
        weight = [b[0], a[1]]  # an embedding's weight is (vocabulary, hidden): in before out
        layers[name] = Layer(a[0], weight[::-1] if name in embeddings else weight)
    return layers


def _is_expert(layer: str) -> bool:
    """Whether a layer is in a mixture of experts, whose layout on disk is PEFT's and vLLM's own affair."""
    return ".experts" in layer


def _check_base_layers(layers: dict[str, Layer], base: str, path: Path) -> None:
    """Refuse layers that the base lacks or has in another shape; vLLM skips the former without a word."""
    folder = find_base(base)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    shapes = {key.removesuffix(".weight"): tensor for file in files for key, tensor in _read_header(file).items()}
    checked = [name for name in layers if not _is_expert(name) and not name.endswith("lm_head")]  # may be tied
    known = [name for name in checked if name in shapes]
    leaves = {name.rpartition(".")[2] for name in shapes}
    for name in checked if shapes else []:
        # Where no name fits, the base was saved under another prefix, and last names are all there is to compare.
        if name not in shapes if known else name.rpartition(".")[2] not in leaves:
            raise UserError(f"{base} has no layer {name}", where=str(path))
    for name in known:
        weight = shapes[name]
        is_plain = weight.dtype in FLOATS and len(weight.shape) == 2  # quantised weights have other shapes
        if is_plain and weight.shape != layers[name].weight:
            raise UserError(
                f"{name} is {weight.shape} in {base}, and the adapter is for {layers[name].weight}", where=str(path)
            )


def _check_values(tensors: dict[str, Tensor], path: Path) -> bool:
    """Refuse weights that are not finite; tell whether any lora_B is other than zero.

    The last byte of a little-endian float holds its sign and the top of its exponent, which is full for NaN and
    infinity (and, but for F16, for values above 1e38).
    """
    changes = False
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        for key, tensor in tensors.items():
            if tensor.dtype not in FLOATS:
                continue
            file.seek(start + tensor.data_offsets[0])
            data = file.read(tensor.data_offsets[1] - tensor.data_offsets[0])
            width, full = FLOATS[tensor.dtype], 0x7C if tensor.dtype == "F16" else 0x7F
            finite = bytes(byte for byte in range(256) if byte & full != full)
            if data[width - 1 :: width].translate(None, finite):
                raise UserError(f"{key} holds NaN or infinity", where=str(path), hint="train again from a checkpoint")
            is_b = "lora_B" in key or "lora_embedding_B" in key
            changes = changes or (is_b and bool(data.strip(b"\0")))
    return changes
