"""A run that goes over its KL limit, taken back to exactly the limit along the line to the SFT adapter."""

import math
from pathlib import Path

import pytest
from test_scale_adapter import changes
from training import Lines, config_of

from dpo_cli.stages import train

LIMIT = 0.005


@pytest.fixture(scope="module")
def run(start, tmp_path_factory):
    """A run whose first evaluation is over the limit."""
    folder = tmp_path_factory.mktemp("run")
    config = config_of(
        start, folder, "train.learning_rate=1e-2", "train.beta=0.5", "gate.retreat=true", "train.eval_steps=4",
        "train.save_steps=4", "train.kl_prompts=5", "train.kl_tokens=16",
    )  # fmt: skip
    config.gate.kl_limit = LIMIT
    return config, train.run(config, Lines())


def test_the_kl_is_the_limit(run):
    _, result = run
    found = result.retreat
    assert found.kl_before > 2 * LIMIT and 0.95 * LIMIT <= found.kl <= LIMIT and 0 < found.scale < 1
    assert result.metrics["eval_kl_nats_per_token"] == found.kl
    assert result.gates["kl_nats_per_token"].ok
    assert (result.step, result.ended) == (4, "kl_limit")


def test_what_is_published_is_that_point_of_the_line(run):
    import torch

    config, result = run
    sft, far, got = (
        changes(Path(folder))
        for folder in (
            config.model.adapter,
            Path(result.run) / "checkpoints" / "checkpoint-4",
            config.model.dpo_adapter,
        )
    )
    scale = result.retreat.scale
    for name in sft:
        assert torch.allclose(got[name], (1 - scale) * sft[name] + scale * far[name], atol=1e-5)


def test_the_margin_is_that_of_the_published_adapter(run):
    """TRL's own trainer evaluates it, the SFT adapter as its reference."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from dpo_cli.training import dpo
    from dpo_cli.training.inputs import read_inputs
    from dpo_cli.training.trainer import load_encoder

    config, result = run
    base = Path(config.model.base)
    policy, reference = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
        for adapter in (config.model.dpo_adapter, config.model.adapter)
    )
    rows = read_inputs(config, "dpo", None, None).held_out
    held_out = load_encoder(base, config.model, 256).encode([row[:2] for row in rows]).rows
    tokenizer, data = AutoTokenizer.from_pretrained(base), dpo._dataset(held_out)

    class Encoded(DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

    trl = Encoded(
        model=policy, ref_model=reference, processing_class=tokenizer, train_dataset=data, eval_dataset=data,
        args=DPOConfig(output_dir=str(Path(result.run) / "trl"), beta=0.5, bf16=False, report_to="none",
                       max_length=None, per_device_eval_batch_size=len(rows), gradient_checkpointing=False),
    )  # fmt: skip
    measured = trl.evaluate()  # of rows that are encoded already
    assert result.metrics["eval_rewards/margins"] == pytest.approx(measured["eval_rewards/margins"], abs=1e-4)
    assert result.metrics["eval_loss"] == pytest.approx(measured["eval_loss"], abs=1e-4)
    assert not math.isclose(measured["eval_rewards/margins"], 0, abs_tol=1e-3)


def test_its_kl_is_a_tokens_over_all_the_prompts(run):
    """The published adapter and the SFT adapter, each a model of its own, sum up to what is said."""
    from contextlib import nullcontext

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from dpo_cli.training.inputs import read_inputs
    from dpo_cli.training.kl import SampledKl
    from dpo_cli.training.trainer import load_encoder

    config, result = run
    base = Path(config.model.base)
    policy, reference = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
        for adapter in (config.model.dpo_adapter, config.model.adapter)
    )
    encoder = load_encoder(base, config.model, 256)
    rows = encoder.encode([row[:2] for row in read_inputs(config, "dpo", None, None).held_out]).rows
    prompts = [list(ids) for ids in dict.fromkeys(tuple(row.prompt) for row in rows)][:5]
    how = prompts, 16, encoder.stop_ids, config.train.seed, nullcontext
    completions, nats = SampledKl(policy, lambda: nullcontext(reference), *how).measure()
    assert sum(nats) / sum(map(len, completions)) == pytest.approx(result.retreat.kl, rel=1e-3)


def test_it_comes_back_when_it_is_gone(run):
    import shutil

    config, _ = run
    weights = Path(config.model.dpo_adapter) / "adapter_model.safetensors"
    was = weights.read_bytes()
    shutil.rmtree(config.model.dpo_adapter)
    assert train.run(config, Lines()).finished_before
    assert weights.read_bytes() == was
