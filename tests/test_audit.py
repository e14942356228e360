"""What the audit says of judges whose faults are known, and each statistic worked by hand."""

import random

import pytest
from judging import config, write

from dpo_cli.analysis import judge_audit
from dpo_cli.analysis.length_bias import Points, deviations, without_length
from dpo_cli.analysis.reliability import Units
from dpo_cli.config.settings import PairSection
from dpo_cli.data.jsonl import read_latest, write_rows
from dpo_cli.data.records import Completions, Judgment, Order, Preference, Usage, completions_id, prompt_id
from dpo_cli.judges._ranking import conclude, label_of
from dpo_cli.judges._task import make_task
from dpo_cli.stages.pair import run


def row(number, *texts):
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    return Completions(
        id=prompt_id(prompt), prompt=prompt, completions=list(texts), finish_reasons=["stop"] * len(texts),
        model="writer", sampling={},
    )  # fmt: skip


def order(shown, *scores):
    """An order from the completions as shown, and the scores of the same places."""
    return Order(shown, {label_of(place): float(score) for place, score in enumerate(scores)}, "")


def judged(completions, *orders, **fields):
    """The judgment that the judges' own `conclude` makes of these orders."""
    given = [{index: o.scores[label_of(place)] for place, index in enumerate(o.order)} for o in orders]
    mean = {index: sum(scores[index] for scores in given) / len(given) for index in given[0]}
    found = conclude(make_task(completions, lambda text: True), mean, orders=list(orders))
    found.judge = fields.pop("judge", {"model": "m"})
    return Judgment(**{name: getattr(found, name) for name in Judgment.__struct_fields__} | fields)


def audited(*rows):
    """The audit of (completions, judgment) pairs."""
    return judge_audit.audit({j.id: j for _, j in rows}, {c.id: c for c, _ in rows})


def alpha(units):
    found = Units()
    for unit in units:
        found.add(unit)
    return found.alpha()


def slope_of(rows):
    """The slope of (completions, judgment) pairs."""
    points = Points()
    for completions, judgment in rows:
        points.add(deviations(judgment, completions))
    return points.slope()


def simulated(prompts, primacy=0.0, per_character=0.0, seed=2):
    """Judgments of three random texts a prompt, in two orders, by quality + place + length + noise."""
    rng = random.Random(seed)
    rows = []
    for number in range(prompts):
        completions = row(number, *("ab " * rng.randint(5, 100) + str(place) for place in range(3)))
        quality = [rng.gauss(5, 1) + per_character * len(text) for text in completions.completions]
        base = rng.sample(range(3), 3)
        orders = [
            order(shown, *(quality[i] + primacy * (place == 0) + rng.gauss(0, 0.5) for place, i in enumerate(shown)))
            for shown in (base, [*base[1:], base[0]])
        ]
        rows.append((completions, judged(completions, *orders)))
    return rows


def test_krippendorffs_own_example():
    # Krippendorff 2011, section C and E: four observers, twelve units, missing values; interval α = 0.849.
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    units = [[value for value in unit if value is not None] for unit in zip(*observers, strict=True)]
    assert alpha(units) == pytest.approx(0.849, abs=5e-4)


def test_alpha_by_hand():
    # Values 1 2 | 4 4 | 7, the last one alone and unpaired. Observed (1/4)(2·1) = 0.5.
    # Expected: squared differences of 1 2 4 4: 1 9 9 4 4 0, twice their sum over 4·3 = 54/12 = 4.5. α = 1 − 0.5/4.5.
    assert alpha([[1, 2], [4, 4], [7]]) == pytest.approx(8 / 9)
    assert alpha([[3, 3], [3, 3]]) is None
    assert alpha([]) is None


def test_flips_and_tau_by_hand():
    # Orders score the completions 0 1 2 as 9 5 1 and 9 1 5: of the pairs 01, 02, 12 the last is flipped.
    # The other prompt ties its only pair in its first order: no flip, and no part in that order's side of τ-b.
    one, two = row(1, "a", "b", "c"), row(2, "a", "b")
    found = audited(
        (one, judged(one, order([0, 1, 2], 9, 5, 1), order([1, 2, 0], 1, 5, 9))),
        (two, judged(two, order([0, 1], 4, 4), order([1, 0], 3, 6))),
    ).judges["m"].between_orders  # fmt: skip
    assert (found.flips.count, found.flips.n) == (1, 4)
    assert found.tau == pytest.approx((2 - 1) / (3 * 4) ** 0.5)


def test_an_order_that_left_a_completion_out_is_compared_on_the_others():
    completions = row(1, "a", "b", "c")
    second = Order([2, 1, 0], {"A": 1.0, "C": 9.0}, "")  # says nothing of 1
    first = order([0, 1, 2], 9, 5, 1)
    found = audited((completions, judged(completions, first, orders=[first, second]))).judges["m"]
    assert (found.between_orders.flips.count, found.between_orders.flips.n) == (0, 1)
    assert found.first_wins.n == 1  # the second order has no winner that one could believe


def test_first_wins_by_hand():
    three, two = row(1, "a", "b", "c"), row(2, "a", "b")
    found = audited(
        (three, judged(three, order([2, 0, 1], 9, 5, 1), order([0, 1, 2], 5, 1, 9))),
        (two, judged(two, order([0, 1], 7, 6), order([1, 0], 6, 6))),
    ).judges["m"]  # fmt: skip
    assert (found.first_wins.count, found.first_wins.n, found.undecided) == (2, 3, 1)
    assert found.expected_first == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)
    # Deviations at the first place: 9 − 5, 5 − 5, 7 − 6.5, 6 − 6.
    assert found.places[0].value == pytest.approx(4.5 / 4)
    assert [place.n for place in found.places] == [4, 4, 2]


def test_slope_by_hand():
    # Lengths 100, 300 with scores 4, 8 and lengths 100, 200, 300 with scores 5, 5, 6, less the means, per 100:
    # Σx² = 2 + 2, Σxy = 4 + 1, so 1.25; residuals ∓0.75 and 11/12, −1/3, −7/12: Σ = 2.41667, df = 5 − 2 − 1.
    one, two = row(1, "x" * 100, "y" * 300), row(2, "x" * 100, "y" * 200, "z" * 300)
    rows = [(one, judged(one, order([0, 1], 4, 8))), (two, judged(two, order([0, 1, 2], 5, 5, 6)))]
    found = audited(*rows)
    assert found.length.slope.value == pytest.approx(1.25)
    assert found.length.slope.error == pytest.approx((2.4166667 / 2 / 4) ** 0.5)
    assert found.length.slope.n == 5
    assert (found.length.longer_chosen.count, found.length.longer_chosen.n) == (2, 2)


def test_a_slope_needs_lengths_that_differ_and_more_than_one_prompt():
    same, one = row(1, "ab", "cd", "ef"), row(2, "a", "bcd")
    assert audited((same, judged(same, order([0, 1, 2], 1, 2, 3)))).length.slope is None
    assert audited((one, judged(one, order([0, 1], 1, 2)))).length.slope is None


def test_counts_skips_errors_and_cost():
    one = row(1, "a", "b")
    spent = {"usage": Usage(100, 0, 10), "usd": 0.25}
    rows = {
        "1": judged(one, order([0, 1], 9, 4), order([1, 0], 5, 4), **spent),
        "2": Judgment(id="2", completions_id="", skipped="refused: no", **spent),
        "3": Judgment(id="3", completions_id="", skipped="refused: never", **spent),
        "4": Judgment(id="4", completions_id="", error="timeout", **spent),
    }
    found = judge_audit.audit(rows, {"1": one})
    assert (found.total, found.judged, found.skipped, found.errors) == (4, 1, {"refused": 2}, {"timeout": 1})
    assert (found.skipped_share.count, found.skipped_share.n) == (2, 4)
    assert (found.consistent.count, found.consistent.n) == (0, 1)  # the second order prefers 1, the mean 0
    assert (found.gaps.max, found.usd, found.usage.input) == (2.0, 1.0, 400)
    assert found.judges["m"].scores.counts == [2, 1, 0, 0, 0, 1]  # 4 4 5 9, as they were given
    assert [example.why for example in found.examples] == ["an order inverts it", "skipped"]
    assert any("skipped, most for: refused" in said for said in found.findings)


def test_each_judge_has_numbers_of_its_own():
    one, two = row(1, "a", "b"), row(2, "a", "b")
    found = audited(
        (one, judged(one, order([0, 1], 9, 1), judge={"model": "m"})),
        (two, judged(two, order([0, 1], 1, 9), judge={"function": "f"})),
    )
    assert [found.judges[name].first_wins.count for name in ("m", "f")] == [1, 0]
    assert found.between_judges is None


def test_models_of_a_panel_are_compared_with_each_other():
    class OrderOf(Order):
        model: str = ""

    completions = row(1, "a", "b", "c")
    scores = {"x": ([0, 1, 2], 9, 5, 1), "y": ([1, 2, 0], 5, 9, 1)}
    orders = [OrderOf(o.order, o.scores, "", name) for name, given in scores.items() for o in [order(*given)]]
    found = audited((completions, judged(completions, *orders)))
    assert list(found.judges) == ["x", "y"]
    assert found.judges["x"].between_orders.flips is None  # one order of each
    assert (found.between_judges.flips.count, found.between_judges.flips.n) == (3, 3)
    assert found.between_judges.tau == -1


def test_a_judge_without_orders_is_audited_for_scores_and_length():
    rows = [(row(n, "a" * n, "b" * 50, "b" * 50), None) for n in (1, 2, 3)]
    rows = [(c, conclude(make_task(c, lambda text: True), {0: 1.0, 1: 9.0})) for c, _ in rows]
    found = audited(*rows)
    (judge,) = found.judges.values()
    assert (judge.first_wins, judge.between_orders.flips, judge.between_orders.alpha) == (None, None, None)
    assert (judge.scores.counts[0], judge.scores.counts[-1]) == (3, 6)
    assert found.length.slope.n == 6  # twins count once


def test_primacy_shows_and_its_absence_does():
    biased = audited(*simulated(300, primacy=0.8))
    judge = biased.judges["m"]
    assert judge.first_wins.low > judge.expected_first == pytest.approx(1 / 3)
    assert judge.places[0].low > 0 > judge.places[1].high
    assert any("prefers what it is shown first" in said for said in biased.findings)
    fair = audited(*simulated(300))
    wins = fair.judges["m"].first_wins
    assert wins.low < 1 / 3 < wins.high
    assert fair.findings == []
    assert fair.judges["m"].between_orders.alpha > judge.between_orders.alpha


def test_a_taste_for_length_is_measured_and_removed():
    found = audited(*simulated(300, per_character=0.015))
    assert found.length.slope.low < 1.5 < found.length.slope.high
    assert found.length.longer_chosen.low > 0.5
    assert found.length_controlled.slope.value == pytest.approx(0, abs=1e-9)
    assert found.length_controlled.longer_chosen.low < 0.5 < found.length_controlled.longer_chosen.high
    assert any(said.startswith("Longer completions score higher: +1.") for said in found.findings)


def test_length_control_by_hand():
    # Slope 2 a hundred characters: scores are exactly 2 · length + 1, but for one prompt.
    rows = [(row(n, "x" * 100, "y" * 300), None) for n in range(8)]
    rows = [(c, judged(c, order([0, 1], 3, 7), order([1, 0], 7, 3))) for c, _ in rows]
    odd = row(9, "x" * 100, "x" * 100 + " ", "y" * 300, " ")
    rows.append((odd, judged(odd, order([0, 2], 5, 7), order([2, 0], 6, 5))))
    slope = slope_of(rows).value
    assert slope == pytest.approx((8 * 4 + 1.5) / 18)
    given = rows[-1][1]
    found = without_length(given, odd, slope)
    # Means 5 and 6.5 at one hundred characters below and above the mean of the prompt; the twin follows its like, and
    # what was never shown stays below all.
    assert found.scores == pytest.approx([5 + slope, 5 + slope, 6.5 - slope, 0])
    assert found.ranking == [0, 1, 2, 3]
    assert found.consistent
    assert found.orders[1].scores == pytest.approx({"A": 6 - slope, "B": 5 + slope})
    assert given.ranking == [2, 0, 1, 3]  # what was given is as it was


def test_judgments_of_other_completions_are_left_alone():
    rows = simulated(20, per_character=0.05)
    stale = Judgment(id="old", completions_id=completions_id(["a"]), scores=[1.0], ranking=[0])
    rows.append((row(99, "b"), stale))
    assert without_length(stale, rows[-1][0], 1.0) == stale
    assert slope_of(rows).prompts == 20


def test_pair_length_control_changes_the_pair(tmp_path):
    rows = simulated(40, per_character=0.03)
    write(tmp_path, [completions for completions, _ in rows])
    write_rows(tmp_path / "judgments.jsonl", [judgment for _, judgment in rows])
    longer = {}
    for control in (False, True):
        run.run(config(tmp_path, pair=PairSection(length_control=control, min_gap=0, val_share=0)))
        made = read_latest(tmp_path / "train.jsonl", Preference).values()
        longer[control] = sum(len(p.chosen[0]["content"]) > len(p.rejected[0]["content"]) for p in made) / len(made)
    assert longer[False] > 0.8
    assert 0.25 < longer[True] < 0.75


def test_many_completions_are_few_points_in_the_plot():
    found = audited(*simulated(150))
    assert 200 < len(found.length.points) <= judge_audit.POINTS
