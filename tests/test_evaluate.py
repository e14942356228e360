"""Policy against reference: the arithmetic by hand, and two real adapters of a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from dpo_cli.config import resolve
from dpo_cli.config.settings import Config
from dpo_cli.data.jsonl import read_rows, write_rows
from dpo_cli.data.records import Compared
from dpo_cli.demo.tiny import make_base
from dpo_cli.engines._engine import Request, Sampled
from dpo_cli.engines.transformers import load, run
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages.evaluate import run as evaluate
from dpo_cli.stages.evaluate.win_rate import win_rate
from dpo_cli.statistics import Interval, bootstrap


def test_win_rate_by_hand() -> None:
    assert win_rate([1], [2]) == 1
    assert win_rate([2], [1]) == 0
    assert win_rate([1], [1]) == 0.5
    # 3 beats 1 and 2; 2 beats 1 and ties 2: (2 + 1.5) of 4
    assert win_rate([1, 2], [3, 2]) == 3.5 / 4


def test_bootstrap_covers_as_often_as_it_says() -> None:
    """Means of 60 tosses of a coin: their 95% intervals hold one half about 95 times in 100."""
    generator = torch.Generator().manual_seed(0)
    tosses = torch.randint(2, (100, 60), generator=generator).double().tolist()
    intervals = [bootstrap(values, 300, seed) for seed, values in enumerate(tosses)]
    covered = sum(one.low <= 0.5 <= one.high for one in intervals) / len(intervals)
    assert 0.90 <= covered <= 0.99
    # The normal interval of a fair coin's mean is 2 * 1.96 * 0.5 / sqrt(60) = 0.253 wide.
    assert sum(one.high - one.low for one in intervals) / len(intervals) == pytest.approx(0.253, abs=0.02)
    assert bootstrap([1.0, 1.0], 100, 0) == Interval(1.0, 1.0, 1.0, n=2)


def score(prompt: list[dict[str, str]], completion: str) -> float:
    return sum(map(str.islower, completion))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return two_adapters(tmp_path_factory.mktemp("project"))


def two_adapters(folder: Path) -> Config:
    """A random base with two random adapters, and 24 prompts."""
    from peft import LoraConfig, get_peft_model

    torch.set_num_threads(1)
    sentence = "all the kettles of the laundromat sing at noon and nobody knows why"
    words = sentence.split()
    base = make_base(folder / "base", [sentence], vocabulary=300, context=256)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    for seed, name in enumerate(("sft", "dpo")):
        torch.manual_seed(seed)
        get_peft_model(load(str(base), None).network, lora).save_pretrained(folder / name)
    write_rows(
        folder / "heldout.jsonl", [{"prompt": " ".join(words[:i]) + "!" * j} for i in range(1, 13) for j in (0, 1)]
    )
    keys = {
        "model.base": base, "model.adapter": folder / "sft", "model.dpo_adapter": folder / "dpo", "data": folder,
        "judge.judge": "function", "judge.function": f"{__file__}:score", "evaluate.prompts": folder / "heldout.jsonl",
        "generate.engine": "transformers", "generate.max_tokens": 12, "evaluate.samples": 2,
    }  # fmt: skip
    return resolve.resolve({key: str(value) for key, value in keys.items()}, environment={}).config


def test_identical_adapters_are_even(settings: Config) -> None:
    same = replace(settings, model=replace(settings.model, dpo_adapter=settings.model.adapter))
    result = evaluate.run(same, Silent())
    low, high = result.interval
    assert low < 0.5 < high  # both sides draw for themselves, so the interval has a width
    assert low <= result.win_rate <= high
    assert result.n == 24


def test_the_result_is_what_the_file_says(settings: Config) -> None:
    result = evaluate.run(settings, Silent())
    rows = [row for _, row in read_rows(Path(result.path), Compared)]
    assert len(rows) == result.n == 24
    assert any(row.reference != row.policy for row in rows)
    for row in rows:
        assert row.reference_scores == [score([], text) for text in row.reference]
        assert row.policy_scores == [score([], text) for text in row.policy]
    rates = [win_rate(row.reference_scores, row.policy_scores) for row in rows]
    assert result.win_rate == pytest.approx(sum(rates) / 24)
    assert result.scores.policy == pytest.approx(sum(sum(row.policy_scores) for row in rows) / 48)
    assert result.lengths.reference == pytest.approx(sum(len(text) for row in rows for text in row.reference) / 48)


def test_each_side_is_its_own_adapter(settings: Config) -> None:
    rows = [row for _, row in read_rows(Path(evaluate.run(settings, Silent()).path), Compared)]
    requests = [Request(id=row.id, prompt=row.prompt, have=[], need=2) for row in rows]
    sides = {"reference": (settings.model.adapter, 0), "policy": (settings.model.dpo_adapter, 1)}
    for side, (adapter, shift) in sides.items():
        answers: list[Sampled] = []
        sampling = replace(settings.generate, seed=settings.evaluate.seed + shift)
        run(load(settings.model.base, adapter), requests, sampling, answers.append, Silent())
        assert {answer.id: answer.texts for answer in answers} == {row.id: getattr(row, side) for row in rows}


def test_a_missing_prompt_file_is_named(settings: Config) -> None:
    lost = replace(settings, evaluate=replace(settings.evaluate, prompts="nowhere.jsonl"))
    with pytest.raises(UserError, match="held-out prompts") as caught:
        evaluate.run(lost, Silent())
    assert caught.value.where == "nowhere.jsonl"


def test_kl_is_nothing_between_equals_and_what_the_distributions_say_between_others(
    settings: Config, tmp_path: Path
) -> None:
    from dpo_cli.stages.evaluate.adapters import load_both
    from dpo_cli.stages.evaluate.divergence import Measured

    settings = replace(settings, data=str(tmp_path), evaluate=replace(settings.evaluate, kl_prompts=10))
    same = replace(settings, model=replace(settings.model, dpo_adapter=settings.model.adapter))
    found = evaluate.run(same, Silent()).kl
    assert found is not None
    assert (found.nats_per_sequence, found.n, found.how) == (0.0, 10, "whole vocabulary")
    other = evaluate.run(settings, Silent()).kl
    assert other is not None
    assert other.nats_per_sequence > 0.1

    # Each side of `load_both` is what its adapter alone makes of the base, also after it was the other.
    prompt = torch.tensor([[5, 6, 7, 8]])

    def logits(network: Any) -> torch.Tensor:
        return network(prompt).logits[0].log_softmax(-1)

    alone = {adapter: logits(load(settings.model.base, adapter).network) for adapter in (None, *adapters_of(settings))}
    for reference in (settings.model.adapter, None):
        model, as_reference = load_both(replace(settings, model=replace(settings.model, adapter=reference)))
        for _ in range(2):
            assert torch.allclose(logits(model.network), alone[settings.model.dpo_adapter], atol=1e-4)
            with as_reference() as network:
                assert torch.allclose(logits(network), alone[reference], atol=1e-4)
    rows = [row for _, row in read_rows(Path(settings.data) / "evaluation/kl.jsonl", Measured)]
    assert sum(row.nats for row in rows[-10:]) / 10 == pytest.approx(other.nats_per_sequence)


def adapters_of(settings: Config) -> tuple[str | None, str]:
    return settings.model.adapter, settings.model.dpo_adapter


def test_kl_goes_on_where_it_was_and_says_why_there_is_none(settings: Config, tmp_path: Path) -> None:
    settings = replace(settings, evaluate=replace(settings.evaluate, kl_prompts=12))
    whole = evaluate.run(settings, Silent()).kl
    path = Path(settings.data) / "evaluation/kl.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-3]) + lines[-3][:20])  # as a kill leaves it
    assert evaluate.run(settings, Silent()).kl == whole
    assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    none = replace(settings, evaluate=replace(settings.evaluate, kl_prompts=0))
    assert evaluate.run(none, Silent()).no_kl == "evaluate.kl_prompts is 0"
