"""KL between two models whose distributions are known: what it is by hand, and that its stated error holds."""

import math
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_cli.config.settings import Config, EvaluateSection, GenerateSection
from dpo_cli.data.jsonl import read_rows
from dpo_cli.data.records import Prompt
from dpo_cli.engines.transformers import Model
from dpo_cli.progress import Silent
from dpo_cli.stages.evaluate import divergence
from dpo_cli.stages.evaluate.divergence import Measured, measure
from dpo_cli.stages.evaluate.sampling import RunBudget, Side
from dpo_cli.training.kl import SampledKl

END, A, B, PAD, PROMPT = range(5)
POLICY = [0.2, 0.3, 0.5, 0.0, 0.0]
REFERENCE = [0.1, 0.6, 0.3, 0.0, 0.0]
A_TOKEN = 0.2 * math.log(0.2 / 0.1) + 0.3 * math.log(0.3 / 0.6) + 0.5 * math.log(0.5 / 0.3)
COUNT, MOST = 128, 30
LENGTH = (1 - (1 - POLICY[END]) ** MOST) / POLICY[END]  # mean tokens, the end among them


def always(distribution: list[float]) -> LlamaForCausalLM:
    """A model whose next token has this distribution, whatever stands before it."""
    shape = LlamaConfig(
        vocab_size=5, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        eos_token_id=END, pad_token_id=PAD, tie_word_embeddings=False,
    )  # fmt: skip
    network = LlamaForCausalLM(shape).requires_grad_(False).eval()
    for weight in network.model.layers.parameters():
        weight.zero_()
    network.model.embed_tokens.weight.fill_(1)  # and its norm is one in each place
    logits = torch.tensor([max(share, 1e-12) for share in distribution]).log()
    network.lm_head.weight.copy_(logits[:, None].expand(-1, 4) / 4)
    return network


@pytest.fixture
def pair() -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    torch.set_num_threads(1)
    return always(POLICY), always(REFERENCE)


def found(pair: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[list[int]]]:
    """What is measured in this process, and the completions that were sampled for it."""
    policy, other = pair
    tokenizer = SimpleNamespace(apply_chat_template=lambda words, **_: [PROMPT] * len(words))

    @contextmanager
    def as_reference():
        yield other

    model = Model(policy, tokenizer, frozenset({END}), 256)
    monkeypatch.setattr("dpo_cli.stages.evaluate.adapters.load_both", lambda config: (model, as_reference))
    seen: list[list[int]] = []
    measured = SampledKl.measure

    def watched(self: SampledKl) -> tuple[list[list[int]], list[float]]:
        completions, nats = measured(self)
        seen.extend(completions)
        return completions, nats

    monkeypatch.setattr(SampledKl, "measure", watched)
    settings = Config(
        data=str(folder), evaluate=EvaluateSection(kl_prompts=COUNT),
        generate=GenerateSection(engine="transformers", max_tokens=MOST),
    )  # fmt: skip
    (folder / "evaluation").mkdir()
    sides = [Side(name=name, config=settings, made_with={"side": name}) for name in ("reference", "policy")]
    prompts: Any = {str(number): Prompt(["word"] * (1 + number % 7)) for number in range(COUNT)}
    return measure(sides[0], sides[1], prompts, settings, Silent(), RunBudget(None)), seen


def test_the_kl_of_known_distributions_by_hand(pair, tmp_path, monkeypatch):
    kl, completions = found(pair, tmp_path, monkeypatch)
    rows = [row for _, row in read_rows(tmp_path / "evaluation" / divergence.ROWS, Measured)]
    assert [row.tokens for row in rows] == list(map(len, completions))
    assert all(END not in own[:-1] and (own[-1] == END or len(own) == MOST) for own in completions)
    for row in rows:  # no token of the prompt is in it, and the end is
        assert row.nats == pytest.approx(A_TOKEN * row.tokens, rel=1e-4)
    assert kl.nats_per_token == pytest.approx(A_TOKEN, rel=1e-4)
    assert kl.nats_per_sequence == pytest.approx(A_TOKEN * LENGTH, abs=3 * kl.error)
    # The log-ratio of the same tokens has the same mean.
    ratios = [sum(math.log(POLICY[token] / REFERENCE[token]) for token in own) for own in completions]
    off = [ratio - row.nats for ratio, row in zip(ratios, rows, strict=True)]
    spread = math.sqrt(sum(value**2 for value in off)) / len(off)
    assert abs(sum(off) / len(off)) < 3 * spread


def test_no_two_batches_share_their_draws(pair, tmp_path, monkeypatch):
    """Else their errors are the same, and the error of the mean is larger than is said."""
    _, completions = found(pair, tmp_path, monkeypatch)
    lengths = list(map(len, completions))
    together = divergence.TOGETHER
    assert len({tuple(lengths[start : start + together]) for start in range(0, COUNT, together)}) == COUNT / together
