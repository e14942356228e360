"""An adapter folded into its base, and proof that the two say the same.

Reads base and adapter; writes a model folder. The log-probabilities of a few texts are taken before and after; they
must agree within the precision of the weights' type.
"""

import shutil
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.errors import Exit, UserError
from dpo_cli.training.run_folder import check_replaceable
from dpo_cli.training.run_history import Merged

# Mean difference of a token's log-probability, in nats, that the rounding of weights of a type explains.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def merge(base: Path, adapter: Path, output: Path, texts: list[str]) -> Merged:
    """Fold the adapter into the base, check it, and save it with the tokenizer.

    Args:
        base: folder of the base model, in the type in which it is to be saved.
        adapter: folder of a LoRA adapter.
        output: new folder, or one that holds a model.
        texts: on which both are compared, at least one.

    Raises:
        UserError: they differ by more than rounding explains, or `output` holds something else.
    """
    check_replaceable(output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter).eval()
    before = [_log_probs(model, tokenizer, text) for text in texts]
    merged = model.merge_and_unload()
    differences = torch.cat(
        [(_log_probs(merged, tokenizer, text) - was).abs() for text, was in zip(texts, before, strict=True)]
    )
    tolerance = TOLERANCE[merged.dtype]
    mean = differences.mean().item()
    if not mean <= tolerance:
        raise UserError(
            f"the merged model's log-probabilities are off by {mean:.2g} nats a token, more than {tolerance:.2g}",
            where=str(adapter),
            code=Exit.FAILED,
        )
    staged = output.with_name(f".{output.name}.new")
    shutil.rmtree(staged, ignore_errors=True)
    merged.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(output, ignore_errors=True)
    staged.rename(output)
    return Merged(str(output), str(merged.dtype).removeprefix("torch."), mean, differences.max().item(), tolerance)


@torch.no_grad()
def _log_probs(model: torch.nn.Module, tokenizer: object, text: str) -> torch.Tensor:
    """Log-probability of each token after the first: (tokens - 1,), float32."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]  # type: ignore[operator]
    logits = model(input_ids=ids).logits[0, :-1].float()
    chosen: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return chosen
