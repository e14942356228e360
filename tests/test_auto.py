"""`train --auto`: what it costs, what it decides by, that it goes on exactly, and that its winner is a plain run."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from training import AtStep, config_of, exit_code_of, kill_this_process, metrics

from dpo_cli.config.settings import Config
from dpo_cli.errors import UserError
from dpo_cli.html import sweep as page
from dpo_cli.progress import Silent
from dpo_cli.stages import train
from dpo_cli.training import outcome
from dpo_cli.training.run_history import Trained
from dpo_cli.workflows import auto, sweep


@pytest.mark.parametrize("steps", [8, 9, 15, 16, 33, 58, 173, 1000])
def test_a_search_costs_at_most_two_and_a_half_runs(steps):
    config = Config()
    config.train.max_steps = steps
    found = auto.planned(config, 1000)
    unit = steps // 8
    assert found.all_steps == 6 * 2 * unit + 2 * 2 * unit + steps - 4 * unit
    assert found.runs <= 2.5 and f"{found.all_steps:,} steps in all" in auto.said(found)


def test_too_few_steps_are_refused():
    config = Config()
    config.train.max_steps = 7
    with pytest.raises(UserError, match="too few to search"):
        auto.planned(config, 1000)


def test_the_rates_are_around_what_the_plan_takes_and_hold_ones_own():
    config = Config()
    assert auto.rates(config) == [5e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3]  # 5e-6 is the default, in place of 3e-6
    config.train.beta, config.train.learning_rate = 1.0, 1.0
    assert auto.rates(config) == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def measured(margin: float, error: float = 0.0, kl: float = 0.01) -> Trained:
    """A run with such an evaluation."""
    result = Trained(stage="dpo", run="", adapter="", rows=1, held_out=14, steps=1)
    result.metrics = {"eval_rewards/margins": margin, "eval_rewards/margins_stderr": error, "eval_beta": 0.5,
                      "eval_kl_nats_per_token": kl}  # fmt: skip
    return result


def test_a_rate_is_worth_the_lower_bound_of_its_margin_over_beta_within_the_kl_limit():
    config = Config()
    assert auto.worth_of(measured(0.3, 0.05, kl=0.1), config) == pytest.approx((0.3 - 2.16 * 0.05) / 0.5, abs=1e-3)
    assert auto.worth_of(measured(0.3, 0.05, kl=0.11), config) is None
    assert auto.worth_of(measured(math.nan), config) is None
    assert auto.worth_of(measured(0.1, 0.05), config) == pytest.approx(2 - 2.16, abs=1e-3)  # standard errors


@pytest.mark.parametrize(
    ("evaluations", "kept"),
    [
        # SmolLM2 after 2 and 4 of 19 steps: nothing is shown yet; by the bounds alone 3e-6 or 5e-5 would be first.
        ({"3e-6": (0.0027, 0.0057), "5e-5": (0.0074, 0.006), "1e-4": (0.0069, 0.0051), "3e-4": (0.019, 0.0135),
          "1e-3": (0.0564, 0.045), "1e-2": (0.3, 0.1, 0.7)}, ["3e-4", "1e-4"]),
        ({"3e-6": (0.0013, 0.0036), "5e-5": (0.0204, 0.0101), "1e-4": (0.038, 0.02), "3e-4": (0.0932, 0.064),
          "1e-3": (0.0564, 0.045)}, ["5e-5", "1e-4"]),
        # What is shown goes first, and of that the most.
        ({"5e-5": (0.07, 0.02), "1e-4": (0.14, 0.04), "3e-4": (0.2, 0.11)}, ["1e-4", "5e-5"]),
    ],
)  # fmt: skip
def test_what_is_nearest_to_being_shown_goes_on(evaluations, kept):
    results = {key: measured(*found) for key, found in evaluations.items()}
    assert auto._decide(results, dict.fromkeys(results, 0.0), 2, 2, Config()).kept == kept


def test_a_paused_run_is_what_its_best_evaluation_within_the_limit_says():
    """Else a rate would go for going too far, whose best checkpoint is the best of all."""
    evaluations = [(1, 0.1, 0.02), (2, 0.5, 0.09), (3, 0.9, 0.3), (4, 0.2, 0.05)]
    history = [
        {"step": step, "eval_loss": 0.6, "eval_rewards/margins": margin, "eval_kl_nats_per_token": kl,
         "eval_pairs_correct": 10}
        for step, margin, kl in evaluations
    ]  # fmt: skip
    folder = SimpleNamespace(
        trainer_state=lambda: {"log_history": history},
        last_event=lambda name: {"held_out": 14} if name == "encoded" else None,
    )
    margins = {}
    for step, *_ in evaluations:
        result = Trained(stage="dpo", run="", adapter="", rows=1, held_out=14, steps=8)
        paused = outcome.paused(result, folder, Config(), step)
        assert paused.step == step
        margins[step] = paused.metrics["eval_rewards/margins"]
    assert margins == {1: 0.1, 2: 0.5, 3: 0.5, 4: 0.5}


@pytest.fixture(scope="module")
def searched(start, tmp_path_factory):
    """A search of eight steps, from its beginning to its end."""
    folder = tmp_path_factory.mktemp("auto")
    config = config_of(start, folder)
    return folder, config, auto.run(config, Silent())


def test_six_rates_go_a_quarter_two_the_half_and_one_to_the_end(searched):
    folder, _, found = searched
    assert sorted(point.step for point in found.points) == [2, 2, 2, 2, 4, 8]
    [best] = [point for point in found.points if point.value == found.best]
    assert best.step == 8 and best.verdict is not None
    assert [point.verdict for point in found.points if point is not best] == [None] * 5
    rounds = json.loads((folder / "runs" / "dpo-auto.json").read_text())["rounds"]
    assert [len(one["kept"]) for one in rounds] == [2, 1]
    for one in rounds:
        kept = [one["worth"][key] for key in one["kept"]]
        assert kept == sorted(one["worth"].values(), reverse=True)[: len(kept)]
    published, own = (folder / name / "adapter_model.safetensors" for name in ("out", f"out-auto-{best.value:g}"))
    assert published.read_bytes() == own.read_bytes()
    text = page(found, sweep.runs_of(found))
    assert "Search for the learning rate" in text and text.count("stopped at step") == 5


def test_the_winner_is_the_run_that_train_alone_would_make(searched, tmp_path, start):
    _, _, found = searched
    plain = config_of(start, tmp_path, f"train.learning_rate={found.best}", "train.eval_steps=1", "train.save_steps=1",
                      "train.logging_steps=1", "train.keep_reference=true")  # fmt: skip
    result = train.run(plain, Silent())
    [best] = [point for point in found.points if point.value == found.best]
    assert result.policy_sha256 == json.loads((Path(best.run) / "report.json").read_text())["policy_sha256"]
    assert metrics(tmp_path / "runs" / "dpo") == metrics(searched[0] / "runs" / f"dpo-auto-{found.best:g}")


def test_a_killed_search_goes_on_and_decides_the_same(searched, tmp_path, start):
    config = config_of(start, tmp_path)
    code = exit_code_of(lambda: auto.run(config, AtStep(3, kill_this_process)))
    assert code == -9
    again = auto.run(config, Silent())
    assert again.best == searched[2].best
    first, second = (json.loads((folder / "runs" / "dpo-auto.json").read_text()) for folder in (searched[0], tmp_path))
    assert first == second


def test_without_held_out_pairs_there_is_nothing_to_decide_by(start, tmp_path):
    shutil.copytree(start / "data", tmp_path / "data")
    (tmp_path / "data" / "val.jsonl").unlink()
    with pytest.raises(UserError, match="needs held-out pairs"):
        auto.run(config_of(start, tmp_path, f"data={tmp_path / 'data'}"), Silent())
