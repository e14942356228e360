"""Losses of pairs: against TRL's own where TRL has them, by hand where it has not; what reaches them from a file."""

import math

import pytest
from adapters import base_model, save_adapter
from training import Lines, config_of, pair, settings, write_rows

from dpo_cli.data import jsonl
from dpo_cli.errors import UserError
from dpo_cli.training.run_folder import RunFolder

GAPS = (1.0, 4.0, 2.0, 1.0)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("start")
    save_adapter(folder / "sft", base_model(folder / "base"))
    return folder


@pytest.fixture
def loss_of(start, tmp_path):
    """(trainer, batch) for these settings, the policy moved away from the reference; and TRL's loss of the batch."""
    import torch
    from peft import PeftModel
    from trl import DPOConfig

    from dpo_cli.training import dpo, losses
    from dpo_cli.training.arguments import arguments
    from dpo_cli.training.forward import packed
    from dpo_cli.training.trainer import load_base, load_encoder

    with jsonl.Journal(tmp_path / "events.jsonl") as events:

        def make(*sets, gaps=GAPS, weights=(1.0,) * 4, pack=True):
            config = settings(start, start / "base", *sets)
            encoder = load_encoder(start / "base", config.model, 256)
            pairs = [pair(number) for number in range(4)]
            rows = encoder.encode([(row["prompt"], [row["chosen"], row["rejected"]]) for row in pairs]).rows
            for row, gap, weight in zip(rows, gaps, weights, strict=True):
                row.gap, row.weight, row.scores = gap, weight, None if gap is None else (gap, 0.0)
            ours = losses.make(config.train, rows)
            dataset = dpo._dataset(rows, losses.PairLoss(config.train, 0.0, rows) if ours is None else ours)
            model = PeftModel.from_pretrained(load_base(start / "base", config.train), start / "sft", is_trainable=True)
            asked = arguments(config.train, RunFolder(tmp_path), False, *dpo.BEST)
            trainer = dpo.DpoTrainer(
                events=events, kl_prompts=[], kl_tokens=8, model=model, pair_loss=ours,
                args=DPOConfig(**asked, **losses.trl_settings(config.train)),
                train_dataset=dataset, processing_class=encoder.tokenizer,
            )  # fmt: skip
            trainer.step_zero_checked = True
            assert packed.enable(trainer) is None or not pack
            with torch.no_grad():
                for name, value in trainer.model.named_parameters():
                    if ".default." in name and "lora_B" in name:
                        value += 0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
            trainer.model.train()

            def loss():
                return trainer._compute_loss(trainer.model, trainer.data_collator(list(dataset)), False)

            return trainer, loss, losses.PairLoss(config.train, 0.0, rows)

        yield make


def gradient(trainer, loss):
    import torch

    weights = [value for value in trainer.model.parameters() if value.requires_grad]
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])


@pytest.mark.parametrize(
    "sets",
    [
        *([f"train.loss_type={name}", "train.label_smoothing=0.1"] for name in
          ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "sft")),
        ['train.loss_type=["sigmoid", "sft"]', "train.loss_weights=[1, 0.25]"],
        ["train.ld_alpha=0.3"],
        ["train.loss_type=sigmoid_norm", "train.ld_alpha=0.5", "train.beta=2"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_without_scores_the_losses_are_trls(loss_of, sets):
    import torch

    trainer, loss, ours = loss_of(*sets)
    theirs = loss()
    expected = gradient(trainer, theirs)
    trainer.pair_loss = ours
    mine = loss()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert torch.allclose(gradient(trainer, mine), expected, rtol=1e-4, atol=1e-7) and expected.abs().max() > 1e-3


def margins(trainer):
    """Reward margin of each pair, as TRL measures it."""
    found = []
    for row in trainer.train_dataset:
        trainer._compute_loss(trainer.model, trainer.data_collator([row]), False)
        found.append(float(trainer._metrics["train"]["rewards/margins"][-1]))
    return found


def log_sigmoid(value):
    return -math.log1p(math.exp(-value))


SCORES = "train.gap_by=score"


def test_a_score_gap_offsets_the_margin(loss_of):
    """ODPO, Eq. 6 of arXiv:2402.10571; a gap counts in units of the mean gap, which is 2."""
    trainer, loss, _ = loss_of("train.offset_alpha=0.5", SCORES)
    by_hand = [-log_sigmoid(margin - 0.5 * gap / 2) for margin, gap in zip(margins(trainer), GAPS, strict=True)]
    assert loss().item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_rebel_is_the_squared_distance_from_the_gap(loss_of):
    """Eq. 3 of arXiv:2404.16767."""
    trainer, loss, _ = loss_of("train.loss_type=rebel", SCORES)
    by_hand = [(margin - gap / 2) ** 2 for margin, gap in zip(margins(trainer), GAPS, strict=True)]
    assert loss().item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


def test_a_gap_can_be_of_places(loss_of):
    """Eight completions score 0 0 0 0 1 1 2 4: a 0 is above none and beside four, so its place is 2/8, and so on."""
    trainer, loss, _ = loss_of("train.loss_type=rebel", "train.gap_by=rank")
    place = {0.0: 2 / 8, 1.0: 5 / 8, 2.0: 6.5 / 8, 4.0: 7.5 / 8}
    gaps = [place[gap] - place[0.0] for gap in GAPS]
    by_hand = [(margin - gap / (sum(gaps) / 4)) ** 2 for margin, gap in zip(margins(trainer), gaps, strict=True)]
    assert loss().item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)


@pytest.mark.parametrize("budget", [None, 200], ids=["whole", "divided"])
def test_a_pair_counts_what_its_weight_says(loss_of, budget):
    """Weights 1, 2, 3, 2 have a mean of 2; also where a batch is divided."""
    from dpo_cli.training.forward.collator import micro_batches

    trainer, loss, _ = loss_of(weights=(1.0, 2.0, 3.0, 2.0))
    by_hand = [-weight / 2 * log_sigmoid(margin) for margin, weight in zip(margins(trainer), (1, 2, 3, 2), strict=True)]
    assert len({round(value, 4) for value in by_hand}) == 4
    if budget is None:
        assert loss().item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)
        return
    trainer.data_collator.tokens_per_batch = budget
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(micro_batches(batch)) > 1
    parts = []
    for trainer._share, part in micro_batches(batch):
        parts.append(trainer.compute_loss(trainer.model, part).item())
    assert sum(parts) == pytest.approx(sum(by_hand) / 4, rel=1e-5)


@pytest.mark.parametrize(
    ("sets", "given", "message"),
    [
        (["train.loss_weights=[1, 2]"], {}, "2 weights for 1 losses"),
        (["train.loss_type=[]"], {}, "one of sigmoid, hinge"),
        (["train.offset_alpha=1", SCORES], {"gaps": (1.0, None, 2.0, None)}, "2 of 4 pairs have no score_gap"),
        (["train.offset_alpha=1"], {"gaps": (1.0, None, 2.0, None)}, "2 of 4 pairs have no chosen_score"),
        (["train.loss_type=rebel"], {"gaps": (0.0,) * 4}, "mean gap is not above 0"),
        (["train.loss_type=rebel", "train.offset_alpha=0"], {}, "rebel needs scores"),
        (["train.loss_type=ipo", "train.offset_alpha=1"], {}, "ipo takes no offset"),
        (["train.loss_type=apo_zero"], {"weights": (1.0, 2.0, 1.0, 1.0)}, "apo_zero does not take pairs with weights"),
        (["train.use_weighting=true", "train.offset_alpha=1"], {}, "WPO weights"),
    ],
)
def test_what_does_not_go_together_is_refused(loss_of, sets, given, message):
    with pytest.raises(UserError, match=message):
        loss_of(*sets, **given)


def test_weights_and_gaps_of_a_file_reach_the_loss(start, tmp_path):
    """By way of the stage: the first loss is that of the offsets alone, and step zero is not taken for wrong."""
    from dpo_cli.stages import train

    rows = [pair(number) | {"score_gap": float(1 + number % 3), "weight": 1.0 + number % 2} for number in range(8)]
    data = tmp_path / "data"
    write_rows(data / "train.jsonl", rows)
    write_rows(data / "val.jsonl", [pair(number) | {"score_gap": 2.0, "weight": 1.0} for number in range(20, 23)])
    config = config_of(
        start, tmp_path, f"data={data}", "train.offset_alpha=0.8", "train.max_steps=1", SCORES,
        "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1",
    )  # fmt: skip
    result = train.run(config, Lines())
    mean_gap, mean_weight = (sum(row[key] for row in rows) / 8 for key in ("score_gap", "weight"))
    by_hand = [-row["weight"] / mean_weight * log_sigmoid(-0.8 * row["score_gap"] / mean_gap) for row in rows]
    assert result.step_zero.ok
    assert result.step_zero.loss == pytest.approx(sum(by_hand) / 8, rel=1e-5)
    assert result.step_zero.loss != pytest.approx(math.log(2), abs=0.05)
