"""The plan of a base that is not on this machine, and what makes a run fit that does not."""

import json

import pytest

from dpo_cli.config.presets import PRESETS
from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config, PlanSection, TrainSection
from dpo_cli.errors import UserError
from dpo_cli.training import known_shapes, plan, preflight
from dpo_cli.training.known_shapes import SIZES, shape_of
from dpo_cli.training.plan import TokenLengths
from dpo_cli.training.trained_parameters import of_fresh_adapter

# Parameters as the models' own pages give them, in thousand millions.
PUBLISHED = {"llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6,
             "qwen2.5-0.5b": 0.494, "qwen2.5-1.5b": 1.54, "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.61, "qwen2.5-14b": 14.8,
             "qwen2.5-32b": 32.8, "qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72, "qwen3-4b": 4.02, "qwen3-8b": 8.19,
             "smollm2-135m": 0.1345, "smollm2-360m": 0.362, "smollm2-1.7b": 1.71, "mistral-7b-v0.3": 7.25}  # fmt: skip
ROWS = [TokenLengths(600, [150, 150])] * 1000


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_sizes_make_the_published_number_of_parameters(name):
    shape, _ = shape_of(f"somebody/{name}")
    made = (shape.linear_parameters() + shape.embedding_parameters()) / 1e9
    assert made == pytest.approx(PUBLISHED[name], rel=0.01)


def test_variants_of_a_name_are_one_model_and_every_row_is_whole():
    for base in ("meta-llama/Llama-3.2-3B-Instruct", "unsloth/Llama-3.2-3B", "LLAMA-3.2-3b-instruct"):
        assert shape_of(base) == (shape_of("x/llama-3.2-3b")[0], "what is known of llama-3.2-3b")
    assert "qwen3-4b" in shape_of("Qwen/Qwen3-4B-Instruct-2507")[1]
    assert all(len(sizes) == len(known_shapes.FIELDS) for sizes in SIZES.values())


def test_what_is_not_known_is_said_with_what_to_do():
    with pytest.raises(UserError, match=r"not on this machine, and its config\.json can't be had") as error:
        shape_of("somebody/unheard-of-9b")
    assert "HF_TOKEN" in error.value.hint


def test_the_config_alone_is_fetched_where_the_table_does_not_know(monkeypatch, tmp_path):
    import huggingface_hub

    sizes = dict(zip(known_shapes.FIELDS, SIZES["qwen2.5-0.5b"], strict=True))
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download",
                        lambda base, file: asked.append((base, file)) or str(tmp_path / "config.json"))  # fmt: skip
    shape, where = shape_of("somebody/own-model")
    assert asked == [("somebody/own-model", "config.json")] and where == "its config.json, fetched alone"
    assert shape == shape_of("Qwen/Qwen2.5-0.5B")[0]


def test_the_default_base_is_planned_without_a_network(tmp_path):
    side = [{"role": "assistant", "content": "[OTIS] It was his umbrella, and he stood under it."}]
    pair = {"prompt": [{"role": "user", "content": "[MABEL] Whose?"}], "chosen": side,
            "rejected": [{"role": "assistant", "content": "[OTIS] Mine."}]}  # fmt: skip
    (tmp_path / "train.jsonl").write_text(json.dumps(pair) + "\n")
    config = resolve(sets=[f"data={tmp_path}", "model.adapter=none"], environment={}).config
    made = preflight.run(config)
    assert made.sizes == "what is known of llama-3.2-3b" and made.memory_gb["weights"] == pytest.approx(6.43, abs=0.01)


def advice(base, card=23.6, **sets):
    shape, section = shape_of(base)[0], TrainSection(**sets)
    adapter, _ = of_fresh_adapter(section, shape, None)
    made = plan.make(section, PlanSection(gpu_memory_gb=card), shape, adapter, ROWS, [], "test")
    return made, next((text for text in made.warnings if "do not fit" in text), "")


def test_where_tokens_are_too_many_it_says_fewer_tokens():
    made, said = advice("llama-3.2-3b", gradient_checkpointing=False, per_device_train_batch_size=8)
    assert not made.fits and "train.tokens_per_batch" in said


def test_where_the_weights_alone_are_too_many_it_says_four_bits():
    made, said = advice("qwen2.5-14b")
    assert made.memory_gb["weights"] > 23.6 and "--preset l4-qlora" in said and "tokens_per_batch" not in said
    fits, _ = advice("qwen2.5-14b", load_in_4bit=True, gradient_checkpointing=True)
    assert fits.fits and f"needs {fits.total_gb:.1f} GB" in said  # what it promises is what comes of it
    assert PRESETS["l4-qlora"]["train.load_in_4bit"] is True


def test_where_four_bits_are_too_many_it_says_another_card():
    _, said = advice("llama-3.1-70b", load_in_4bit=True, gradient_checkpointing=True)
    assert "another card, such as A100-80GB" in said or "another card, such as L40S" in said
    card = plan.CARDS[said.partition("such as ")[2].split(" ")[0]]
    assert advice("llama-3.1-70b", card=card, load_in_4bit=True, gradient_checkpointing=True)[0].fits


def test_all_weights_are_shared_by_several_cards_and_an_adapters_base_is_not():
    _, said = advice("qwen2.5-14b", full=True)
    assert "several cards" in said and "--gpus" in said
    _, alone = advice("llama-3.1-70b", card=23.6)
    assert "H200" in alone or "B200" in alone or "smaller base" in alone


def test_no_time_is_nothing():
    assert [plan.duration(hours) for hours in (0.0001, 0.5, 2.25)] == ["less than a minute", "30 minutes", "2.2 hours"]
    assert isinstance(Config().plan, PlanSection)
