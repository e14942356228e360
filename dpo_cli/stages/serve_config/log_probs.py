"""Log-probabilities of token sequences under the base and each adapter on disk, by transformers and PEFT."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel

from dpo_cli.config.settings import ModelSection
from dpo_cli.data.records import Message
from dpo_cli.model_loading import attach, load_network
from dpo_cli.training.trainer import load_encoder


def encode(base: Path, model: ModelSection, rows: Sequence[list[Message]]) -> list[list[int]]:
    """Token ids of conversations, as training encodes them; one that ends with the user's turn awaits an answer.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    encoder = load_encoder(base, model, max_length=1)  # it refuses no length here
    return [encoder.ids(messages, answer_next=messages[-1]["role"] != "assistant") for messages in rows]


@torch.no_grad()
def log_probs(
    base: Path, adapters: Mapping[str, Path], sequences: Sequence[list[int]]
) -> tuple[list[float], dict[str, list[float]]]:
    """Log-probability of each token after the first, of all sequences in a row: the base's, and each adapter's by name.

    Weights have the base's own type; the softmax is taken in float32.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_network(base, "auto").to(device).eval()
    bare, found = _all(model, sequences), {}
    peft: PeftModel | None = None
    for number, (name, path) in enumerate(adapters.items()):
        key = f"adapter{number}"  # PEFT makes modules of these names, and takes no dots
        peft = attach(model if peft is None else peft, path, key).eval()
        peft.set_adapter(key)
        found[name] = _all(peft, sequences)
    return bare, found


def _all(model: torch.nn.Module, sequences: Sequence[list[int]]) -> list[float]:
    values: list[float] = []
    for ids in sequences:
        tokens = torch.tensor([ids], device=next(model.parameters()).device)  # (1, tokens)
        logps = model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)  # (tokens - 1, vocabulary)
        values += logps.gather(-1, tokens[0, 1:, None])[:, 0].tolist()
    return values
