"""Strategies from files to files: what is paired, what is filtered whatever proposed it, where it goes."""

import random

import pytest
from judging import config, row
from test_pair import judged, made, make, many

from dpo_cli.config.settings import PairSection, Strategy
from dpo_cli.data.jsonl import write_rows
from dpo_cli.data.records import Completions, Judgment, Message, Order, prompt_id
from dpo_cli.errors import UserError
from dpo_cli.stages.pair import run
from dpo_cli.stages.pair.stratified import stratified_scores

STRATEGIES = Strategy.__args__


def texts(folder) -> list[tuple[str, str]]:
    train, val = made(folder)
    return [(one.chosen[0]["content"], one.rejected[0]["content"]) for one in [*train.values(), *val.values()]]


def varied(count: int) -> list[tuple[Completions, Judgment]]:
    completions = [row(number, *(f"{letter}{number}" for letter in "abcd")) for number in range(count)]
    return [(one, judged(one, 9, 7, 4, 2)) for one in completions]


@pytest.mark.parametrize(
    ("strategy", "pairs"),
    [
        ("best-worst", ["ad"]),
        ("same-prompt", ["ad"]),
        ("mu-2sigma", ["ad"]),
        ("adjacent", ["bc", "ab"]),  # c and d tie
        ("all", ["ac", "ad", "bc", "bd", "ab"]),
        ("stratified", ["ac", "ad"]),  # 4 to 9: high from 7.5, low to 6
    ],
)
def test_each_strategy_on_one_prompt(tmp_path, strategy, pairs):
    completions = row(1, "a", "b", "c", "d")
    make(tmp_path, [(completions, judged(completions, 9, 7, 4, 4))], strategy=strategy)
    assert texts(tmp_path) == [tuple(both) for both in pairs]


def test_the_settings_say_nothing_that_best_worst_does_not(tmp_path):
    pairs = varied(30)
    make(tmp_path / "a", pairs)
    make(tmp_path / "b", pairs, strategy="best-worst", min_gap=1.0)
    make(tmp_path / "c", pairs, strategy="same-prompt", max_pairs_per_prompt=1)
    for name in ("train.jsonl", "val.jsonl"):
        expected = (tmp_path / "a" / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes() == expected
        assert b"margin" not in expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_strategy_keeps_prompts_apart_and_forgets_the_order_of_the_input(tmp_path, strategy):
    pairs = varied(60)
    settings = {"strategy": strategy, "val_share": 0.3}
    make(tmp_path / "few", pairs[:30], **settings)
    make(tmp_path / "a", pairs, **settings)
    random.Random(0).shuffle(pairs)
    make(tmp_path / "b", pairs, **settings)
    few, whole = ([{prompt_id(one.prompt) for one in side.values()} for side in made(tmp_path / name)]
                  for name in ("few", "a"))  # fmt: skip
    assert not whole[0] & whole[1]
    assert all(ours and ours <= theirs for ours, theirs in zip(few, whole, strict=True))
    for name in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_most_pairs_a_prompt_are_those_of_the_largest_gap(tmp_path):
    completions = row(1, "a", "b", "c", "d")
    one = [(completions, judged(completions, 9, 7, 3, 2))]
    make(tmp_path, one, strategy="all", max_pairs_per_prompt=3)
    assert texts(tmp_path) == [("a", "d"), ("a", "c"), ("b", "d")]
    make(tmp_path, one, strategy="stratified", max_pairs_per_prompt=1)
    assert texts(tmp_path) == [("a", "d")]


def test_the_margin_is_the_gap(tmp_path):
    completions = row(1, "a", "b", "c")
    make(tmp_path, [(completions, judged(completions, 9, 7, 4))], strategy="adjacent", margin_column=True)
    train, val = made(tmp_path)
    assert [one.margin for one in [*train.values(), *val.values()]] == [3, 2]


@pytest.mark.parametrize("weights", ["prompt", "gap"])
def test_a_prompt_without_pairs_has_nothing_to_weigh(tmp_path, weights):
    two, tied = row(1, "a", "b", "c"), row(2, "a", "b")
    make(tmp_path, [(two, judged(two, 9, 7, 4)), (tied, judged(tied, 5, 5))], strategy="adjacent", weights=weights)
    train, val = made(tmp_path)
    assert sum(one.weight for one in [*train.values(), *val.values()]) == pytest.approx(1)


def test_an_order_inverts_the_pairs_that_it_inverts_and_no_others(tmp_path):
    completions = row(1, "a", "b", "c")
    orders = [Order([0, 1, 2], {"A": 9, "B": 4, "C": 1}, ""), Order([2, 1, 0], {"A": 5, "B": 4, "C": 9}, "")]
    scored = judged(completions, 9, 4, 3, orders=orders)
    make(tmp_path, [(completions, scored)], strategy="all")
    assert texts(tmp_path) == [("a", "c"), ("a", "b")]  # the second order has c before b
    make(tmp_path, [(completions, scored)], strategy="all", require_consistent=False)
    assert len(texts(tmp_path)) == 3
    make(tmp_path, [(completions, scored)], strategy="stratified", high=0.1, low=0.1)  # 3.6
    assert texts(tmp_path) == [("a", "c")]


def test_the_flag_of_best_and_worst_is_not_that_of_other_pairs(tmp_path):
    completions = row(1, "a", "b", "c")
    orders = [Order([0, 1, 2], {"A": 9, "B": 5, "C": 1}, "")]
    scored = judged(completions, 9, 5, 1, orders=orders, consistent=False)
    assert make(tmp_path, [(completions, scored)], strategy="all").train == 2
    assert texts(tmp_path) == [("a", "b"), ("b", "c")]
    with pytest.raises(UserError, match="1 x an order inverts"):
        make(tmp_path, [(completions, judged(completions, 9, 5, 1, consistent=False))], strategy="all")


def test_stratified_sides_that_say_the_same_or_score_the_same_are_no_pair():
    settings = PairSection(strategy="stratified", high=0.5, low=0.5)
    scores, prompts, said = [9.0, 1.0, 9.0, 5.0, 5.0], [1, 1, 2, 2, 3], [10, 11, 11, 12, 13]
    pairs = {(0, 1), (0, 3), (2, 3), (0, 4), (2, 4), (3, 1), (4, 1)}  # not (2, 1): both say 11; not 3 with 4: both 5
    assert set(stratified_scores(scores, prompts, said, settings, 0.0)) == pairs
    assert set(stratified_scores(scores, prompts, said, settings, 5.0)) == {(0, 1)}


def test_stratified_pairs_across_prompts_by_shares_of_the_range(tmp_path):
    good, bad, middle = row(1, "a", "b"), row(2, "c", "d"), row(3, "e", "f")
    pairs = [(good, judged(good, 10, 9)), (bad, judged(bad, 1, 0)), (middle, judged(middle, 6.9, 4.1))]
    result = make(tmp_path, pairs, strategy="stratified")
    assert sorted(texts(tmp_path)) == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert result.skipped == {"no score is high, or none that is low goes with it": 2}
    make(tmp_path, pairs, strategy="stratified", high=0.65, low=0.41)
    assert ("e", "f") in texts(tmp_path)
    assert make(tmp_path, pairs, strategy="stratified", max_pairs=3).train + len(made(tmp_path)[1]) == 3
    with pytest.raises(UserError, match="no score is high") as error:
        make(tmp_path, pairs[2:], strategy="stratified", high=1.1)
    assert "--high" in str(error.value.hint)


def test_imported_rows_are_filtered_and_counted(tmp_path):
    ask: list[Message] = [{"role": "user", "content": "Why?"}]
    rows = [
        {"prompt": ask, "chosen": "good", "rejected": "bad"},
        {"prompt": ask, "chosen": "good", "rejected": "bad", "id": "again"},
        {"prompt": ask, "chosen": "same ", "rejected": "same"},
        {"prompt": ask, "chosen": "x", "rejected": "y", "score_gap": 0.0},
        {"prompt": ask, "chosen": "p", "rejected": "q", "score_gap": 0.5},
        {"prompt": ask, "chosen": "r", "rejected": "s", "score_gap": 2.0},
    ]
    write_rows(tmp_path / "other.jsonl", rows)
    result = run.run_import([tmp_path / "other.jsonl"], config(tmp_path))
    assert result.format == "trl-plain"
    assert texts(tmp_path) == [("good", "bad"), ("p", "q"), ("r", "s")]
    assert result.skipped == {"a copy of another pair": 1, "both sides say the same": 1, "a tie": 1}
    settings = PairSection(min_gap=1.0, margin_column=True)
    assert run.run_import([tmp_path / "other.jsonl"], config(tmp_path, pair=settings)).skipped[
        "the gap is below min_gap"
    ]
    assert texts(tmp_path) == [("good", "bad"), ("r", "s")]
    run.run_import([tmp_path / "other.jsonl"], config(tmp_path, pair=PairSection(max_pairs_per_prompt=1)))
    assert texts(tmp_path) == [("r", "s")], "the largest gap, not the first row"
    write_rows(tmp_path / "other.jsonl", rows[2:4])
    with pytest.raises(UserError, match="no row is a pair: 1 x both sides say the same, 1 x a tie"):
        run.run_import([tmp_path / "other.jsonl"], config(tmp_path))


def test_the_split_of_an_import_is_the_split_of_judgments(tmp_path):
    pairs = many(60)
    make(tmp_path / "a", pairs)
    rows = [{"prompt": c.prompt, "chosen": c.completions[0], "rejected": c.completions[1]} for c, _ in pairs]
    write_rows(tmp_path / "b.jsonl", rows)
    run.run_import([tmp_path / "b.jsonl"], config(tmp_path / "b"))
    assert [set(side) for side in made(tmp_path / "a")] == [set(side) for side in made(tmp_path / "b")]
