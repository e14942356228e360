"""Base, tokenizer and adapter from disk into memory: the one loader of training, sampling, evaluation and merging.

What transformers and PEFT pass over with a warning is refused here: weights that a file lacks, tensors of an adapter
that no layer takes, layers that an adapter names and the base has under another name. Reads model folders; writes
nothing. Not covered: models with code of their own.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from dpo_cli.adapter import COPIES, EMBEDDINGS, FOLD, adapted_layers, base_embeddings, lost_targets
from dpo_cli.config.settings import ModelSection
from dpo_cli.errors import UserError
from dpo_cli.models.adapter_settings import CONFIG
from dpo_cli.models.base_model import absolute, check_base, embedding_rows
from dpo_cli.progress import Progress, Silent


def load_tokenizer(base: str | Path, model: ModelSection) -> Any:
    """The base's tokenizer, with the chat template of the settings where they name one.

    Raises:
        UserError: it can't be read, or there is no chat template.
    """
    with explained(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    if model.chat_template is not None:
        file = absolute(model.chat_template)
        try:
            tokenizer.chat_template = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"no chat template: {error}", where=f"model.chat_template = {file}") from None
    _check_ends(tokenizer, str(base))
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template",
            where=str(base),
            hint="use an instruct model as model.base, or --set model.chat_template=FILE",
        )
    return tokenizer


def _check_ends(tokenizer: Any, base: str) -> None:
    """Refuse a tokenizer without a token that ends a text, or with one that the model does not have."""
    found = check_base(base)
    rows = embedding_rows(found.shapes) if found is not None else None
    where = str(found.folder / "tokenizer_config.json") if found is not None else base
    hint = "copy the tokenizer's files from the model that it was made from"
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise UserError("the tokenizer names no eos_token, nor a pad_token", where=where, hint=hint)
    for name in ("eos_token", "pad_token"):
        number = getattr(tokenizer, f"{name}_id")
        if number is not None and rows is not None and number >= rows:
            named = getattr(tokenizer, name)
            raise UserError(f"{name} {named!r} is none of the model's {rows} tokens", where=where, hint=hint)


def load_network(base: str | Path, dtype: Any, **more: Any) -> Any:
    """The base's network.

    Args:
        base: folder or Hub id.
        dtype: of the weights; `auto`: that of the file.
        **more: what `from_pretrained` takes besides.

    Raises:
        UserError: it can't be read, or its file lacks weights, which would be random.
    """
    check_base(str(base), tokenizer=False)
    with explained(base):
        network, loading = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, output_loading_info=True, **more)
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"the weights lack {len(missing)} tensors, {missing[0]} among them, which would be random",
            where=str(base),
            hint="copy or download the model again",
        )
    if loading["mismatched_keys"]:
        name, *shapes = next(iter(loading["mismatched_keys"]))
        raise UserError(
            f"{name} is {_shape(shapes[0])} in the weights and {_shape(shapes[1])} by config.json", where=str(base)
        )
    _mend_generation_config(network)
    if network.base_model is network and isinstance(getattr(network, "model", None), torch.nn.Module):
        network.base_model_prefix = "model"  # Llama 4's text model has a name for it that it does not use itself
    text = network.config.get_text_config()
    if hasattr(text, "output_router_logits") and not hasattr(text, "num_experts"):
        text.router_aux_loss_coef = 0.0  # TRL asks for the number of experts under this name
    return network


def _mend_generation_config(network: Any) -> None:
    """Make the base's generation settings such that transformers saves them.

    Some bases come with a temperature and no sampling, which loads and can't be saved: a run of all weights would end
    at its first checkpoint.
    """
    settings = getattr(network, "generation_config", None)
    for mend in (None, {"do_sample": True}, {"temperature": None, "top_p": None, "top_k": None}):
        if settings is None:
            return
        for name, value in (mend or {}).items():
            setattr(settings, name, value)
        try:
            settings.validate(strict=True)
        except ValueError:
            continue
        return
    kept = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    network.generation_config = GenerationConfig(**kept)


def _shape(shape: Any) -> str:
    return str(list(shape))


@contextmanager
def explained(base: str | Path) -> Iterator[None]:
    """What transformers says of a base that it can't load, as one line that names the base."""
    try:
        yield
    except UserError:
        raise
    except (torch.OutOfMemoryError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        text = str(error)
        said = " ".join(text.split())
        hint = "--set model.base=FOLDER, or a Hub id that this machine can reach"
        if "trust_remote_code" in text:
            said, hint = "the model needs code of its own, which is not run here", "use a model that transformers knows"
        elif isinstance(error, KeyError | AttributeError | TypeError | IndexError):
            said = f"config.json or tokenizer files are damaged ({type(error).__name__}: {said})"
        elif "mismatch" in text or "ignore_mismatched_sizes" in text:
            said = "the weights have other shapes than config.json says: " + said
        raise UserError(f"not a model that can be loaded: {said[:300]}", where=str(base), hint=hint) from None


def attach(
    network: Any, adapter: Path, name: str = "default", trainable: bool = False, progress: Progress | None = None
) -> PeftModel:
    """The network with an adapter on it, every tensor of which is in its place.

    Args:
        network: a base, or a PeftModel that gets one more adapter.
        adapter: its folder.
        name: of the adapter.
        trainable: whether it is to be trained.
        progress: is told where layers had other names.

    Raises:
        UserError: a tensor that no layer takes, or a layer whose tensor is not there.
    """
    bare = network.get_base_model() if isinstance(network, PeftModel) else network
    renaming = _renaming(adapter, bare, progress or Silent())
    _check_base_embeddings(bare, adapter)
    try:
        with warnings.catch_warnings(action="ignore"):
            if isinstance(network, PeftModel):
                network.load_adapter(str(adapter), name, is_trainable=trainable, key_mapping=renaming or None)
                model = network
            else:
                model = PeftModel.from_pretrained(
                    network, adapter, adapter_name=name, is_trainable=trainable, key_mapping=renaming or None
                )
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"the adapter does not load on this base: {' '.join(str(error).split())[:300]}",
            where=str(adapter),
            hint=f"its {CONFIG} names its base: --set model.base=...",
        ) from None
    _check_loaded(model, adapter, name, renaming)
    return model


def adapter_weights(model: Any, name: str) -> dict[str, torch.Tensor]:
    """An adapter's tensors in memory, under the names that they have in its file."""
    weights: dict[str, torch.Tensor] = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return weights


def file_weights(adapter: Path, model: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors on disk, under the names that they have on this model."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    renaming = _renaming(adapter, bare, Silent())
    return _file_weights(adapter, renaming)


def _file_weights(adapter: Path, renaming: dict[str, str]) -> dict[str, torch.Tensor]:
    """As `file_weights`, by known names; the base's embeddings are left out."""
    embeddings = base_embeddings(adapter)
    renamed = {re.sub(*one, key) for key in embeddings for one in renaming.items()} | set(embeddings)
    found: dict[str, torch.Tensor] = load_peft_weights(str(adapter), device="cpu", key_mapping=renaming or None)
    return {key: value for key, value in found.items() if key not in renamed and not key.endswith(COPIES)}


def _check_loaded(model: PeftModel, adapter: Path, name: str, renaming: dict[str, str]) -> None:
    there = _file_weights(adapter, renaming)
    loaded = adapter_weights(model, name)
    if lost := sorted(there.keys() - loaded.keys()):
        raise UserError(
            f"{len(lost)} of {len(there)} tensors of the adapter fit no layer of the base, {lost[0]} among them",
            where=str(adapter),
            hint="train the adapter on this very base, or name the base that it was trained on as model.base",
        )
    if missing := sorted(loaded.keys() - there.keys()):
        raise UserError(
            f"{len(missing)} tensors that {CONFIG} asks for are not in the adapter's file, {missing[0]} among them",
            where=str(adapter),
        )
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        if gives_more(layer.get_base_layer()):
            kind = type(layer.get_base_layer()).__name__
            raise UserError(
                f"an adapter on a {kind} can't be computed: it gives more than one tensor", where=str(adapter)
            )


def gives_more(layer: torch.nn.Module) -> bool:
    """Whether a linear layer has a forward of its own, as routers of experts do, on which LoRA can't be added."""
    return isinstance(layer, torch.nn.Linear) and type(layer).__module__.startswith("transformers.")


def _renaming(adapter: Path, bare: Any, progress: Progress) -> dict[str, str]:
    """How the adapter's names become the base's: pattern -> replacement; empty where they are the same.

    Raises:
        UserError: the names of adapter and base don't fit, both are named.
    """
    modules = {name for name, _ in bare.named_modules()} | {
        name.replace(".base_layer", "") for name, _ in bare.named_modules()
    }
    names = [name for name in adapted_layers(adapter) if ".experts" not in name]
    odd = [name for name in names if name not in modules]
    if not odd:
        return {}
    first = odd[0].removeprefix("_orig_mod.").replace("._orig_mod.", ".")
    parts = first.split(".")
    for cut in range(len(parts)):
        ending = ".".join(parts[cut:])
        candidates = [name for name in modules if name == ending or name.endswith(f".{ending}")]
        fitting = []
        for candidate in candidates:
            old = odd[0].removesuffix(ending)
            new = candidate.removesuffix(ending)
            moved = [new + name.removeprefix(old) if name.startswith(old) else name for name in names]
            if all(name in modules for name in moved):
                fitting.append((old, new))
        if len(fitting) == 1:
            old, new = fitting[0]
            progress.log(f"{adapter}: its layers {old or '(none)'}... are the base's {new or '(none)'}...")
            return {f"^{re.escape(old)}": new}
    like = next((name for name in sorted(modules) if name.endswith("." + ".".join(parts[-2:]))), None)
    called = f"; the base has {like}" if like else ""
    raise UserError(
        f"the base has no layer {odd[0]}, nor {len(odd) - 1} more of the adapter's {len(names)}{called}",
        where=str(adapter),
        hint=f"its {CONFIG} names its base: --set model.base=...",
    )


def merged(model: PeftModel) -> Any:
    """The base with the adapter in its weights; a head that shares the embedding's weight gets its own first.

    Adding the change of one of the two to the weight that both share would change the other as well.
    """
    bare = model.get_base_model()
    touches = [name for name, module in bare.named_modules() if isinstance(module, BaseTunerLayer)]
    if any(name.endswith(EMBEDDINGS) for name in touches) or _saves_embeddings(model):
        untie(bare)
    try:
        with warnings.catch_warnings(action="ignore"):
            return model.merge_and_unload()
    except RuntimeError as error:
        raise UserError(f"the adapter can't be merged: {' '.join(str(error).split())}") from None


def can_merge(model: PeftModel) -> bool:
    """Whether an adapter's change can be put into the base's weights: biases of LoRA need biases of the base."""
    return not any(getattr(config, "lora_bias", False) for config in model.peft_config.values())


def _saves_embeddings(model: PeftModel) -> bool:
    return any(
        module.endswith(EMBEDDINGS)
        for config in model.peft_config.values()
        for module in (getattr(config, "modules_to_save", None) or [])
    ) or any(getattr(config, "trainable_token_indices", None) for config in model.peft_config.values())


def untie(network: Any) -> bool:
    """Give the head a weight of its own where it shares the embedding's; whether it did."""
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    ours = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in (embedding, head)]
    if head is None or ours[0].weight is not ours[1].weight:
        return False
    ours[1].weight = torch.nn.Parameter(ours[0].weight.detach().clone(), requires_grad=False)
    for config in {id(one): one for one in (network.config, network.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    return True


def fold(base: Path, adapter: Path, dtype: Any, progress: Progress | None = None) -> Any:
    """The base with the adapter in its weights, its vocabulary resized to the adapter's where that has another.

    Raises:
        UserError: as `load_network` and `attach`.
    """
    network = load_network(base, dtype)
    fold_vocabulary(network, adapter)
    return merged(attach(network, adapter, progress=progress))


def fold_vocabulary(network: Any, adapter: Path) -> bool:
    """Give a network the embeddings that an adapter's file holds, as many rows as they have; whether it was resized."""
    rows = _embedding_rows(adapter)
    resizes = rows is not None and rows != network.get_input_embeddings().weight.shape[0]
    if resizes:
        network.resize_token_embeddings(rows, mean_resizing=False)
    for module, value in _saved_embeddings(network, adapter).values():
        if module is network.get_output_embeddings() and not _same_values(module.weight, value):
            untie(network)
        with torch.no_grad():
            module.weight.copy_(value)
    return resizes


def _saved_embeddings(network: Any, adapter: Path) -> dict[str, tuple[Any, torch.Tensor]]:
    """Name -> (the network's module, its weight in the adapter's file) of the base's embeddings that are there."""
    names = base_embeddings(adapter)
    if not names:
        return {}
    weights = load_peft_weights(str(adapter), device="cpu")
    found = {}
    for key in names:
        is_head = ".lm_head." in key or ".embed_out." in key
        module = network.get_output_embeddings() if is_head else network.get_input_embeddings()
        found[key] = (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, weights[key])
    # The embedding before the head, which may be tied to it.
    return dict(sorted(found.items(), key=lambda item: (item[1][0] is network.get_output_embeddings(), item[0])))


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two weights are equal once both are of the type of the other."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().cpu(), other.detach().cpu()
    return torch.equal(one.to(other.dtype), other) or torch.equal(other.to(one.dtype), one)


def _check_base_embeddings(network: Any, adapter: Path) -> None:
    """Refuse an adapter that takes the place of the base's embeddings, which PEFT would do without a word."""
    for key, (module, value) in _saved_embeddings(network, adapter).items():
        if not _same_values(module.weight, value):
            raise UserError(f"its file holds other embeddings than the base has ({key})", where=str(adapter), hint=FOLD)


def _embedding_rows(adapter: Path) -> int | None:
    """Rows of the embedding that an adapter's file holds, whole or as a change; None: it holds none."""
    for key, value in load_peft_weights(str(adapter), device="cpu").items():
        if re.search(r"(embed_tokens|embed_in|wte)(\.base_layer)?\.weight$", key):
            return int(value.shape[0])
        if re.search(r"(embed_tokens|embed_in|wte)\.lora_embedding_A$", key):
            return int(value.shape[1])
    return None


def routers(network: Any) -> list[str]:
    """Names of linear layers that LoRA can't be added to, since they give more than one tensor."""
    return sorted({name for name, module in network.named_modules() if gives_more(module)})


def check_targets(network: Any, targets: str | list[str]) -> list[str]:
    """Names of target modules that match no layer of the network.

    Raises:
        UserError: none of them matches one.
    """
    linear = [name for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)]
    return lost_targets(targets, [name for name, _ in network.named_modules()], linear)
