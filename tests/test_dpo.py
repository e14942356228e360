"""The DPO trainer: its loss by hand, its reference, its guards, its KL; and where SFT puts its loss."""

import math
from statistics import fmean

import pytest
from adapters import base_model, save_adapter
from training import Lines, pair, settings, write_data

from dpo_cli.data import jsonl
from dpo_cli.errors import Exit, UserError
from dpo_cli.progress import Silent
from dpo_cli.training.encode import IGNORED
from dpo_cli.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    base = base_model(folder / "base")
    for seed, name in enumerate(("sft", "other")):
        save_adapter(folder / name, base, seed=seed)
    write_data(folder)
    return folder


@pytest.fixture
def trainer_of(start, tmp_path):
    """Make a trainer for the SFT adapter, or a fresh LoRA, over four pairs, two of them held out."""
    from peft import PeftModel
    from trl import DPOConfig

    from dpo_cli.training import dpo
    from dpo_cli.training.arguments import arguments
    from dpo_cli.training.trainer import fresh_lora, load_base, load_encoder

    with jsonl.Journal(tmp_path / "events.jsonl") as events:

        def make(*sets, adapter="sft"):
            config = settings(start, start / "base", *sets)
            encoder = load_encoder(start / "base", config.model, 256)
            pairs = [pair(number) for number in range(4)]
            rows = encoder.encode([(row["prompt"], [row["chosen"], row["rejected"]]) for row in pairs]).rows
            model = load_base(start / "base", config.train)
            if adapter:
                model = PeftModel.from_pretrained(model, start / adapter, is_trainable=True)
            return dpo.DpoTrainer(
                events=events, kl_prompts=[row.prompt for row in rows[2:]], kl_tokens=8, model=model,
                args=DPOConfig(
                    **arguments(config.train, RunFolder(tmp_path), True, *dpo.BEST),
                    beta=config.train.beta, loss_type=config.train.loss_type,
                ),
                train_dataset=dpo._dataset(rows), eval_dataset=dpo._dataset(rows[2:]),
                processing_class=encoder.tokenizer,
                peft_config=None if adapter else fresh_lora(config.train, model, Silent()),
            )  # fmt: skip

        yield make


def shift(model, name, amount):
    """Move one adapter's weights."""
    import torch

    with torch.no_grad():
        for key, value in model.named_parameters():
            if f".{name}." in key and "lora_B" in key:
                value += amount


def test_the_first_loss_is_ln_2(trainer_of):
    trainer = trainer_of("train.max_steps=1")
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-6
    [event] = [row for _, row in jsonl.read_rows(trainer.events.path, dict)]
    assert event["ok"] and event["margin"] == 0 and abs(event["loss"] - math.log(2)) < 1e-6


@pytest.mark.parametrize("dtype", ["false", "true"], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("checkpointing", ["false", "true"], ids=["plain", "checkpointing"])
def test_step_zero_passes_in_every_precision(trainer_of, dtype, checkpointing):
    trainer = trainer_of("train.max_steps=1", f"train.bf16={dtype}", f"train.gradient_checkpointing={checkpointing}")
    trainer.train()
    assert trainer.state.global_step == 1
    types = {"lora" in name: value.dtype for name, value in trainer.model.named_parameters()}
    assert {lora: str(kind) for lora, kind in types.items()} == {
        True: "torch.float32", False: "torch.bfloat16" if dtype == "true" else "torch.float32"
    }  # fmt: skip


def test_gradient_checkpointing_changes_no_loss(trainer_of):
    losses = []
    for checkpointing in ("false", "true"):
        trainer = trainer_of(
            "train.max_steps=3", "train.logging_steps=1", f"train.gradient_checkpointing={checkpointing}"
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1] and losses[0][2] != losses[0][0]


def base_as_reference(trainer):
    trainer.model.delete_adapter("ref")


def other_adapter_as_reference(trainer):
    shift(trainer.model, "ref", 0.05)


def dropout(trainer):
    import torch

    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    for module in trainer.model.base_model.modules():  # LoRA layers without dropout hold an Identity
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)


def other_function_as_reference(trainer):
    """What the reference computes is off, its weights are right, and precision has no part in it."""

    def off(module, inputs, output):
        return output * 3 if trainer.model.active_adapter == "ref" else output

    trainer.model.base_model.model.model.norm.register_forward_hook(off)


def imprecise_reference(trainer):
    """The reference is off only where numbers are rounded."""
    import torch

    def off(module, inputs, output):
        imprecise = torch.is_autocast_enabled("cpu")
        return output * 3 if imprecise and trainer.model.active_adapter == "ref" else output

    trainer.model.base_model.model.model.norm.register_forward_hook(off)


def rounded_reference(trainer):
    trainer.tolerance = 1e-5
    for key, value in trainer.model.named_parameters():
        if ".ref." in key:
            value.data = value.data.bfloat16().float()


def attention_dropout(trainer):
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = trainer.model.config.attention_dropout = 0.5


@pytest.mark.parametrize(
    ("mistake", "sets", "cause"),
    [
        (other_function_as_reference, (), "margins are up to .* also without dropout: the cause is not known"),
        (other_function_as_reference, ("train.bf16=true",), "without dropout, in float32: the cause is not known"),
        (
            imprecise_reference,
            ("train.bf16=true",),
            r"margins are 0: it is precision \(bfloat16\): set train.bf16 = false",
        ),
        (rounded_reference, (), "those of the adapter that is trained, rounded to torch.bfloat16"),
        (base_as_reference, (), "the reference is the base model, and the adapter that is trained changes it"),
        (other_adapter_as_reference, (), "the reference is another adapter"),
        (dropout, (), "without that margins are 0: dropout is on"),
        (attention_dropout, (), "without that margins are 0: dropout is on"),
    ],
)
def test_a_wrong_step_zero_stops_with_its_cause_before_anything_is_trained(trainer_of, mistake, sets, cause):
    from dpo_cli.training.reference_check import adapter_weights

    trainer = trainer_of(*sets)
    mistake(trainer)
    before = {name: value.clone() for name, value in adapter_weights(trainer.model, "default").items()}
    with pytest.raises(UserError, match=cause) as stopped:
        trainer.train()
    assert stopped.value.code == Exit.FAILED
    assert all(value.equal(before[name]) for name, value in adapter_weights(trainer.model, "default").items())
    [event] = [row for _, row in jsonl.read_rows(trainer.events.path, dict)]
    assert not event["ok"]


def test_a_packed_forward_that_is_wrong_is_named_once_the_models_own_is_right(trainer_of, monkeypatch):
    import torch

    from dpo_cli.training.forward import packed

    trainer = trainer_of()
    assert packed.enable(trainer) is None
    score = packed.score

    def off(states, *rest, metrics, **more):
        return score(states * (1 if metrics else 3), *rest, metrics=metrics, **more)

    monkeypatch.setattr(packed, "score", off)
    with pytest.raises(UserError, match="margins are 0: the packed forward is wrong for this model"):
        trainer.train()
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_tolerance_of_step_zero_is_a_setting(start, tmp_path, monkeypatch):
    from dpo_cli.stages import train
    from dpo_cli.training import dpo

    places = (f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}", "train.max_steps=1")
    config = settings(start, start / "base", *places, "gate.step_zero_tolerance=100")
    monkeypatch.setattr(dpo, "check_reference", lambda model, adapter: shift(model, "ref", 0.05))
    assert train.run(config, Silent()).step_zero.ok


def test_a_failed_step_zero_is_reported_and_no_result(start, tmp_path, monkeypatch):
    import json

    from dpo_cli.stages import train
    from dpo_cli.training import dpo

    config = settings(start, start / "base", f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}")
    monkeypatch.setattr(dpo, "check_reference", lambda model, adapter: shift(model, "ref", 0.05))
    with pytest.raises(UserError, match="step zero"):
        train.run(config, Silent())
    report = json.loads((tmp_path / "runs/dpo/report.json").read_text())
    assert report["verdict"] == "fail" and report["step_zero"]["ok"] is False
    assert not (tmp_path / "out").exists() and not list((tmp_path / "runs/dpo").glob("checkpoints/*"))


def test_the_reference_must_hold_the_sft_adapter(start, trainer_of):
    from dpo_cli.training.reference_check import check_reference

    trainer = trainer_of()
    check_reference(trainer.model, start / "sft")
    with pytest.raises(UserError, match="does not hold the SFT adapter's weights"):
        check_reference(trainer.model, start / "other")
    base_as_reference(trainer)
    with pytest.raises(UserError, match="not a frozen copy"):
        check_reference(trainer.model, start / "sft")


def test_loss_margin_and_kl_of_one_batch_by_hand(trainer_of):
    """Eq. 7 of arXiv:2305.18290, from plain forwards of one row at a time."""
    import torch

    trainer = trainer_of("train.beta=0.3")
    shift(trainer.model, "default", 0.1)
    rows = [trainer.eval_dataset[index] for index in range(2)]

    def log_probs(prompt, completion):
        logits = trainer.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[range(len(completion)), completion]

    from dpo_cli.training.dpo import reference_of

    losses, margins, k3 = [], [], []
    with torch.no_grad():
        for row in rows:
            rewards = []
            for side in ("chosen_ids", "rejected_ids"):
                policy = log_probs(row["prompt_ids"], row[side])
                with reference_of(trainer.model):
                    reference = log_probs(row["prompt_ids"], row[side])
                difference = policy - reference
                rewards.append(0.3 * difference.sum())
                k3 += (difference.exp() - 1 - difference).tolist()
            margins.append((rewards[0] - rewards[1]).item())
            losses.append(-torch.log(torch.sigmoid(rewards[0] - rewards[1])).item())
    evaluation = trainer.evaluate()
    assert abs(sum(margins)) > 0.01
    assert math.isclose(evaluation["eval_loss"], sum(losses) / 2, rel_tol=1e-5)
    logged = trainer.state.log_history[-1]
    assert math.isclose(logged["eval_rewards/margins"], sum(margins) / 2, rel_tol=1e-3)
    assert math.isclose(logged["eval_kl"], sum(k3) / len(k3), rel_tol=1e-3)
    assert math.isclose(logged["eval_rewards/margins_stderr"], abs(margins[0] - margins[1]) / 2, rel_tol=1e-3)


def test_kl_is_that_of_the_two_distributions(trainer_of):
    """KL is 0 for equal models; else what torch's own kl_div says on the same completions, always positive."""
    import torch

    from dpo_cli.training.dpo import reference_of
    from dpo_cli.training.kl import per_token as ratio

    trainer = trainer_of()
    trainer.model.eval()
    sampled_kl = trainer._sampled_kl()
    assert set(sampled_kl.measure()[1]) == {0.0}
    shift(trainer.model, "default", 0.02)
    completions, nats = sampled_kl.measure()
    (per_token, _), per_sequence = ratio(nats, completions), fmean(nats)
    assert completions == sampled_kl.measure()[0] and all(1 <= len(ids) <= 8 for ids in completions)
    total = 0.0
    with torch.no_grad():
        for prompt, completion in zip(trainer.kl_prompts, completions, strict=True):
            ids = torch.tensor([prompt + completion])
            where = slice(len(prompt) - 1, -1)
            policy = trainer.model(input_ids=ids).logits[0, where].log_softmax(-1)
            with reference_of(trainer.model):
                reference = trainer.model(input_ids=ids).logits[0, where].log_softmax(-1)
            total += torch.nn.functional.kl_div(reference, policy, reduction="sum", log_target=True).item()
    assert total > 0
    assert math.isclose(per_sequence, total / 2, rel_tol=1e-4)
    assert math.isclose(per_token, total / sum(map(len, completions)), rel_tol=1e-4)


def test_a_fresh_adapter_is_held_against_the_base(trainer_of):
    trainer = trainer_of("train.max_steps=2", "train.logging_steps=1", adapter=None)
    trainer.train()
    assert "ref" not in trainer.model.peft_config
    assert abs(trainer.state.log_history[0]["loss"] - math.log(2)) < 1e-6


def test_evaluation_draws_nothing_from_the_generator_of_training(trainer_of):
    import torch

    trainer = trainer_of()
    trainer.model.eval()
    before = torch.random.get_rng_state()
    trainer._sampled_kl().measure()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_sft_learns_the_completion_and_its_end_alone(start):
    from dpo_cli.training import sft
    from dpo_cli.training.trainer import load_encoder

    config = settings(start, start / "base")
    encoder = load_encoder(start / "base", config.model, 256)
    row = pair(1)
    [example] = sft.dataset(encoder.encode([(row["prompt"], [row["chosen"]])]).rows)
    learnt = [token for token in example["labels"] if token != IGNORED]
    assert encoder.tokenizer.decode(learnt) == row["chosen"][0]["content"] + "<|end|>"
    assert example["input_ids"][-len(learnt) :] == learnt and example["labels"][-len(learnt) :] == learnt


def test_the_libraries_keep_off_the_terminal(start, tmp_path, capfd):
    import logging
    import warnings

    from dpo_cli.stages import train

    config = settings(start, start / "base", f"runs={tmp_path / 'runs'}", f"model.dpo_adapter={tmp_path / 'out'}")
    config.train.max_steps = 1
    progress = Lines()
    capfd.readouterr()
    train.run(config, progress)
    assert capfd.readouterr() == ("", "")

    from dpo_cli.training.trainer import redirect_logs

    with redirect_logs(progress):
        logging.getLogger("trl.trainer").warning("a real\nwarning")
        warnings.warn("another one", stacklevel=1)
        warnings.warn("another one", stacklevel=1)
    assert progress.lines[-2:] == ["a real warning", "another one"]
