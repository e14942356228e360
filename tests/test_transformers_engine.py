"""The in-process engine: seeded results that no batch changes, vLLM's sampling rules, faults that name their fix."""

import random
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from dpo_cli.config.settings import Config, GenerateSection, ModelSection
from dpo_cli.data.records import Message
from dpo_cli.demo.tiny import make_base
from dpo_cli.engines import _batch
from dpo_cli.engines._batch import cheapest_cuts, choose
from dpo_cli.engines._engine import Request, Sampled
from dpo_cli.engines.transformers import Model, load, run, sample
from dpo_cli.errors import UserError
from dpo_cli.progress import Silent
from dpo_cli.stages.generate import made_with

SENTENCE = "the kettle sings and nobody in the whole laundromat asked it to sing so loudly again today"
WORDS = SENTENCE.split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Random weights, large enough that the next token depends on the prompt; one token in ten ends a completion."""
    torch.set_num_threads(1)
    folder = make_base(tmp_path_factory.mktemp("base"), [SENTENCE], vocabulary=280, context=128)
    model = load(str(folder), None)
    for parameter in model.network.parameters():
        parameter.mul_(8 if parameter.dim() == 2 else 1)
    return Model(model.network, model.tokenizer, model.ends | set(range(10, 260, 10)), model.context)


def requests_of(count: int, need: int) -> list[Request]:
    return [
        Request(id=f"prompt{i}", prompt=[{"role": "user", "content": " ".join(WORDS[: 1 + i * 3 % 15])}], have=[],
                need=need)
        for i in range(count)
    ]  # fmt: skip


def sampled(model: Model, requests: list[Request], **settings: float) -> dict[str, Sampled]:
    answers: list[Sampled] = []
    defaults: dict[str, float] = {"temperature": 1.0, "max_tokens": 24, "frequency_penalty": 0.0}
    run(model, requests, GenerateSection(**(defaults | settings)), answers.append, Silent())  # type: ignore[arg-type]
    assert len(answers) == len(requests)
    return {answer.id: answer for answer in answers}


@pytest.mark.parametrize("overhead", [0, 4, 32])
def test_a_completion_does_not_depend_on_the_batch(
    model: Model, overhead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_batch.OVERHEAD, "cpu", overhead)
    requests = requests_of(12, need=3)
    alone = sampled(model, requests, batch_size=1, frequency_penalty=0.7)
    together = sampled(model, requests[::-1], batch_size=32, frequency_penalty=0.7)
    few = sampled(model, requests[3:9], batch_size=5, frequency_penalty=0.7)
    assert together == alone
    assert few == {request.id: alone[request.id] for request in requests[3:9]}
    texts = [text for answer in alone.values() for text in answer.texts]
    assert len(set(texts)) > 0.9 * len(texts)
    assert {reason for answer in alone.values() for reason in answer.finish_reasons} == {"stop", "length"}


def test_a_later_completion_continues_after_those_that_exist(model: Model) -> None:
    (request,) = requests_of(1, need=4)
    whole = sampled(model, [request])["prompt0"].texts
    rest = Request(id=request.id, prompt=request.prompt, have=whole[:1], need=3)
    assert sampled(model, [rest])["prompt0"].texts == whole[1:]
    assert sampled(model, [request], seed=7)["prompt0"].texts != whole


def test_prompts_are_cut_into_the_forwards_that_cost_least() -> None:
    for seed in range(20):
        random_ = random.Random(seed)
        lengths = sorted((random_.randint(1, 60) for _ in range(random_.randint(1, 9))), reverse=True)

        def cost(cuts: Sequence[int], lengths: list[int] = lengths) -> int:
            starts = [0, *cuts[:-1]]
            return sum(16 + lengths[start] * (end - start) for start, end in zip(starts, cuts, strict=True))

        inner = range(1, len(lengths))
        every = [(*cuts, len(lengths)) for count in range(len(lengths)) for cuts in combinations(inner, count)]
        assert cost(cheapest_cuts(lengths, 16)) == min(map(cost, every))


def test_prompts_of_one_length_are_prefilled_together_and_a_long_one_by_itself(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda **inputs: seen.append(tuple(inputs["input_ids"].shape)) or forward(**inputs)
    )
    words = [[8] * 90, [9] * 7, [10] * 6, [11] * 7]
    monkeypatch.setattr(Model, "encode", lambda self, prompt, tools=None: words[int(prompt[0]["content"])])
    requests = [
        Request(id=str(number), prompt=[{"role": "user", "content": str(number)}], have=[], need=2)
        for number in range(4)
    ]
    sampled(model, requests, max_tokens=2)
    assert [shape for shape in seen if shape[1] > 1] == [(1, 90), (3, 7)]


def test_bfloat16_is_taken_only_where_it_is_asked_for_and_the_rows_say_so(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", [SENTENCE], vocabulary=280, context=128)
    assert load(base, None, device="cpu").network.dtype == torch.float32
    assert load(base, None, device="cpu", bf16=True).network.dtype == torch.bfloat16
    config = Config(model=ModelSection(base=base, adapter=None), generate=GenerateSection(engine="transformers"))
    plain = made_with(config, "transformers")
    config.generate.bf16 = True
    assert made_with(config, "transformers") == plain | {"bf16": True}
    assert made_with(config, "endpoint") == made_with(replace(config, generate=GenerateSection()), "endpoint")
    answers: list[Sampled] = []
    config.generate.max_tokens = 4
    sample(requests_of(2, need=2), config, answers.append, Silent())
    assert all(answer.texts for answer in answers)


def test_greedy_equals_generate(model: Model) -> None:
    requests = requests_of(8, need=2)
    answers = sampled(model, requests, temperature=0.0, batch_size=6)
    for request in requests:
        prompt = torch.tensor([model.encode(request.prompt)])
        output = model.network.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=24,
            eos_token_id=sorted(model.ends), pad_token_id=0,
        )  # fmt: skip
        new = output[0, prompt.shape[1] :].tolist()
        answer = answers[request.id]
        assert answer.texts == [model.decode(new)] * 2
        assert answer.usage.input == prompt.shape[1] and answer.usage.output == 2 * len(new)


def test_a_prompt_is_prefilled_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = model.network.forward
    monkeypatch.setattr(
        model.network, "forward", lambda **inputs: seen.append(tuple(inputs["input_ids"].shape)) or forward(**inputs)
    )
    requests = requests_of(1, need=8)
    answer = sampled(model, requests)["prompt0"]
    assert [shape for shape in seen if shape[1] > 1] == [(1, len(model.encode(requests[0].prompt)))]
    # Each sequence is computed exactly as often as it lives: a finished one costs nothing more.
    assert sum(rows for rows, columns in seen if columns == 1) == answer.usage.output - 8


def test_frequency_penalty_counts_the_completion_only() -> None:
    """One constant logit row: by hand, ' b' falls from 2 to 0.5 after one draw at penalty 1.5, and ' a' stays 1."""

    class Constant(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, past_key_values: object, **_: object) -> object:
            states = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
            past_key_values.update(states, states, 0)  # type: ignore[attr-defined]
            return type("Output", (), {"logits": torch.tensor([0.0, 1.0, 2.0]).repeat(len(input_ids), 1, 1)})

    class Letters:
        def apply_chat_template(self, prompt: list[Message], **_: object) -> list[int]:
            return [2, 2, 2]  # the prompt is full of b: it must not count

        def decode(self, ids: list[int], **_: object) -> str:
            return "".join("-ab"[i] for i in ids)

    model = Model(Constant(), Letters(), frozenset(), 100)
    greedy = {"temperature": 0.0, "max_tokens": 6}
    # b: 2, 0.5, -1 ...  a: 1, -0.5 ...  -: 0, -1.5 ...
    assert sampled(model, requests_of(1, 1), frequency_penalty=1.5, **greedy)["prompt0"].texts == ["bab-ab"]
    assert sampled(model, requests_of(1, 1), frequency_penalty=0.0, **greedy)["prompt0"].texts == ["bbbbbb"]


def test_draws_follow_the_tempered_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000

    def shares(temperature: float, top_p: float) -> list[float]:
        tokens = choose(logits.expand(10_000, -1), uniforms, temperature, top_p)
        return (torch.bincount(tokens, minlength=4) / 10_000).tolist()

    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=1e-3)
    assert shares(1.0, 0.7) == pytest.approx([0.625, 0.375, 0, 0], abs=1e-3)
    assert shares(1.0, 0.0) == [1, 0, 0, 0]
    # At temperature 1/2 the odds are squared: 25 : 9 : 2.25 : 0.25 of 36.5.
    assert shares(0.5, 1.0) == pytest.approx([25 / 36.5, 9 / 36.5, 2.25 / 36.5, 0.25 / 36.5], abs=1e-3)
    assert shares(0.0, 1.0) == [1, 0, 0, 0]


def test_the_context_caps_a_completion_and_refuses_a_long_prompt(model: Model) -> None:
    requests = requests_of(2, need=1)
    requests[0].prompt = [{"role": "user", "content": "kettle " * 200}]
    room = model.context - len(model.encode(requests[1].prompt))
    unending = Model(model.network, model.tokenizer, frozenset(), model.context)
    answers = sampled(unending, requests, max_tokens=500)
    assert "context 128" in str(answers["prompt0"].error) and answers["prompt0"].texts == []
    assert answers["prompt1"].finish_reasons == ["length"] and answers["prompt1"].usage.output == room


def test_a_merged_adapter_says_what_the_adapter_says(model: Model, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_base(tmp_path / "base", [SENTENCE], vocabulary=280)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load(str(base), None).network, lora).save_pretrained(tmp_path / "adapter")
    adapter = str(tmp_path / "adapter")
    texts = [
        sampled(load(str(base), path, merge=merge), requests_of(4, need=2))
        for path, merge in [(adapter, True), (adapter, False), (None, None)]
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(("base", "adapter", "key"), [("nowhere", "nowhere", "base"), ("base", "nowhere", "adapter")])
def test_missing_models_name_the_setting(tmp_path: Path, base: str, adapter: str, key: str) -> None:
    make_base(tmp_path / "base", ["a"], vocabulary=261)
    config = Config(model=ModelSection(base=str(tmp_path / base), adapter=str(tmp_path / adapter)))
    with pytest.raises(UserError) as caught:
        sample([], config, lambda _: None, Silent())
    assert caught.value.where == str(tmp_path / "nowhere") and f"model.{key}=" in str(caught.value.hint)
