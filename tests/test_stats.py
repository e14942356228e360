import math

import pytest

from dpo_cli import statistics
from dpo_cli.analysis import data_stats
from dpo_cli.config import resolve
from dpo_cli.data.records import Completions, Preference, Usage
from dpo_cli.errors import UserError
from dpo_cli.statistics import count_alike
from dpo_cli.training import run_history


def pair(prompt, chosen, rejected, **fields):
    return Preference(
        id="x",
        prompt=[{"role": "user", "content": prompt}],
        chosen=[{"role": "assistant", "content": chosen}],
        rejected=[{"role": "assistant", "content": rejected}],
        **fields,
    )


def test_wilson_interval_of_eight_in_ten():
    # Worked by hand from Wilson's formula with z = 1.96: centre 0.71674, half width 0.22658.
    found = statistics.proportion(8, 10)
    assert found.value == 0.8
    assert found.low == pytest.approx(0.4902, abs=1e-4)
    assert found.high == pytest.approx(0.9433, abs=1e-4)
    assert found.z == pytest.approx(0.3 / math.sqrt(0.025))
    assert statistics.proportion(0, 5).low == pytest.approx(0, abs=1e-12)
    assert statistics.proportion(5, 5).high == pytest.approx(1)
    assert statistics.proportion(0, 0) is None


def test_spread_and_histogram_have_round_edges():
    assert statistics.spread([3, 1, 2, 10]) == statistics.Spread(4, 1, 2.5, 4, 10)
    assert statistics.spread([]) is None
    found = statistics.histogram([3, 3.5, 4, 9, 8.5])
    assert found.edges == [3, 4, 5, 6, 7, 8, 9, 10]
    assert found.counts == [2, 1, 0, 0, 0, 1, 1]
    assert statistics.histogram([2, 2]).counts == [2]
    assert statistics.histogram([]) is None


def test_pair_stats_by_hand():
    train = [
        pair("p1", "a longer one", "short", chosen_score=8, rejected_score=5, score_gap=3),
        pair("p1", "a longer one", "short", score_gap=3),  # the same pair again
        pair("p1", "short", "a longer one", score_gap=1),  # and the other way round
        pair("p1", "a longer one", "short"),  # contradicts once, however often it stands there
        pair("p2", "same", "same"),
        pair("p3", "ab", "cd", chosen_score=6, rejected_score=4.5, chosen_finish_reason="length",
             rejected_finish_reason="stop"),
    ]  # fmt: skip
    found = data_stats.pair_stats({"train": train, "val": [pair("p3", "one two\nthree", "x"), pair("p4", "y", "zz")]})
    assert found.pairs == {"train": 6, "val": 2}
    assert found.prompts == {"train": 3, "val": 2}
    assert found.shared_prompts == 1  # p3
    assert found.repeated_prompts == 2  # p1, p3
    assert (found.duplicate_pairs, found.contradictory_pairs, found.identical_sides) == (2, 1, 1)
    assert found.gaps == statistics.Spread(4, 1, 2.25, 2.125, 3)  # 3, 3, 1, 1.5 (from the scores)
    assert (found.longer_chosen.count, found.longer_chosen.n) == (4, 6)  # two pairs are of equal length
    assert (found.chosen_cut.count, found.chosen_cut.n) == (1, 1)
    assert (found.rejected_cut.count, found.rejected_cut.n) == (0, 1)
    assert found.chosen.words == statistics.Spread(8, 1, 2, 2, 3)
    assert found.rejected.characters.max == len("a longer one")


def test_pair_stats_of_nothing():
    found = data_stats.pair_stats({"train": [], "val": []})
    assert found.gaps is found.longer_chosen is found.chosen.words is None


def test_completion_stats_by_hand():
    def row(texts, reasons):
        return Completions(
            id="x", prompt=[], completions=texts, finish_reasons=reasons, model="m", sampling={}, usage=Usage(10, 0, 5)
        )

    found = data_stats.completion_stats(
        [
            row(["a b", "a b\n", "c"], ["stop", "stop", "length"]),
            row(["", "d", "e"], ["stop"] * 3),
            row(["f"], ["stop"]),
        ]
    )
    assert (found.prompts, found.completions, found.per_prompt) == (3, 7, {1: 1, 3: 2})
    assert found.finish_reasons == {"stop": 6, "length": 1}
    assert (found.identical, found.empty) == (1, 1)
    assert (found.usage.input, found.usage.output) == (30, 15)
    assert found.lengths.words == statistics.Spread(7, 0, 1, 8 / 7, 2)


def test_a_run_in_progress_is_read_as_far_as_it_is_written(tmp_path):
    run = tmp_path / "dpo"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 0.6931, "note": "text"}\n'
        '{"step": 2, "loss": NaN}\n{"step": 2, "eval_loss": 0.7}\n{"step": 3, "lo'
    )
    found = run_history.read_run(run)
    assert list(found.series) == ["loss", "eval_loss"]
    assert found.series["loss"][0] == (1, 0.6931)
    assert math.isnan(found.last["loss"])
    assert (found.events, found.report) == ([], None)


def test_a_broken_metrics_line_and_a_missing_run_are_named(tmp_path):
    run = tmp_path / "dpo"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON object"):
        run_history.read_run(run)
    with pytest.raises(UserError, match="no such run") as caught:
        run_history.read_run(tmp_path / "other")
    assert caught.value.hint == "runs there: dpo"


def test_settings_tell_where_each_value_is_from():
    found = {row.key: row for row in resolve.settings(resolve.resolve({"train.beta": 0.2}, environment={}))}
    assert (found["train.beta"].value, found["train.beta"].source) == (0.2, "flag")
    assert (found["generate.n"].value, found["generate.n"].source) == (3, "default")
    assert found["generate.n"].description


def test_reasons_that_differ_in_numbers_are_one():
    reasons = ["a limit of 4096, you sent 6,001", None, "no JSON", "a limit of 4096, you sent 77", "no JSON", "no JSON"]
    assert count_alike(reasons) == {"no JSON": 3, "a limit of 4096, you sent 6,001": 2}
