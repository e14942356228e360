"""Gates know noise: three verdicts, further rows, a policy that has not moved; each number worked by hand."""

import math
import random
from statistics import mean, stdev

import pytest
from training import config_of, metrics

from dpo_cli.config.presets import NOTES, PRESETS
from dpo_cli.config.resolve import resolve
from dpo_cli.config.settings import Config, TrainSection
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.statistics import Interval, of_mean, proportion, student
from dpo_cli.training import gates, plan
from dpo_cli.training.guards import KL, LN2, MARGIN, best_step


def evaluation(margin=0.2, margin_error=0.05, loss=0.6, loss_error=0.02, correct=70, kl=0.03, kl_error=0.005):
    errors = {"eval_loss_stderr": loss_error, f"{MARGIN}_stderr": margin_error, f"{KL}_stderr": kl_error}
    return {"step": 10, "eval_loss": loss, MARGIN: margin, "eval_pairs_correct": correct, KL: kl, **errors}


def checked(row, pairs=100, **sets):
    config = Config()
    for key, value in sets.items():
        setattr(config.gate, key, value)
    return gates.check_gates("dpo", [{"step": 1, "loss": LN2}, row], config, pairs)


def test_a_clear_effect_passes_every_gate():
    found = checked(evaluation())
    assert {name: gate.verdict for name, gate in found.items()} == {
        "held_out_loss": "pass", "held_out_margin": "pass", "held_out_accuracy": "pass", "kl_nats_per_token": "pass",
    }  # fmt: skip
    assert gates.worst(gate.verdict for gate in found.values()) == "pass" and gates.open_gates(found) == []


def test_an_effect_within_its_noise_is_not_shown_and_says_how_many_pairs_would_show_it():
    found = checked(evaluation(margin=0.05, margin_error=0.05, loss=0.67, loss_error=0.02, correct=55))
    assert gates.worst(gate.verdict for gate in found.values()) == "not shown"
    # z(0.55) = 0.05 / sqrt(0.25 / n) reaches 1.96 at n = 384.1; Wilson's interval is that test turned round.
    assert found["held_out_accuracy"].more == pytest.approx(384 - 100, abs=1)
    # t(99) = 1.984: 100 * (1.984 * 0.05 / 0.05)² = 393.7
    assert found["held_out_margin"].more == 394 - 100
    text = gates.describe("held_out_margin", found["held_out_margin"])
    assert (
        text.startswith("held_out_margin: not shown (0.05 [-0.04921, 0.1492], limit 0)") and "294 more held-out" in text
    )


def of_nothing(draw, step, pairs=200):
    """An evaluation of a policy that prefers nothing: each pair's margin is a toss."""
    tosses = [draw.gauss(0, 1) for _ in range(pairs)]
    row = evaluation(margin=mean(tosses), margin_error=stdev(tosses) / math.sqrt(pairs))
    return row | {"step": step}


def test_the_best_of_many_evaluations_without_an_effect_shows_none():
    """The pairs that choose a checkpoint also judge it: of eight tries at nothing, one in six would look like it."""
    draw, passed = random.Random(0), {1: 0, 8: 0}
    for _ in range(300):
        rows = [of_nothing(draw, step) for step in range(1, 9)]
        best = rows[best_step(range(1, 9), rows, MARGIN, 1, 0.1) - 1]
        for best_of in passed:
            found = gates.check_gates("dpo", [best], Config(), 200, best_of)
            passed[best_of] += found["held_out_margin"].ok is True
    assert passed[1] > 40 and passed[8] <= 0.025 * 300 + 6


def test_so_many_pairs_do_show_it():
    """The number that is promised, tried: with as many pairs the same share is above one half."""
    found = gates.compared(proportion(55, 100), 0.5)
    n = 100 + found.more
    assert gates.compared(proportion(math.ceil(0.55 * n), n), 0.5).ok


def test_a_harm_fails_and_asks_for_no_more_pairs():
    found = checked(evaluation(margin=-0.2, loss=0.8, correct=30))
    assert {gate.verdict for name, gate in found.items() if name != "kl_nats_per_token"} == {"fail"}
    assert all(gate.more is None for gate in found.values())


@pytest.mark.parametrize(("confidence", "verdict"), [(0.9, "pass"), (0.95, "not shown")])
def test_the_level_is_a_setting(confidence, verdict):
    found = checked(evaluation(margin=0.09, margin_error=0.05), confidence=confidence)
    assert found["held_out_margin"].verdict == verdict


def test_the_kl_limit_is_compared_with_the_value_as_the_guards_do():
    assert checked(evaluation(kl=0.1, kl_error=0.05))["kl_nats_per_token"].ok
    assert not checked(evaluation(kl=0.11, kl_error=0.05))["kl_nats_per_token"].ok


def test_one_held_out_pair_shows_nothing_and_no_interval_is_written_that_is_none():
    row = evaluation(correct=1)
    del row[f"{MARGIN}_stderr"]
    found = checked(row, pairs=1)
    assert found["held_out_margin"].ok is None and found["held_out_accuracy"].ok is None
    text = gates.describe("held_out_margin", found["held_out_margin"])
    assert text == "held_out_margin: not shown (0.2, limit 0)"


def test_without_held_out_pairs_the_last_training_losses_are_compared():
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([LN2, 0.60, 0.62, 0.58, 0.61, 0.59])]
    found = gates.check_gates("dpo", rows, Config(), 0)
    assert found["loss"].verdict == "pass" and found["loss"].interval[1] == pytest.approx(
        0.60 + 2.73 * 0.00707, abs=1e-3
    )
    noisy = [{"step": step, "loss": loss} for step, loss in enumerate([LN2, 0.69, 0.70, 0.68])]
    assert gates.check_gates("dpo", noisy, Config(), 0)["loss"].verdict == "not shown"
    assert gates.check_gates("dpo", noisy[:1], Config(), 0)["loss"].verdict == "not shown"


# What the preset rank1 gave on a tiny model: it was called a pass once.
UNMOVED = evaluation(
    margin=1.1e-6, margin_error=1.8e-5, loss=LN2 - 1e-6, loss_error=9e-6, correct=46, kl=3e-9, kl_error=1e-9
)


def test_a_policy_that_has_not_moved_is_called_so_with_what_to_raise_and_to_what():
    found = checked(UNMOVED)
    assert gates.worst(gate.verdict for gate in found.values()) == "not shown"
    assert not gates.has_moved(found) and gates.has_moved(checked(evaluation()))
    assert not gates.has_moved(checked(evaluation(margin=1e-3, margin_error=1e-4, kl=1e-5)))  # clear, and in no text
    said = gates.why_unmoved(found, TrainSection(learning_rate=5e-7), 100, 0.1)
    assert "has not moved" in said and "raise train.learning_rate from 5e-07 to 0.0001" in said
    at_the_top = gates.why_unmoved(found, TrainSection(learning_rate=1e-4), 100, 0.1)
    assert "raise train.num_train_epochs from 1 to 4" in at_the_top
    warming = gates.why_unmoved(found, TrainSection(warmup_steps=200), 100, 0.1)
    assert "warmup takes 200 of 100 steps: set train.warmup_ratio = 0.1" in warming


def test_a_rate_is_advised_that_aims_at_a_quarter_of_the_limit():
    found = checked(evaluation(margin=0.001, margin_error=0.01, kl=2.5e-4, kl_error=3e-4))
    # KL goes with the square of the rate: sqrt(0.025 / 2.5e-4) = 10 times.
    assert "from 2e-06 to 2e-05" in gates.why_unmoved(found, TrainSection(learning_rate=2e-6), 100, 0.1)


def test_students_quantile():
    for n, exact in ((5, 2.776), (10, 2.262), (30, 2.045), (1000, 1.962)):
        assert student(n) == pytest.approx(exact, rel=0.02)
    assert of_mean(1.0, 0.5, 1000).high == pytest.approx(1.981, abs=1e-3)
    assert Interval(0.5, 0.4, 0.6).holds(0.6)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_plan_takes_the_warmup_of_every_preset(preset):
    section = resolve(preset=preset, environment={}).config.train
    steps = plan.steps(section, 919)
    assert plan.warmup_steps(section, steps) <= plan.WARMUP_SHARE * steps
    assert len(NOTES[preset]) > 20


def test_presets_keep_the_guides_numbers():
    careful, full = (resolve(preset=name, environment={}).config.train for name in ("conservative", "full"))
    assert (careful.eval_steps, careful.save_steps, careful.max_length, careful.learning_rate) == (100, 100, 1024, 1e-6)
    assert (careful.num_train_epochs, careful.steps_at_most, careful.weight_decay) == (3, 1000, 0.01)
    assert plan.warmup_steps(careful, 1000) == 100  # the guide's, at the guide's length
    assert (full.max_length, full.learning_rate, full.weight_decay) == (1024, 5e-7, 0.01)


def test_the_error_of_kl_a_token_by_hand():
    from dpo_cli.training.kl import per_token

    # Ratio of means: 0.4 / 4; residuals 0.1 - 0.1 * 2 and 0.3 - 0.1 * 2; sqrt(2 / 1 * 0.02) / 4 = 0.05.
    assert per_token([0.1, 0.3], [[1, 2], [3, 4]]) == (pytest.approx(0.1), pytest.approx(0.05))
    assert per_token([0.1], [[1, 2]]) == (0.05, None)


@pytest.mark.parametrize(
    ("sets", "peak_by"), [([], 1), (["train.warmup_ratio=0.5"], 5), (["train.warmup_ratio=0.8"], 8)]
)
def test_the_rate_reaches_its_peak_within_the_run(start, tmp_path, sets, peak_by):
    """Warmup that is longer than the run would leave it below; it is a tenth of the steps where nothing is set."""
    few = ["train.max_steps=10", "train.logging_steps=1", "train.eval_steps=100", "train.save_steps=100",
           "train.warmup_steps=none", "train.kl_prompts=0"]  # fmt: skip
    config = config_of(start, tmp_path, *few, *sets)
    train.run(config, Silent())
    rates = {row["step"]: row["learning_rate"] for row in metrics(tmp_path / "runs" / "dpo") if "learning_rate" in row}
    # A log holds the rate of the step after it.
    assert max(rates.values()) == pytest.approx(config.train.learning_rate, rel=1e-6)
    assert max(rates, key=lambda step: rates[step]) in (peak_by - 1, peak_by, peak_by + 1)
