"""Points on the line between two adapters: weights by hand, log-probabilities by PEFT, ranks, refusals."""

import json

import pytest
from adapters import base_model, edit_settings, save_adapter

from dpo_cli.adapter import check_adapter
from dpo_cli.errors import UserError

TEXT = "[MABEL] You returned the umbrella? It was raining. [OTIS] Nobody stands under anything for a year."


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A base, an SFT adapter of rank 4, and a DPO adapter that is the same one moved a little."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("line")
    base = base_model(folder / "base")
    for name in ("sft", "dpo"):
        save_adapter(folder / name, base)
    file = folder / "dpo" / "adapter_model.safetensors"
    draw = torch.Generator().manual_seed(1)
    moved = {key: value + 0.01 * torch.randn(value.shape, generator=draw) for key, value in load_file(file).items()}
    save_file(moved, file, metadata={"format": "pt"})
    return folder


def log_probs(line, change):
    """Log-probabilities of a text, the base's weights changed by `change`: layer -> (out, in)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(line / "base", dtype=torch.float32)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, moved in change.items():
            weights[name.removeprefix("base_model.model.") + ".weight"] += moved
        ids = AutoTokenizer.from_pretrained(line / "base")(TEXT, return_tensors="pt")["input_ids"]
        return model(input_ids=ids).logits[0].log_softmax(-1)


def changes(folder):
    """What an adapter adds to each weight: alpha / r times B A."""
    from safetensors.torch import load_file

    settings = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.partition(".lora_A")[0]: settings["lora_alpha"] / settings["r"] * tensors[key.replace("_A", "_B")] @ value
        for key, value in tensors.items()
        if ".lora_A." in key
    }


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_log_probabilities_are_those_of_the_point_on_the_line(line, tmp_path, scale):
    """By PEFT's own loading, against weights that are added up here."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_cli.training.scale_adapter import scale_adapter

    made = scale_adapter(line / "sft", line / "dpo", tmp_path / "out", scale, str(line / "base"))
    sft, dpo = changes(line / "sft"), changes(line / "dpo")
    expected = log_probs(line, {name: (1 - scale) * sft[name] + scale * dpo[name] for name in sft})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(line / "base"), made.path)
    ids = AutoTokenizer.from_pretrained(line / "base")(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        got = model(input_ids=ids).logits[0].log_softmax(-1)
    assert torch.allclose(got, expected, atol=2e-4)
    assert made.rank == 8 and made.error == pytest.approx(0, abs=1e-6)  # 4 and 4 side by side: vLLM has 8
    if scale in (0.5, 3.0):
        assert (expected - log_probs(line, dpo)).abs().max() > 1e-3
    assert check_adapter(tmp_path / "out", str(line / "base")).rank == 8  # as vLLM's loader checks it


def test_a_smaller_rank_says_what_it_leaves_out(line, tmp_path):
    import torch

    from dpo_cli.training.scale_adapter import scale_adapter

    made = scale_adapter(line / "sft", line / "dpo", tmp_path / "out", 2.0, str(line / "base"), rank=4)
    sft, dpo = changes(line / "sft"), changes(line / "dpo")
    got = changes(tmp_path / "out")

    def norm(parts):
        return torch.cat([part.flatten() for part in parts]).norm()

    lost = norm(got[name] - (2 * dpo[name] - sft[name]) for name in sft) / norm(dpo[name] - sft[name] for name in sft)
    assert made.rank == 4
    assert made.error == pytest.approx(lost.item(), rel=1e-3) and made.error > 0.01


def test_without_an_sft_adapter_the_line_begins_at_the_base(line, tmp_path):
    import torch

    from dpo_cli.training.scale_adapter import scale_adapter

    made = scale_adapter(None, line / "dpo", tmp_path / "out", 1.5, str(line / "base"))
    got, dpo = changes(tmp_path / "out"), changes(line / "dpo")
    assert made.rank == 4
    assert all(torch.allclose(got[name], 1.5 * dpo[name], atol=1e-6) for name in dpo)


def test_an_adapter_that_is_not_plain_is_refused(line, tmp_path):
    import shutil

    from dpo_cli.training.scale_adapter import scale_adapter

    shutil.copytree(line / "dpo", tmp_path / "odd")
    edit_settings(use_rslora=True)(tmp_path / "odd")
    with pytest.raises(UserError, match="use_rslora can't be scaled"):
        scale_adapter(line / "sft", tmp_path / "odd", tmp_path / "out", 0.5, str(line / "base"))
    assert not (tmp_path / "out").exists()
