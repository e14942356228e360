"""The kept reference: right values, found by content, worth it, whole after a kill, never stale."""

import pytest
import torch
from packing import PAIRS, Packed, Plain, assert_equal, configuration, make, outcome
from training import Lines

from dpo_cli.data import jsonl
from dpo_cli.errors import UserError
from dpo_cli.training.forward import collator, packed, reference_cache

torch.set_num_threads(1)


def kept(folder, trainer=None, pairs=PAIRS, wanted=None, **arguments):
    """(trainer that has its reference prepared, what it said)."""
    trainer = trainer or make(Packed, folder / "run", configuration("Llama"), pairs, **arguments)
    assert packed.enable(trainer) is None
    said = Lines()
    reference_cache.keep_reference(trainer, folder / "reference", said, wanted)
    return trainer, said.lines[-1]


def forwards(trainer):
    """How often the base model has run, from now on."""
    count = []
    trainer.model.get_base_model().base_model.register_forward_hook(lambda *_: count.append(1))
    return count


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "aot", "sppo_hard"])
@pytest.mark.parametrize("arguments", [{}, {"ld_alpha": 0.5, "max_length": 14}], ids=str)
def test_a_kept_reference_comes_to_what_trls_live_one_does(tmp_path, loss, arguments):
    theirs = outcome(make(Plain, tmp_path, configuration("Llama"), loss_type=loss, **arguments))
    trainer, _ = kept(tmp_path, wanted=True, loss_type=loss, **arguments)
    count = forwards(trainer)
    assert_equal(outcome(trainer), theirs)
    assert len(count) == 2  # the policy's in training and in evaluation, the reference's in neither


def test_a_fresh_adapters_reference_is_the_base(tmp_path):
    def fresh(kind):
        trainer = make(kind, tmp_path, configuration("Llama"))
        trainer.model.delete_adapter("ref")
        return trainer

    theirs = outcome(fresh(Plain))
    trainer, _ = kept(tmp_path, fresh(Packed), wanted=True)
    assert_equal(outcome(trainer), theirs)


def test_only_rows_that_are_not_known_are_computed(tmp_path):
    kept(tmp_path, pairs=PAIRS[:3], wanted=True)
    [file] = (tmp_path / "reference").glob("*.jsonl")
    before = file.read_bytes()
    shuffled = [PAIRS[4], *PAIRS[2::-1]]
    trainer, said = kept(tmp_path, pairs=shuffled, wanted=True)
    assert "3 of 4 pairs are known" in said
    added = file.read_bytes().removeprefix(before)
    assert added.count(b"\n") == 2
    fresh, _ = kept(tmp_path / "other", pairs=shuffled, wanted=True)
    for key, log_probs in fresh.data_collator.reference.items():
        assert torch.allclose(trainer.data_collator.reference[key], log_probs, atol=1e-6)


def test_a_torn_line_is_computed_again(tmp_path):
    kept(tmp_path, wanted=True)
    [file] = (tmp_path / "reference").glob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    _, said = kept(tmp_path, wanted=True)
    assert f"{len(PAIRS) - 1} of {len(PAIRS)} pairs" in said
    assert sorted(set(file.read_bytes().splitlines())) == sorted(set(whole.splitlines()))


@pytest.mark.parametrize("fit", [3, 1, 0])
def test_where_memory_lacks_smaller_groups_come_to_the_same(tmp_path, monkeypatch, fit):
    whole, _ = kept(tmp_path / "whole", wanted=True)
    compute, sizes = reference_cache._compute, []

    def lacking(trainer, examples):
        if len(examples) > fit:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(examples))
        yield from compute(trainer, examples)

    monkeypatch.setattr(reference_cache, "_compute", lacking)
    if fit == 0:
        with pytest.raises(UserError, match="one pair"):
            kept(tmp_path, wanted=True)
        return
    trainer, _ = kept(tmp_path, wanted=True)
    assert max(sizes) <= fit and sum(sizes) == len(PAIRS)
    assert trainer.data_collator.reference.keys() == whole.data_collator.reference.keys()
    for key, log_probs in whole.data_collator.reference.items():
        assert torch.allclose(trainer.data_collator.reference[key], log_probs, atol=1e-6)


@pytest.mark.parametrize("change", ["weights", "adapter", "alpha", "precision", "rope"])
def test_another_reference_is_another_file(tmp_path, change):
    trainer = make(Packed, tmp_path, configuration("Llama"))
    before = reference_cache.content_key(trainer)
    with torch.no_grad():
        if change == "weights":
            trainer.model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[0, 0] += 1e-6
        elif change == "adapter":
            next(value for name, value in trainer.model.named_parameters() if ".ref." in name)[0, 0] += 1e-6
        elif change == "alpha":
            trainer.model.peft_config["ref"].lora_alpha *= 2
        elif change == "precision":
            trainer.args.bf16 = True
        else:
            trainer.model.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
    assert reference_cache.content_key(trainer) != before


def test_the_policy_is_no_part_of_the_reference(tmp_path):
    trainer = make(Packed, tmp_path, configuration("Llama"))
    before = reference_cache.content_key(trainer)
    with torch.no_grad():
        next(value for name, value in trainer.model.named_parameters() if ".default." in name).add_(1)
    assert reference_cache.content_key(trainer) == before


def test_where_a_completion_begins_is_part_of_a_row(tmp_path):
    assert collator.row_key([5, 6, 7], 2) != collator.row_key([5, 6, 7], 1)
    assert collator.row_key([5, 6, 7], 2) != collator.row_key([5, 6, 8], 2)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("most", [None, 4, 14])
def test_a_rows_key_is_that_of_the_collated_row(tmp_path, most, mode):
    made = collator.PairCollator(0, most, mode, pack=False)
    keys = [reference_cache._keys(made, pair) for pair in PAIRS]
    collated = collator.row_keys(made(PAIRS))
    assert keys == list(zip(collated[: len(PAIRS)], collated[len(PAIRS) :], strict=True))


def test_values_that_this_reference_does_not_compute_are_refused(tmp_path):
    trainer, _ = kept(tmp_path, wanted=True)
    [file] = (tmp_path / "reference").glob("*.jsonl")
    values = trainer.data_collator.reference.items()
    jsonl.write_rows(file, [reference_cache.Known(key, (value + 0.1).numpy().tobytes()) for key, value in values])
    with pytest.raises(UserError, match="does not hold what this reference computes"):
        kept(tmp_path, wanted=True)


@pytest.mark.parametrize(
    ("arguments", "choice"),
    [
        ({"max_steps": 1, "eval_strategy": "no"}, "live"),
        ({"max_steps": -1, "num_train_epochs": 1}, "live"),
        ({"max_steps": -1, "num_train_epochs": 3}, "kept for train (3 passes);"),
        ({"max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}, "live"),
        (
            {"max_steps": 4, "per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 2},
            "kept for eval (2 passes);",
        ),
        ({"max_steps": 9, "eval_strategy": "steps", "eval_steps": 3}, "kept for train (9 passes) and eval (3 passes);"),
    ],
    ids=str,
)  # fmt: skip
def test_it_is_kept_where_that_saves_work(tmp_path, arguments, choice):
    _, said = kept(tmp_path, **arguments)
    assert choice in said


def test_it_is_not_kept_for_a_forward_that_is_trls(tmp_path):
    trainer = make(Packed, tmp_path, configuration("Granite", logits_scaling=8.0), max_steps=5)
    assert packed.enable(trainer) is not None
    said = Lines()
    reference_cache.keep_reference(trainer, tmp_path / "reference", said)
    assert "live" in said.lines[0] and not (tmp_path / "reference").exists()
