"""A base whose weights are stored in 4 bits: LoRA trains on it, it samples, and nothing is merged into it."""

import math

import pytest
from adapters import TEXTS
from training import config_of, metrics

from dpo_cli.engines._engine import Request
from dpo_cli.engines.transformers import load, sample
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.stages import train


@pytest.fixture
def bases(start, tmp_path):
    """The tiny base as transformers saves it in 4 bits, and in float32 what bitsandbytes reads from those."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stored, read = tmp_path / "stored", tmp_path / "read"
    AutoModelForCausalLM.from_pretrained(start / "base", quantization_config=bits).save_pretrained(stored)
    plain = AutoModelForCausalLM.from_pretrained(start / "base")
    plain.load_state_dict(AutoModelForCausalLM.from_pretrained(stored).dequantize().state_dict())
    plain.save_pretrained(read)
    for folder in (stored, read):
        AutoTokenizer.from_pretrained(start / "base").save_pretrained(folder)
    return stored, read


def losses(start, folder, base):
    sets = (f"model.base={base}", "model.same_base=true", "train.max_steps=4", "train.logging_steps=1",
            "train.eval_steps=2")  # fmt: skip
    result = train.run(config_of(start, folder, *sets), Silent())
    assert result.step_zero.ok and result.step == 4
    rows = metrics(folder / "runs/dpo")
    return [row[name] for row in rows for name in ("loss", "eval_loss") if name in row]


def test_a_base_stored_in_4_bits_trains_and_samples_as_its_weights_do_but_takes_no_merge(start, tmp_path, bases):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_cli.training.merge_adapter import merge

    stored, read = bases
    found, wanted = losses(start, tmp_path / "ours", stored), losses(start, tmp_path / "theirs", read)
    assert len(found) == 6 and found == pytest.approx(wanted, abs=1e-4)  # without the base's gradient .03 off
    assert found[0] == pytest.approx(math.log(2)) and found[-1] < 0.65

    adapter = tmp_path / "ours/out"
    config = config_of(start, tmp_path, f"model.base={stored}", "model.same_base=true", f"model.adapter={adapter}")
    config.generate.engine, config.generate.temperature, config.generate.max_tokens = "transformers", 0.0, 12
    config.generate.frequency_penalty = 0.0
    prompt = [{"role": "user", "content": TEXTS[0]}]
    answers = []
    sample([Request(id="one", prompt=prompt, have=[], need=1)], config, answers.append, Silent())
    tokenizer = AutoTokenizer.from_pretrained(stored)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(stored), adapter)
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert answers[0].texts == [tokenizer.decode(made, skip_special_tokens=True)] != [""]

    assert hasattr(load(str(stored), str(adapter), config.model).network, "peft_config"), "merged to sample"
    with pytest.raises(UserError, match=r"quantised \(bitsandbytes\)") as refused:
        merge(stored, adapter, tmp_path / "merged", TEXTS)
    assert refused.value.code == Exit.USAGE and not (tmp_path / "merged").exists()
