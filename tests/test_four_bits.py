"""A base whose weights are stored in 4 bits: LoRA trains on it, it samples, and nothing is merged into it."""

import math

import pytest
from adapters import TEXTS
from training import config_of, metrics

from dpo_cli.engines._engine import Request
from dpo_cli.engines.transformers import sample
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train


@pytest.fixture
def quantised(start, tmp_path):
    """The tiny base as transformers saves it in 4 bits, and what it loads from there."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(start / "base", quantization_config=bits).save_pretrained(folder)
    AutoTokenizer.from_pretrained(start / "base").save_pretrained(folder)
    return folder


def test_a_base_stored_in_4_bits_trains_and_samples_as_peft_does_but_takes_no_merge(start, tmp_path, quantised):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_cli.training.merge_adapter import merge

    places = (f"model.base={quantised}", "model.same_base=true")
    config = config_of(start, tmp_path, *places, "train.max_steps=4", "train.logging_steps=1")
    result = train.run(config, Silent())
    assert result.step_zero.ok and result.step == 4
    losses = [row["loss"] for row in metrics(tmp_path / "runs/dpo") if "loss" in row]
    assert abs(losses[0] - math.log(2)) < 1e-3 and losses[-1] < 0.65, losses

    config.model.adapter = tmp_path / "out"
    config.generate.engine, config.generate.temperature, config.generate.max_tokens = "transformers", 0.0, 12
    config.generate.frequency_penalty = 0.0
    prompt = [{"role": "user", "content": TEXTS[0]}]
    answers = []
    sample([Request(id="one", prompt=prompt, have=[], need=1)], config, answers.append, Silent())
    tokenizer = AutoTokenizer.from_pretrained(quantised)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantised), tmp_path / "out")
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert answers[0].texts == [tokenizer.decode(made, skip_special_tokens=True)] != [""]

    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\)") as refused:
        merge(quantised, tmp_path / "out", tmp_path / "merged", TEXTS)
    assert refused.value.code == Exit.USAGE and not (tmp_path / "merged").exists()
