"""bfloat16 on a CPU: when it is chosen, how near it is to float32 beside TRL's, what it keeps exact."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from packing import Packed, Plain, configuration, make, outcome
from training import Lines, config_of, pair, read_rows, write_rows

from dpo_cli.data.files import write_json
from dpo_cli.models.base_model import Base
from dpo_cli.models.weights import Tensor
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.training import kl, precision
from dpo_cli.training.dpo import reference_of
from dpo_cli.training.forward import blockwise_attention, fused_lora, log_probs, packed

torch.set_num_threads(1)


def base_of(folder, weights, quantised=None):
    shapes = {"one": Tensor("BF16", [weights // 1000, 1000], (0, 2 * weights))}
    return Base(folder=folder, config={"model_type": "llama"}, shapes=shapes, quantised=quantised)


@pytest.mark.parametrize("stage", ["dpo", "sft"])
@pytest.mark.parametrize(
    ("capability", "weights", "sets", "quantised", "bias", "chosen"),
    [
        ("avx512_bf16", 60_000_000, {}, None, "none", True),
        ("amx_bf16", 60_000_000, {}, None, "none", True),
        ("avx512_f", 60_000_000, {}, None, "none", None),
        ("avx512_bf16", 40_000_000, {}, None, "none", None),
        ("avx512_bf16", 60_000_000, {"bf16": False}, None, "none", False),
        ("avx512_bf16", 60_000_000, {"load_in_4bit": True}, None, "none", None),
        ("avx512_bf16", 60_000_000, {}, "bitsandbytes", "none", None),
        ("avx512_bf16", 60_000_000, {}, None, "lora_only", None),
    ],
    ids=["AVX512-BF16", "AMX", "neither", "small", "as set", "4 bits", "stored in 4 bits", "biases"],
)
def test_it_is_chosen_where_it_pays(
    tmp_path, monkeypatch, start, stage, capability, weights, sets, quantised, bias, chosen
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capability: True})
    section = {"dpo": "train", "sft": "sft"}[stage]
    config = config_of(start, tmp_path, *(f"{section}.{name}={str(value).lower()}" for name, value in sets.items()))
    write_json(tmp_path / "adapter_config.json", {"bias": bias})
    said = Lines()
    found = precision.with_precision(config, stage, base_of(tmp_path, weights, quantised), tmp_path, said)
    assert getattr(found, section).bf16 is chosen
    assert any(f"{section}.bf16 = false" in line for line in said.lines) == (chosen is True)


def test_weights_that_are_all_trained_stay_as_they_are(tmp_path, monkeypatch, start):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    config = config_of(start, tmp_path, "train.full=true")
    assert precision.with_precision(config, "dpo", base_of(tmp_path, 60_000_000), None, Lines()) is config


def in_bf16(trainer):
    """As `load_base` loads a base in bfloat16, under the LoRA that is here."""
    for name, value in trainer.model.named_parameters():
        if "lora_" not in name:
            value.data = value.data.bfloat16()
    precision.keep_states_precise(trainer.model.get_base_model())
    return trainer


@pytest.mark.parametrize("least", [0, blockwise_attention.LEAST], ids=["blockwise", "torch's kernel"])
def test_losses_and_gradients_are_nearer_to_float32s_than_trls_bfloat16_is(least, tmp_path, monkeypatch):
    """On a base that is stored in bfloat16, as they are, with logits as high as a real model's."""
    monkeypatch.setattr(blockwise_attention, "LEAST", least)
    config = configuration("Llama", hidden_size=128, num_hidden_layers=4, intermediate_size=256)

    def trainer(kind, **arguments):
        made = make(kind, tmp_path, config, **arguments)
        with torch.no_grad():
            for name, value in made.model.named_parameters():
                if "lora_" not in name:
                    value.mul_(8 if "lm_head" in name else 3 if "proj" in name else 1).copy_(value.bfloat16())
        return made

    def found(made):
        """(log-probabilities of the policy's and the reference's tokens, the gradient)."""
        kept = []
        made.model.register_forward_hook(lambda module, inputs, output: kept.append(output.log_probs.detach()))
        gradient = outcome(made)["gradient"]
        return torch.stack(kept[:2]), torch.cat([value.flatten() for _, value in sorted(gradient.items())])

    exact, theirs = found(trainer(Plain)), found(trainer(Plain, bf16=True))
    mine = in_bf16(trainer(Packed, bf16=True))
    assert packed.enable(mine) is None
    (scores, gradient), (trls_scores, trls_gradient) = (
        [(one - other).norm() / other.norm() for one, other in zip(found_, exact, strict=True)]
        for found_ in (found(mine), theirs)
    )
    assert scores < trls_scores and gradient < 1.05 * trls_gradient < 0.1, (scores, trls_scores, gradient)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_the_heads_logits_are_rounded_by_their_distance_from_the_targets(needs_grad, monkeypatch):
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    monkeypatch.setattr(log_probs, "TILE", 8 * 500)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 500, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    topics = torch.randn(100, 64)  # five tokens of each, whose logits are near one another, at about 20
    layer.weight.copy_(topics.repeat_interleave(5, 0) + 0.2 * torch.randn(500, 64))
    hidden = (topics[:40] / 3).bfloat16().float()
    targets = torch.arange(0, 200, 5) + torch.randint(5, (40,))
    exact = hidden.double().requires_grad_(needs_grad)
    chances = (exact @ layer.weight.double().t()).log_softmax(-1)
    theirs, ours = (hidden.clone().requires_grad_(needs_grad) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        trls, *_ = ChunkedLogProbFunction.apply(
            theirs, layer.weight, None, targets, 1.0, 500, None, 1.0, log_probs.METRICS
        )
        found = log_probs.score(ours, layer, targets, None, metrics=True, squares=True)
    expected = chances.gather(1, targets[:, None])[:, 0]
    assert (found.log_probs - expected).norm() < 0.4 * (trls - expected).norm()
    assert torch.allclose(found.entropy.double(), -(chances.exp() * chances).sum(-1), atol=6e-2)
    assert torch.allclose(found.log_sum_sq_probs.double(), (2 * chances).exp().sum(-1).log(), atol=2e-2)
    assert found.is_top1.tolist() == (expected >= chances.amax(-1)).tolist()
    if needs_grad:
        for loss in (expected.sum(), trls.sum(), found.log_probs.sum()):
            loss.backward()
        assert ours.grad.dtype == torch.float32
        assert (ours.grad - exact.grad).norm() <= (theirs.grad - exact.grad).norm()


def test_a_reference_kept_in_float32_is_not_that_of_bfloat16(tmp_path, start):
    known = []
    for bf16 in ("false", "true", "false", "true"):
        said = Lines()
        sets = ("train.max_steps=1", "train.keep_reference=true", f"train.bf16={bf16}")
        train.run(config_of(start, tmp_path, *sets), said, fresh=True)
        known += [line for line in said.lines if line.startswith("reference: kept")]
        [zero] = [row for row in read_rows(tmp_path / "runs/dpo/events.jsonl") if row["event"] == "step_zero"]
        assert zero["margin"] == 0 and abs(zero["loss"] - math.log(2)) < 1e-6
    assert len(list((tmp_path / "runs/.reference").glob("*.jsonl"))) == 2
    assert ["0 of" in line for line in known] == [True, True, False, False]


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_young_adapter_adds_is_not_rounded_away(bias):
    """One step of 1e-4 changes a layer's output by less than bfloat16 can tell from it; PEFT's sum loses it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(64, 512, bias=bias)).requires_grad_(False)
    network[0].weight.copy_(network[0].weight.bfloat16())
    model = get_peft_model(network, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.fill_(1e-4)
    rows = torch.randn(256, 64).bfloat16().float()

    def change(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            moved = model(rows).double()
            with model.disable_adapter():
                return moved - model(rows).double()

    exact = change(False)
    shares = []
    for fuse in (False, True):
        if fuse:
            fused_lora.fuse(model)
        found = change(True)
        shares.append(((found * exact.sign()).sum() / exact.abs().sum()).item())
    assert shares[0] < 0.75 and abs(shares[1] - 1) < 0.05, shares


def test_kl_is_not_that_of_rounded_logits(tmp_path):
    config = configuration("Llama", hidden_size=128)
    trainer = make(Packed, tmp_path, config, bf16=True)
    with torch.no_grad():
        for name, value in trainer.model.named_parameters():
            if "lora_" not in name:
                if "lm_head" in name:
                    value.mul_(12).add_(2 * torch.randn(128))  # logits are high, as a real model's, all alike
                value.copy_(value.bfloat16())
            elif ".default." in name:  # near the reference
                value.copy_(trainer.model.get_parameter(name.replace("default", "ref")) * 1.02)
    prompts, completions = ([[5 + row + at for at in range(40)] for row in range(8)] for _ in range(2))

    def measured(autocast):
        of_these = kl.SampledKl(trainer.model, lambda: reference_of(trainer.model), prompts, 40, set(), 0, autocast)
        return sum(of_these.nats(completions)) / 320

    exact = measured(nullcontext)
    in_bf16(trainer)
    assert packed.enable(trainer) is None
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    near = measured(autocast)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kl, "_precise_head", lambda model: nullcontext())
        rounded = measured(autocast)
    assert abs(near - exact) < abs(rounded - exact) / 2, (exact, near, rounded)


def test_sft_and_then_dpo_of_its_adapter_learn_as_in_float32(tmp_path, start):
    rows = [{"prompt": one["prompt"], "completion": one["chosen"]} for one in map(pair, range(12))]
    data = write_rows(tmp_path / "demonstrations.jsonl", rows)
    losses = {}
    for bf16 in ("false", "true"):
        place = tmp_path / bf16
        sets = (f"model.adapter={place / 'sft'}", f"sft.bf16={bf16}", f"train.bf16={bf16}")
        config = config_of(start, place, *sets, "sft.max_steps=3", "train.max_steps=3", "train.learning_rate=1e-3")
        train.run(config, Silent(), stage="sft", name="sft", data=data)
        train.run(config, Silent())
        logged = [row for run in ("sft", "dpo") for row in read_rows(place / "runs" / run / "metrics.jsonl")]
        losses[bf16] = torch.tensor([row.get("loss", row.get("eval_loss")) for row in logged])
    assert len(losses["true"]) > 4 and (losses["true"] - losses["false"]).abs().max() < 2e-2
    assert not torch.equal(losses["true"], losses["false"])
