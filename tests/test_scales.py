"""Points on the line between both adapters: what is picked, and what is said of it."""

import io

import pytest
from rich.console import Console

from dpo_cli.config.settings import Config
from dpo_cli.data.records import split_side
from dpo_cli.stages.evaluate import scales
from dpo_cli.stages.evaluate.divergence import Divergence
from dpo_cli.training.scale_adapter import Scaled
from dpo_cli.view.scales import scaled


@pytest.fixture
def config(tmp_path):
    found = Config()
    found.model.dpo_adapter = str(tmp_path / "dpo")
    return found


def picked(config, wins, monkeypatch):
    """What is picked where the one scale wins so on the half that chooses and on the other."""
    keys = map(str, range(1000))
    halves = {True: iter(wins[0]), False: iter(wins[1])}
    won = {}
    for key in keys:
        win = next(halves[split_side(key, config.evaluate.seed, 0.5)], None)
        if win is not None:
            won[key] = win
    monkeypatch.setattr(scales, "publish", lambda *_: None)
    kl = Divergence(nats_per_sequence=1.0, error=None, nats_per_token=0.01, n=4, how="whole vocabulary")
    point = scales._point(Scaled(path="x2", scale=2.0, rank=8, error=0.0), won, kl, 0.5, config)
    result = scales.Scales(points=[point], gate=0.5, kl_limit=0.1, n=len(won), usd=0.0, path="scales.json")
    scales._pick(result, config)
    return result


def shown(result):
    console = Console(file=io.StringIO(), width=100)
    scaled(console, result)
    return console.file.getvalue()


def test_the_verdict_is_of_the_half_that_did_not_choose(config, monkeypatch):
    sure, even = [1.0] * 30 + [0.0] * 5, [1.0, 0.0] * 18
    found = picked(config, (sure, sure), monkeypatch)
    assert (found.verdict, found.picked) == ("pass", 2.0)
    found = picked(config, (sure, even), monkeypatch)
    assert (found.verdict, found.picked) == ("not shown", 2.0)
    assert "? not shown" in shown(found)
    found = picked(config, (sure, [1 - win for win in sure]), monkeypatch)
    assert (found.verdict, found.picked) == ("fail", 2.0)


def test_two_prompts_that_were_won_show_nothing(config, monkeypatch):
    """A bootstrap of equal values has no width."""
    found = picked(config, ([1.0] * 2, [1.0] * 2), monkeypatch)
    assert (found.verdict, found.picked) == ("not shown", None)
    assert "no scale clears the gate" in shown(found)
    assert picked(config, ([0.0] * 20, [0.0] * 20), monkeypatch).verdict == "fail"


def test_the_level_is_that_of_the_gates(config, monkeypatch):
    wins = [1.0] * 20 + [0.0] * 10
    config.gate.confidence = 0.6
    assert picked(config, (wins, wins), monkeypatch).verdict == "pass"
    config.gate.confidence = 0.99
    assert picked(config, (wins, wins), monkeypatch).verdict == "not shown"
