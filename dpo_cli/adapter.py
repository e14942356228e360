"""A LoRA adapter on disk: what it is, whether it fits its base, and whether vLLM can load it.

Reads an adapter's adapter_config.json and weights and, where the base is a folder or in the Hub cache, the names and
shapes of the base's layers. Writes nothing and needs no torch. What vLLM serves is by the rules of vLLM 0.32's own
loader (`vllm/lora/peft_helper.py`, `vllm/lora/lora_model.py`). Not covered: the layers of a base that is not on this
machine; how a base names its layers once it is loaded is `model_loading.py`'s matter.
"""

import re
import shlex
from pathlib import Path
from typing import Any

from msgspec import Struct

from dpo_cli.errors import UserError
from dpo_cli.models.adapter_settings import CONFIG, read_settings, unserved_settings
from dpo_cli.models.base_model import CONV1D, Base, absolute, check_base, file_sha256, find_base, weights_fingerprint
from dpo_cli.models.pickled import check_finite_pickled, read_pickled
from dpo_cli.models.weights import FLOATS, Tensor, check_finite, read_header

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"

LORA_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:(A|B)\.weight|embedding_(A|B))")
# PEFT saves the base's embeddings, whole, where the vocabulary was resized: under LoRA (vLLM skips those) or without.
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "lm_head", "embed_out")
BASE_EMBEDDING = re.compile(rf"(?:base_model\.model\.)?(?:.+\.)?(?:{'|'.join(EMBEDDINGS)})(\.base_layer)?\.weight")
COPIES = (".modules_to_save.weight", ".original_module.weight")  # beside them, of what the file has under its own name
BACKBONES = ("model", "transformer", "gpt_neox", "backbone")  # what transformers calls a model without its head
FOLD = "--set model.adapter_into_base=true folds it into the base, and trains a fresh LoRA on that"
MERGE = "nothing-dpo push adapter FOLDER --merge makes one model of base and adapter, which vLLM serves"


class Layer(Struct):
    """One adapted layer: its rank, and the shape of the base weight that it fits."""

    rank: int
    weight: list[int]


class Adapter(Struct, kw_only=True):
    """A LoRA adapter that fits its base.

    `rank` is the largest of all layers; `target_modules` are the last names of the layers that the weights hold;
    `sha256` is that of the weights file; `unserved` is what vLLM does not serve of it; `notes` are for the user.
    """

    path: Path
    base: str | None
    rank: int
    alpha: float
    target_modules: list[str]
    sha256: str
    unserved: list[str]
    notes: list[str]


def read_adapter(path: Path, base: str, same_base: bool = False, resizes: bool = False) -> Adapter:
    """Check that an adapter is whole and belongs to the base.

    Args:
        path: folder with adapter_config.json and adapter_model.safetensors, or adapter_model.bin.
        base: folder or Hub id of the base model.
        same_base: the base is the adapter's own, whatever its adapter_config.json calls it.
        resizes: the base gets as many embeddings as the adapter has, so that their number may differ.

    Raises:
        UserError: what is missing, damaged or of another base.
    """
    settings = read_settings(path)
    found = check_base(base)
    own_base = settings.get("base_model_name_or_path") or None
    notes = [] if same_base or own_base is None else _check_own_base(str(own_base), base, found, path)
    weights = weights_path(path)
    tensors = _read_tensors(weights)
    layers, others = _read_layers(tensors, settings, weights)
    ranks = {settings["r"], *(settings.get("rank_pattern") or {}).values()}
    for name, layer in layers.items():
        if layer.rank not in ranks and not _is_expert(name):
            raise UserError(f"{name} has rank {layer.rank}; {CONFIG} says {settings['r']}", where=str(path))
    if found is not None:
        _check_shapes(layers, tensors, others, settings, found, base, path, resizes)
    targets = "all-linear" if settings.get("target_parameters") else settings["target_modules"]
    if odd := next((name for name in layers if not (_is_expert(name) or is_target(name, targets))), None):
        raise UserError(f"{odd} is none of the target_modules in {CONFIG}: PEFT would skip it", where=str(path))
    zero = ("lora_B", "lora_embedding_B")
    pickled = weights.name == PICKLED
    changes = check_finite_pickled(weights, zero) if pickled else check_finite(weights, tensors, zero)
    if not changes and not others:
        notes.append("changes nothing: every lora_B is zero")
    return Adapter(
        path=path,
        base=own_base,
        rank=max(ranks),
        alpha=settings.get("lora_alpha", 0),
        target_modules=sorted({name.rpartition(".")[2] for name in layers}),
        sha256=file_sha256(weights),
        unserved=unserved_settings(settings, max(ranks)) + _whole_embeddings(tensors, settings),
        notes=notes,
    )


def check_adapter(path: Path, base: str, same_base: bool = False) -> Adapter:
    """Check that vLLM can load a LoRA adapter and that it belongs to the base; arguments as of `read_adapter`.

    Raises:
        UserError: the reason for which vLLM could not load it, or could only answer nonsense.
    """
    settings = read_settings(path)
    if reasons := unserved_settings(settings, settings["r"]):
        raise UserError(f"vLLM does not serve {', nor '.join(reasons)}", where=str(path / CONFIG), hint=MERGE)
    adapter = read_adapter(path, base, same_base)
    if adapter.unserved:
        raise UserError(f"vLLM does not serve {', nor '.join(adapter.unserved)}", where=str(path / CONFIG), hint=MERGE)
    found = check_base(base)
    if found is not None and found.shapes:
        _check_served_names(path, found, base)
    return adapter


def is_model(path: Path) -> bool:
    """Whether a folder holds a whole model rather than an adapter."""
    return (path / "config.json").is_file() and not (path / CONFIG).is_file()


def weights_path(path: Path) -> Path:
    """The file that holds an adapter's weights.

    Raises:
        UserError: there is none.
    """
    for name in (WEIGHTS, PICKLED):
        if (path / name).is_file():
            return path / name
    raise UserError(f"no {WEIGHTS}", where=str(path))


def adapter_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file by name, without those of the base's embeddings."""
    tensors, settings = _read_tensors(weights_path(path)), read_settings(path)
    return {key: tensor for key, tensor in tensors.items() if not _is_base_embedding(key, settings)}


def base_embeddings(path: Path) -> list[str]:
    """The tensors of an adapter's file that are the base's embeddings, or take their place."""
    settings = read_settings(path)
    return [key for key in _read_tensors(weights_path(path)) if _is_base_embedding(key, settings)]


def _read_tensors(weights: Path) -> dict[str, Tensor]:
    tensors = read_pickled(weights) if weights.name == PICKLED else read_header(weights)
    return {key: tensor for key, tensor in tensors.items() if not key.endswith(COPIES)}


def _is_base_embedding(key: str, settings: dict[str, Any]) -> bool:
    return BASE_EMBEDDING.fullmatch(key) is not None and not _is_known(key, settings)


def adapted_layers(path: Path) -> list[str]:
    """Names of the layers that an adapter's file adapts, as they stand there."""
    found = (LORA_TENSOR.fullmatch(key) for key in adapter_tensors(path))
    return list(dict.fromkeys(match[1] for match in found if match))


def is_target(name: str, targets: str | list[str]) -> bool:
    """Whether PEFT takes a linear layer of this name for one of the target modules.

    Raises:
        UserError: a pattern that is none.
    """
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, name) is not None
        except re.error as error:
            raise UserError(f"{targets!r} is no pattern: {error}", where="train.target_modules") from None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def lost_targets(targets: str | list[str], names: list[str], linear: list[str]) -> list[str]:
    """Target modules that match no layer of a base.

    Args:
        targets: as PEFT takes them.
        names: of all layers.
        linear: of those that LoRA can be added to, for the error.

    Raises:
        UserError: nothing matches one.
    """
    if not any(is_target(name, targets) for name in names):
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(
            f"no layer of the base is called {targets if isinstance(targets, str) else ', '.join(targets)}",
            where="train.target_modules",
            hint=f"it has {', '.join(there)}; all-linear takes them all",
        )
    if isinstance(targets, str):
        return []
    return [target for target in targets if not any(is_target(name, [target]) for name in names)]


def _whole_embeddings(tensors: dict[str, Tensor], settings: dict[str, Any]) -> list[str]:
    """What vLLM does not serve of an adapter's file besides its settings."""
    found = [key for key in tensors if _is_base_embedding(key, settings) and ".base_layer" not in key]
    return ["whole embeddings saved beside the LoRA weights"] if found else []


def _check_own_base(own: str, base: str, found: Base | None, path: Path) -> list[str]:
    """Refuse an adapter of another base; what is called otherwise is compared by content. Notes for the user."""
    if own == base or absolute(own).resolve() == absolute(base).resolve() or _stem(own) == _stem(base):
        return []
    there = find_base(own)
    if there is not None and found is not None and weights_fingerprint(there) == weights_fingerprint(found.folder):
        return [f"its base {own} has the weights of {base}"]
    raise UserError(
        f"this adapter was trained on {own}, not on {base}",
        where=str(path),
        hint=f"BASE_MODEL={shlex.quote(own)}, or --set model.same_base=true if {base} is that model under another name",
    )


def _stem(base: str) -> str:
    """`meta-llama/Llama-3.2-1B`, a Hub cache snapshot of it and a quantised mirror of it: `llama-3.2-1b`."""
    cached = re.search(r"models--.+?--([^/]+)", base)
    name = cached[1] if cached else base.rstrip("/").rpartition("/")[2]
    return re.sub(r"(-unsloth)?-bnb-\dbit$", "", name.lower())


def _read_layers(
    tensors: dict[str, Tensor], settings: dict[str, Any], path: Path
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """The adapted layers by name, each from its pair of matrices, A (rank, in) and B (out, rank); and what else."""
    pairs: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        if _is_base_embedding(key, settings):
            continue
        match = LORA_TENSOR.fullmatch(key)
        if match is None:
            if not _is_known(key, settings):
                raise UserError(f"{key} is no lora_A or lora_B, and {CONFIG} names nothing else", where=str(path))
            others[key] = tensor
            continue
        if not tensor.dtype.startswith(("F", "BF")):
            raise UserError(f"{key} is of type {tensor.dtype}, which no LoRA weight is", where=str(path))
        pairs.setdefault(match[1], {})[match[2] or match[3]] = tensor
        if match[3]:
            embeddings.add(match[1])
    if not pairs and not others:
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
    return layers, others


def _is_known(key: str, settings: dict[str, Any]) -> bool:
    """Whether adapter_config.json says that a tensor which is no lora_A or lora_B belongs to the adapter."""
    modules = settings.get("modules_to_save") or []
    tied = EMBEDDINGS if settings.get("ensure_weight_tying") else ()
    return (
        (bool(settings.get("use_dora")) and ".lora_magnitude_vector" in key)
        or (bool(settings.get("lora_bias")) and key.endswith(".lora_B.bias"))
        or (settings.get("bias", "none") != "none" and key.endswith(".bias"))
        or (bool(settings.get("trainable_token_indices")) and "trainable_tokens" in key)
        or any(f".{module}." in key for module in (*modules, *tied))
    )


def _is_expert(layer: str) -> bool:
    """Whether a layer is in a mixture of experts, whose layout on disk is PEFT's and vLLM's own affair."""
    return ".experts" in layer


def _check_shapes(
    layers: dict[str, Layer],
    tensors: dict[str, Tensor],
    others: dict[str, Tensor],
    settings: dict[str, Any],
    base: Base,
    named: str,
    path: Path,
    resizes: bool,
) -> None:
    """Refuse layers that the base lacks or has in another shape, as far as names on disk are those of the adapter."""
    shapes = {key.removesuffix(".weight"): tensor for key, tensor in base.shapes.items()}
    checked = [name for name in layers if not _is_expert(name) and not name.endswith("lm_head")]  # may be tied
    known = [name for name in checked if name in shapes]
    leaves = {name.rpartition(".")[2] for name in shapes}
    for name in checked if shapes else []:
        # Where no name fits, the base was saved under another prefix, and last names are all there is to compare.
        if name not in shapes if known else name.rpartition(".")[2] not in leaves:
            raise UserError(f"{named} has no layer {name}", where=str(path))
    swapped = bool(settings.get("fan_in_fan_out")) or base.model_type in CONV1D
    for name in checked:
        weight = shapes.get(name) or _only_suffix(name, shapes)
        if weight is None or weight.dtype not in FLOATS or len(weight.shape) != 2:  # quantised ones have other shapes
            continue
        shape = layers[name].weight
        is_embedding = name.endswith(EMBEDDINGS)
        if shape == weight.shape or (swapped and not is_embedding and shape[::-1] == weight.shape):
            continue
        if is_embedding and shape[1] == weight.shape[1]:
            if resizes:
                continue
            raise _resized(name, shape[0], weight.shape[0], named, path)
        raise UserError(f"{name} is {weight.shape} in {named}, and the adapter is for {shape}", where=str(path))
    whole = {key: one for key, one in tensors.items() if key in others or _is_base_embedding(key, settings)}
    for key, tensor in whole.items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".base_layer")
        weight = shapes.get(name) or _only_suffix(name, shapes)
        if weight is None or not key.endswith(".weight") or weight.shape == tensor.shape:
            continue
        if name.endswith(EMBEDDINGS) and len(tensor.shape) == 2:
            if resizes:
                continue
            raise _resized(name, tensor.shape[0], weight.shape[0], named, path)
        raise UserError(f"{name} is {weight.shape} in {named}, and {tensor.shape} here", where=str(path))


def _only_suffix(name: str, shapes: dict[str, Tensor]) -> Tensor | None:
    """The one weight whose name ends as this one does, its first part aside."""
    ending = "." + name.partition(".")[2]
    found = [tensor for other, tensor in shapes.items() if f".{other}".endswith(ending)]
    return found[0] if len(found) == 1 else None


def _resized(name: str, here: int, there: int, named: str, path: Path) -> UserError:
    return UserError(
        f"the vocabulary was resized: {name} has {here} rows in the adapter and {there} in {named}",
        where=str(path),
        hint=FOLD,
    )


def _check_served_names(path: Path, base: Base, named: str) -> None:
    """Refuse names under which vLLM would look for layers in vain: it then answers as the base, without a word."""
    there = {key.removesuffix(".weight") for key in base.shapes}
    top = {name.partition(".")[0] for name in there}
    names = [name for name in adapted_layers(path) if not _is_expert(name) and not name.endswith("lm_head")]
    for name in names:
        # A base saved without its head has names without the first part.
        first, _, bare = name.partition(".")
        if name not in there and not (first in BACKBONES and first not in top and bare in there):
            like = next((one for one in there if one.endswith("." + ".".join(name.split(".")[-4:]))), None)
            called = f" (there it is {like})" if like else ""
            raise UserError(
                f"{named} has no layer {name}{called}: vLLM would answer as the base does",
                where=str(path),
                hint="nothing-dpo push adapter FOLDER --merge, or train the adapter on this very base",
            )
