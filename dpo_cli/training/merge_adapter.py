"""An adapter folded into its base, and proof that the two say the same.

Reads base and adapter; writes a model folder. Computed in float32; then the weights are rounded to the type of the
base's own, unless that loses more than a fifth of what the adapter changes: what DPO changes can be smaller than a
step of bfloat16. Log-probabilities of a few texts are compared before and after. Not covered: quantised bases.
"""

from pathlib import Path
from typing import Any

import torch

from dpo_cli.adapter import read_adapter
from dpo_cli.config.settings import ModelSection
from dpo_cli.data import files
from dpo_cli.errors import Exit, UserError
from dpo_cli.model_loading import attach, explained, fold_vocabulary, load_network, merged
from dpo_cli.models.base_model import check_base
from dpo_cli.training.run_folder import check_replaceable
from dpo_cli.training.run_history import Merged

SHARE = 0.2  # of what the adapter changes, that rounding may lose
LEAST = 1e-4  # nats a token, which float32 itself explains
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def merge(base: Path, adapter: Path, output: Path, texts: list[str], section: ModelSection | None = None) -> Merged:
    """Fold the adapter into the base, check it, and save it with the tokenizer.

    Args:
        base: folder of the base model.
        adapter: folder of a LoRA adapter.
        output: new folder, or one that holds a model.
        texts: on which both are compared, at least one.
        section: whether the base is taken for the adapter's own, and the chat template to save.

    Raises:
        UserError: the base is quantised, the merged model differs by more than rounding explains, or `output` holds
            something else.
    """
    from transformers import AutoTokenizer

    section = section or ModelSection()
    check_replaceable(output)
    found = check_base(str(base))
    if found is not None and found.quantised is not None:
        raise UserError(
            f"the base's weights are quantised ({found.quantised}): an adapter would be lost in their rounding",
            where=str(base),
            hint="merge into the model as it was before it was quantised, or serve the adapter beside it",
        )
    read_adapter(adapter, str(base), section.same_base or section.adapter_into_base, section.adapter_into_base)
    with explained(base):
        tokenizer = AutoTokenizer.from_pretrained(base)
    if section.chat_template is not None:
        tokenizer.chat_template = Path(section.chat_template).read_text("utf-8")
    stored = TYPES.get(_stored_type(base), torch.float32)
    network = load_network(base, torch.float32)
    resized = fold_vocabulary(network, adapter)
    if resized and (adapter / "tokenizer.json").is_file():  # it has the tokens of the new rows
        with explained(adapter):
            theirs = AutoTokenizer.from_pretrained(adapter)
        theirs.chat_template = tokenizer.chat_template or theirs.chat_template
        tokenizer = theirs
    model = attach(network, adapter).eval()
    ids = [tokenizer(text, return_tensors="pt")["input_ids"][:, :512] for text in texts]
    wanted = _log_probs(model, ids)
    with model.disable_adapter():
        effect = (_log_probs(model, ids) - wanted).abs().mean().item()
    folded = merged(model)
    dtype = stored if _loses(folded, stored, ids, wanted) <= max(SHARE * effect, LEAST) else torch.float32
    _round(folded, dtype)
    off = (_log_probs(folded, ids) - wanted).abs()
    tolerance = max(SHARE * effect, LEAST)
    if not off.mean().item() <= tolerance:
        raise UserError(
            f"the merged model's log-probabilities are off by {off.mean().item():.2g} nats a token, where the adapter "
            f"changes {effect:.2g}",
            where=str(adapter),
            code=Exit.FAILED,
        )
    with files.replacing_folder(output) as staged:
        folded.to(dtype).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    name = str(dtype).removeprefix("torch.")
    note = None
    if dtype != stored:
        short = str(stored).removeprefix("torch.")
        note = (
            f"saved in float32: rounded to {short}, it would lose more than {SHARE:.0%} of what the adapter changes "
            f"({effect:.2g} nats a token); serve it with serve.dtype=float32, or the adapter beside its base"
        )
    return Merged(str(output), name, off.mean().item(), off.max().item(), tolerance, effect, note)


def _stored_type(base: Path) -> str:
    found = check_base(str(base))
    config = found.config if found is not None else {}
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    return str(config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or "float32")


def _loses(model: Any, dtype: torch.dtype, ids: list[torch.Tensor], wanted: torch.Tensor) -> float:
    """Nats a token that the rounding of all weights to a type changes; the weights are as before."""
    if dtype == torch.float32:
        return 0.0
    kept = {name: value.detach().clone() for name, value in model.named_parameters()}
    _round(model, dtype)
    lost = (_log_probs(model, ids) - wanted).abs().mean().item()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(kept[name])
    return float(lost)


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype) -> None:
    for value in model.parameters():
        value.copy_(value.to(dtype).float())


@torch.no_grad()
def _log_probs(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """Log-probability of each token after the first of all texts: (tokens,), float32."""
    found = []
    for ids in texts:
        logits = model(input_ids=ids).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found)
