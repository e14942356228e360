"""The guards' decisions from rows of numbers, and the state that carries them."""

import math

import pytest

from dpo_cli.config.settings import GateSection
from dpo_cli.training import guards
from dpo_cli.training.guards import GuardState
from dpo_cli.training.run_folder import RunFolder


def evaluation(step, margin=0.1, kl=0.01, **more):
    return {"step": step, "eval_loss": 0.6, "eval_rewards/margins": margin, guards.KL: kl, "eval_beta": 0.1} | more


def actions(found):
    return [(finding.fault, finding.action) for finding in found]


def test_each_violation_of_the_kl_limit_takes_the_next_action_then_the_run_ends():
    gate = GateSection(kl_actions=["raise_beta", "halve_lr", "rollback"])
    state = GuardState()
    taken = []
    for step in (25, 50, 75, 100):
        taken += actions(guards.after_evaluation(state, [evaluation(step, kl=0.2)], gate, 0.1))
    assert taken == [("kl_limit", action) for action in ("raise_beta", "halve_lr", "rollback", "stop")]
    assert (state.beta, state.lr_scale, state.ended) == (0.2, 0.25, "kl_limit")


def test_at_the_limit_nothing_happens_and_a_kl_that_is_no_number_counts_as_over_it():
    state = GuardState()
    assert guards.after_evaluation(state, [evaluation(25, kl=0.1)], GateSection(), 0.1) == []
    assert actions(guards.after_evaluation(state, [evaluation(50, kl=math.nan)], GateSection(), 0.1)) == [
        ("kl_limit", "halve_lr")
    ]


@pytest.mark.parametrize(("kl", "beta"), [(0.06, 0.11), (0.05, 0.1), (0.025, 0.1), (0.02, 0.09)])
def test_adaptive_beta_moves_by_a_tenth_outside_of_half_the_target_to_the_target(kl, beta):
    state = GuardState()
    guards.after_evaluation(state, [evaluation(25, kl=kl)], GateSection(adaptive_beta=True, kl_target=0.05), 0.1)
    assert math.isclose(state.beta or 0.1, beta)


def test_adaptive_beta_stays_within_a_factor_of_ten():
    assert guards.adapt_beta(0.99, 1.0, 0.05, 0.1) == 1.0
    assert guards.adapt_beta(0.0105, 0.0, 0.05, 0.1) == 0.01


def test_the_run_ends_once_margins_have_not_risen_for_patience_evaluations():
    gate = GateSection(patience=2)
    margins = [0.1, 0.3, 0.2, 0.3]
    for count in range(1, 4):
        state = GuardState()
        guards.after_evaluation(state, [evaluation(i, margin=m) for i, m in enumerate(margins[:count])], gate, 0.1)
        assert state.ended is None
    guards.after_evaluation(state, [evaluation(i, margin=m) for i, m in enumerate(margins)], gate, 0.1)
    assert state.ended == "margin_stalls"


def test_margins_under_different_betas_are_compared_per_beta():
    rows = [evaluation(1, margin=0.3), evaluation(2, margin=0.4, eval_beta=0.2)]
    assert guards.best_step([1, 2], rows, guards.MARGIN, 1, 0.1) == 1


def test_symptoms_are_named_once():
    row = {"eval_rewards/chosen": -0.5, "eval_rewards/rejected": -0.9}
    state = GuardState()
    found = guards.after_evaluation(state, [evaluation(25, **row)], GateSection(), 0.1)
    assert actions(found) == [("one_sided", "warn")] and math.isclose(found[0].details["chosen_nats"], -5)
    assert guards.after_evaluation(state, [evaluation(50, **row)], GateSection(), 0.1) == []
    falling = {"eval_rewards/chosen": -0.5, "eval_rewards/rejected": 0.2}
    longer = {"eval_sampled_tokens": 31.0, "eval_reference_sampled_tokens": 20.0}
    found = guards.after_evaluation(GuardState(), [evaluation(25, **falling, **longer)], GateSection(), 0.1)
    assert actions(found) == [("chosen_falls", "warn"), ("length_drift", "warn")]
    calm = {"eval_sampled_tokens": 25.0, "eval_reference_sampled_tokens": 20.0, "eval_rewards/chosen": -0.09}
    assert guards.after_evaluation(GuardState(), [evaluation(25, **calm)], GateSection(), 0.1) == []


def test_a_loss_spike_is_one_against_recent_losses_and_above_ln_2():
    def logs(*losses):
        return actions(guards.after_log(GuardState(), [{"loss": loss} for loss in losses], GateSection()))

    assert logs(0.6, 0.5, 0.9) == [("loss_spike", "warn")]
    assert logs(0.2, 0.1, 0.3) == [] and logs(0.6, 0.5, 0.8) == [] and logs(0.5, 0.9) == []


def test_where_nothing_is_held_out_the_training_rows_show_the_symptoms():
    row = {"loss": 0.6, "rewards/chosen": -0.5, "rewards/rejected": -0.9}
    assert actions(guards.after_log(GuardState(), [row], GateSection(), 0.1)) == [("one_sided", "warn")]
    assert guards.after_log(GuardState(), [row], GateSection(), 1.0) == [], "half a nat is no news"
    assert guards.after_log(GuardState(), [evaluation(1), row], GateSection(), 0.1) == [], "the held-out rows decide"


@pytest.mark.parametrize(
    ("setting", "value", "fault"),
    [("loss_spike", 2.0, "loss_spike"), ("chosen_falls", 6.0, "chosen_falls"), ("length_drift", 2.0, "length_drift")],
)
def test_each_limit_is_a_setting(setting, value, fault):
    def found(gate):
        rows = [{"loss": loss} for loss in (0.6, 0.5, 0.9)]
        more = {"eval_rewards/chosen": -0.5, "eval_sampled_tokens": 31.0, "eval_reference_sampled_tokens": 20.0}
        seen = guards.after_log(GuardState(), rows, gate) + guards.after_evaluation(
            GuardState(), [evaluation(25, **more)], gate, 0.1
        )
        return {finding.fault for finding in seen}

    assert found(GateSection()) - found(GateSection(**{setting: value})) == {fault}


def test_a_loss_that_is_no_number_rolls_back_once_and_then_ends_the_run():
    state = GuardState()
    finding = guards.after_nan(state, GateSection())
    assert finding.action == "rollback" and math.isclose(state.lr_scale, 0.1) and state.ended is None
    assert guards.after_nan(state, GateSection()).action == "stop" and state.ended == "nan"
    assert guards.after_nan(GuardState(), GateSection(nan_rollbacks=0)).action == "stop"


@pytest.mark.parametrize(("before", "after"), [((4, 4), (2, 8)), ((6, 1), (3, 2)), ((3, 4), (1, 12)), ((1, 16), None)])
def test_a_smaller_batch_makes_the_same_step(before, after):
    assert guards.smaller_batch(*before) == after


def test_the_best_checkpoint_is_the_best_margin_within_the_kl_limit_else_the_least_kl():
    rows = [evaluation(1, 0.1), evaluation(2, 0.2), evaluation(3, 0.9, kl=0.5), evaluation(4, 0.8, kl=0.2)]
    assert guards.best_step([1, 2, 3, 4], rows, guards.MARGIN, 1, 0.1) == 2
    assert guards.best_step([3, 4], rows, guards.MARGIN, 1, 0.1) == 4
    assert guards.best_step([5, 7], rows, guards.MARGIN, 1, 0.1) == 7
    broken = [evaluation(1, 0.1), evaluation(2, math.nan, eval_loss=math.nan)]
    assert guards.best_step([1, 2], broken, guards.MARGIN, 1, 0.1) == 1


def test_the_last_good_checkpoint_is_judged_by_its_next_evaluation():
    rows = [evaluation(10), evaluation(20), evaluation(30, kl=0.5)]
    assert guards.last_good([8, 12, 24], rows, 0.1) == 12
    assert guards.last_good([20, 24], rows, 0.1) == 20  # by its own evaluation
    assert guards.last_good([24, 30], rows, 0.1) is None


def test_the_state_of_a_rollback_wins_until_the_next_checkpoint(tmp_path):
    run = RunFolder(tmp_path)
    assert run.guard_state() == GuardState()
    run.save_guard_state(0, GuardState(lr_scale=0.5))
    assert run.guard_state().lr_scale == 0.5
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    (checkpoint / "guards.json").write_text('{"lr_scale": 0.25}')
    (checkpoint / "complete.json").write_text("{}")
    assert run.guard_state().lr_scale == 0.25
    run.save_guard_state(3, GuardState(ended="nan"))
    assert run.guard_state().ended == "nan"


def test_where_memory_lacks_checkpointing_comes_before_a_smaller_batch():
    state = guards.GuardState()
    first = guards.after_out_of_memory(state, (4, 4), 2, may_checkpoint=True)
    assert first.action == "checkpointing" and state.checkpointing and state.batch is None
    assert guards.after_out_of_memory(state, (4, 4), 2).action == "smaller_batch" and state.batch == (2, 8)
