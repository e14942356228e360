"""DPO in a world whose true reward is known: what is trained is better, and every number of the run is true.

End quality shows swapped pairs and an ignored beta. It does not show a reference or a mask that is slightly wrong, so
what the run reports on its held-out pairs is computed again from the published adapters, by plain PEFT.
"""

from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import worlds
from msgspec.structs import replace
from worlds import Sizes, best_of_rate, zest

from dpo_cli.data.row_index import read_pairs
from dpo_cli.progress import Silent
from dpo_cli.stages.evaluate import scales

SMALL = Sizes(base=1500, hidden=64, steps=200, demonstrations=256, prompts=384, measured=64)
BETAS = (0.05, 1.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world, and DPO in it at a weak and at a strong pull towards the SFT adapter."""
    config = worlds.make(tmp_path_factory.mktemp("world"), SMALL)
    eyes = worlds.Judged(config)
    runs = {beta: worlds.align(config, f"beta-{beta}", beta=beta, learning_rate=1e-3) for beta in BETAS}
    points = {beta: eyes.point(mine.model.dpo_adapter) for beta, (mine, _) in runs.items()}
    return SimpleNamespace(eyes=eyes, runs=runs, points=points)


def test_the_true_reward_rises(world):
    weak, strong = (world.points[beta] for beta in BETAS)
    assert weak.interval[0] > 0.6 and strong.interval[0] > 0.5
    assert weak.reward > strong.reward > fmean(zest([], text) for texts in world.eyes.answers for text in texts)


def test_beta_holds_the_policy_back(world):
    weak, strong = (world.points[beta] for beta in BETAS)
    assert weak.kl > 1.3 * strong.kl > 0


def test_nothing_beats_what_this_much_divergence_can_buy(world):
    """Best-of-N is nearly the best that any policy does at its KL (arXiv:2406.00832)."""
    for point in world.points.values():
        assert point.interval[0] < best_of_rate(point.kl)


@pytest.mark.parametrize("beta", BETAS)
def test_what_the_run_reports_is_true_of_its_adapters(world, beta):
    """Rewards of Section 4 of arXiv:2305.18290 on val.jsonl, from log-probabilities of one answer at a time."""
    config, trained = world.runs[beta]
    policy = world.eyes.load(config.model.dpo_adapter)
    pairs = list(read_pairs(Path(config.data) / "val.jsonl"))
    assert 10 < len(pairs) <= config.train.per_device_eval_batch_size
    moved = {
        side: fmean(liked(world.eyes, policy, pair.prompt[-1]["content"], getattr(pair, side)[0]["content"])
                    for pair in pairs)
        for side in ("chosen", "rejected")
    }  # fmt: skip
    assert moved["chosen"] - moved["rejected"] > 0.1
    for side, nats in moved.items():
        assert trained.metrics[f"eval_rewards/{side}"] / beta == pytest.approx(nats, abs=2e-3)
    assert all(zest([], pair.chosen[0]["content"]) > zest([], pair.rejected[0]["content"]) for pair in pairs)


def test_scales_are_points_on_the_line_and_the_best_within_the_limit_is_kept(world, tmp_path):
    """Win rate and KL of each, by the stage's own counting, rise with the scale; the picked adapter is that scale's."""
    mine, _ = world.runs[1.0]
    limit = {}
    for name, most in (("wide", 100.0), ("narrow", 0.0)):
        config = replace(
            mine, data=str(tmp_path / name), gate=replace(mine.gate, kl_limit=most),
            evaluate=replace(mine.evaluate, prompts=str(Path(mine.generate.prompts) / "measured.jsonl"), samples=2),
        )  # fmt: skip
        limit[name] = scales.run(config, Silent(), [0.5, 1.0, 2.0], pick=True)
    half, whole, double = limit["wide"].points
    assert half.kl.nats_per_sequence < 0.6 * whole.kl.nats_per_sequence < 0.3 * double.kl.nats_per_sequence
    assert half.win_rate.value < double.win_rate.value
    assert whole.kl.nats_per_sequence == pytest.approx(world.points[1.0].kl, rel=0.5)  # of other samples
    assert limit["wide"].verdict == "pass" and limit["wide"].picked == 2.0
    assert [half.chosen_on.n + half.reported_on.n, half.chosen_on.n > 0] == [SMALL.measured, True]
    assert limit["narrow"].verdict == "fail" and limit["narrow"].adapter is None

    kept, measured = (Path(folder) / "adapter_model.safetensors" for folder in (limit["wide"].adapter, double.adapter))
    assert kept.read_bytes() == measured.read_bytes()
    assert kept.parent.name == f"{Path(mine.model.dpo_adapter).name}-x2"


def liked(eyes, policy, prompt, answer):
    """Nats by which the policy likes an answer better than the SFT adapter does."""
    return (eyes.log_probs(policy, prompt, answer) - eyes.log_probs(eyes.reference, prompt, answer)).sum().item()
