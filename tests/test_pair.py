"""Pairs from judgments: which, why not, and where they go."""

import random
from pathlib import Path

import pytest
from judging import config, row, write

from dpo_cli.config.settings import PairSection
from dpo_cli.data.jsonl import read_latest, write_rows
from dpo_cli.data.records import Completions, Judgment, Order, Preference, completions_id
from dpo_cli.errors import Exit, UserError
from dpo_cli.stages.pair import run


def judged(completions: Completions, *scores: float, **fields) -> Judgment:
    ranking = sorted(range(len(scores)), key=lambda index: -scores[index])
    return Judgment(
        **{"id": completions.id, "completions_id": completions_id(completions.completions), "scores": list(scores),
           "ranking": ranking, "orders": [], "consistent": True, **fields}
    )  # fmt: skip


def make(folder: Path, pairs: list[tuple[Completions, Judgment]], **settings) -> run.Paired:
    write(folder, [completions for completions, _ in pairs])
    write_rows(folder / "judgments.jsonl", [judgment for _, judgment in pairs])
    return run.run(config(folder, pair=PairSection(**settings)))


def made(folder: Path) -> tuple[dict[str, Preference], dict[str, Preference]]:
    return read_latest(folder / "train.jsonl", Preference), read_latest(folder / "val.jsonl", Preference)


def only(folder: Path) -> Preference:
    train, val = made(folder)
    (found,) = [*train.values(), *val.values()]
    return found


def many(count: int) -> list[tuple[Completions, Judgment]]:
    completions = [row(number, "[OTIS] Yes.", "[OTIS] No.") for number in range(count)]
    return [(one, judged(one, 8, 4)) for one in completions]


def test_best_against_worst_with_scores_and_finish_reasons(tmp_path):
    completions = row(1, "b", "a", "c")
    completions.finish_reasons = ["stop", "length", "cut"]
    make(tmp_path, [(completions, judged(completions, 5, 8.5, 2))])
    found = only(tmp_path)
    assert found.prompt == completions.prompt
    assert found.chosen == [{"role": "assistant", "content": "a"}]
    assert found.rejected == [{"role": "assistant", "content": "c"}]
    assert (found.chosen_score, found.rejected_score, found.score_gap) == (8.5, 2, 6.5)
    assert (found.chosen_finish_reason, found.rejected_finish_reason) == ("length", "cut")


FIRST_WINS = [Order([0, 1], {"A": 7, "B": 3}, ""), Order([1, 0], {"A": 7, "B": 3}, "")]


@pytest.mark.parametrize(
    ("texts", "scores", "fields", "reason"),
    [
        (("a", "b"), (5, 5), {}, "a tie"),
        (("a", "b"), (5, 4.5), {}, "the gap is below min_gap"),
        (("a", "b"), (8, 2), {"consistent": False}, "an order inverts the pair"),
        (("a", "b"), (8, 2), {"orders": [Order([1, 0], {"A": 6, "B": 5}, "")]}, "an order inverts the pair"),
        # Whoever is shown first wins: the means tie, or nearly so.
        (("a", "b"), (5, 5), {"orders": FIRST_WINS}, "position: the judge's orders contradict each other"),
        (("a", "b"), (5.5, 5), {"orders": FIRST_WINS}, "position: the judge's orders contradict each other"),
        (("a b", "a  b\n"), (8, 2), {}, "fewer than two different texts"),
        (("caf\u00e9", "cafe\u0301"), (8, 2), {}, "fewer than two different texts"),
        (("a", " "), (8, 0), {}, "fewer than two different texts"),
        (("a", "b"), (8, 2), {"completions_id": "other"}, "judged before its completions changed"),
        (("a", "b"), (8, 2, 1), {}, "the judgment does not fit its completions"),
        (("a", "b"), (8, 2), {"ranking": [0, 0]}, "the judgment does not fit its completions"),
        (("a", "b"), (), {"skipped": "the judge refused: no"}, "the judge refused"),
        (("a", "b"), (), {"error": "503"}, "the judge failed"),
    ],
)  # fmt: skip
def test_no_pair_and_why(tmp_path, texts, scores, fields, reason):
    good, bad = row(1, "x", "y"), row(2, *texts)
    result = make(tmp_path, [(good, judged(good, 9, 1)), (bad, judged(bad, *scores, **fields))])
    assert (result.train + result.val, result.skipped) == (1, {reason: 1})
    assert only(tmp_path).prompt == good.prompt


def test_a_gap_of_exactly_min_gap_is_enough_whatever_floats_make_of_it(tmp_path):
    completions = row(1, "a", "b")
    make(tmp_path, [(completions, judged(completions, 0.3, 0.2))], min_gap=0.1)
    assert only(tmp_path).score_gap == pytest.approx(0.1)


def test_where_nothing_comes_out_the_most_frequent_reason_is_explained(tmp_path):
    rows = [row(number, "a", "b") for number in range(4)]
    with pytest.raises(UserError, match=r"4 x position: .*") as error:
        make(tmp_path, [(one, judged(one, 5, 5, orders=FIRST_WINS)) for one in rows])
    assert "--votes" in str(error.value.hint)
    why = "no valid verdict: no JSON object"
    with pytest.raises(UserError, match=rf"4 x the judge failed \(3 x {why}, 1 x 503\)") as error:
        make(tmp_path, [(one, judged(one, error=why if number else "503")) for number, one in enumerate(rows)])
    assert error.value.code == Exit.FAILED
    assert "a judge that writes JSON" in error.value.hint


def test_inverted_pairs_are_kept_on_demand(tmp_path):
    completions = row(1, "a", "b")
    make(tmp_path, [(completions, judged(completions, 8, 2, consistent=False))], require_consistent=False)
    assert only(tmp_path).score_gap == 6


def test_a_completion_without_text_is_passed_over_for_the_next_worst(tmp_path):
    completions = row(1, "a", " \n", "b")
    make(tmp_path, [(completions, judged(completions, 8, 0, 3))])
    assert only(tmp_path).rejected[0]["content"] == "b"


def test_a_completion_that_no_judge_saw_can_be_rejected_but_is_inverted_by_none(tmp_path):
    completions = row(1, "a", "not a script", "b")
    seen = Order([0, 2], {"A": 5, "B": 6}, "")  # one of two orders inverts a and b, so the judgment is inconsistent
    make(tmp_path, [(completions, judged(completions, 6, 0, 5, orders=[seen], consistent=False))])
    assert only(tmp_path).rejected[0]["content"] == "not a script"


def test_no_pair_at_all_is_an_error_that_counts_the_reasons_and_keeps_the_old_files(tmp_path):
    (tmp_path / "train.jsonl").write_text("old\n")
    pairs = [(completions, judged(completions, 5, 4.8)) for completions in (row(1, "a", "b"), row(2, "a", "b"))]
    tie = row(3, "a", "b")
    with pytest.raises(UserError, match="no pair comes out of 3 prompts: 2 x the gap is below min_gap, 1 x a tie") as e:
        make(tmp_path, [*pairs, (tie, judged(tie, 5, 5))])
    assert "--min-gap" in str(e.value.hint)
    assert (tmp_path / "train.jsonl").read_text() == "old\n"


def test_no_judgments_names_the_command_that_makes_them(tmp_path):
    with pytest.raises(UserError, match=r"judgments\.jsonl: no judgments") as error:
        run.run(config(tmp_path))
    assert error.value.hint == "nothing-dpo judge"


def test_unjudged_prompts_are_counted(tmp_path):
    pairs = many(2)
    write(tmp_path, [*(completions for completions, _ in pairs), row(99, "a", "b")])
    write_rows(tmp_path / "judgments.jsonl", [judgment for _, judgment in pairs])
    assert run.run(config(tmp_path)).skipped == {"not judged yet": 1}


def test_the_order_of_the_input_changes_no_byte(tmp_path):
    pairs = many(40)
    make(tmp_path / "a", pairs)
    random.Random(0).shuffle(pairs)
    make(tmp_path / "b", pairs)
    for name in ("train.jsonl", "val.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("seed", range(5))
def test_adding_prompts_moves_none_across_and_no_prompt_is_on_both_sides(tmp_path, seed):
    pairs = many(200)
    random.Random(seed).shuffle(pairs)
    settings = {"seed": seed, "val_share": 0.2}
    before: tuple[set[str], set[str]] = (set(), set())
    for count in (7, 50, 200):
        make(tmp_path, pairs[:count], **settings)
        train, val = (set(side) for side in made(tmp_path))
        assert not train & val
        assert len(train | val) == count
        assert before[0] <= train
        assert before[1] <= val
        before = train, val
    assert 20 <= len(val) <= 60


def test_an_empty_side_is_told_and_not_mended_by_moving_a_prompt(tmp_path):
    pairs = many(60)
    make(tmp_path, pairs)
    held_out = {one.prompt[0]["content"] for one in made(tmp_path)[1].values()}
    few = [one for one in pairs if one[0].prompt[0]["content"] not in held_out][:3]
    result = make(tmp_path, few)
    assert (result.train, result.val) == (3, 0)
    assert "val.jsonl is empty" in result.warnings[0]
    assert make(tmp_path, few, val_share=0.0).warnings == []
    assert "train.jsonl is empty" in make(tmp_path, few, val_share=1.0).warnings[0]


def test_a_dry_run_counts_and_writes_nothing(tmp_path):
    pairs = many(30)
    write(tmp_path, [completions for completions, _ in pairs])
    write_rows(tmp_path / "judgments.jsonl", [judgment for _, judgment in pairs])
    result = run.run(config(tmp_path), dry_run=True)
    assert result.train + result.val == 30
    assert not (tmp_path / "train.jsonl").exists()


def test_pairs_are_made_anew_unless_nothing_changed(tmp_path):
    """What judge does where it owes nothing; each kind of change is seen."""
    pairs = many(30)
    made_anew = make(tmp_path, pairs)

    def again(**settings) -> tuple[run.Paired, bool]:
        before = [
            (tmp_path / name).stat().st_ino for name in ("train.jsonl", "val.jsonl") if (tmp_path / name).exists()
        ]
        found = run.run(config(tmp_path, pair=PairSection(**settings)), reuse=True)
        return found, before == [(tmp_path / name).stat().st_ino for name in ("train.jsonl", "val.jsonl")]

    assert again() == (made_anew, True)
    assert again(min_gap=3)[1] is False
    assert again(min_gap=3)[1] is True
    assert again()[1] is False
    (tmp_path / "val.jsonl").unlink()
    assert again() == (made_anew, False)
    lines = (tmp_path / "train.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_bytes(b"".join(lines[1:]))  # somebody cleaned it
    assert again() == (made_anew, False)
    assert (tmp_path / "train.jsonl").read_bytes() == b"".join(lines)
    one = pairs[0][0]
    write_rows(tmp_path / "judgments.jsonl", [judged(one, 4, 8), *(other for _, other in pairs[1:])])
    assert again() == (made_anew, False)
    turned = {**made(tmp_path)[0], **made(tmp_path)[1]}
    assert any(pair.prompt == one.prompt and pair.chosen_score == 8 for pair in turned.values())
    assert [pair.chosen[0]["content"] for pair in turned.values()].count("[OTIS] No.") == 1
    (tmp_path / ".paired.json").write_text("{")
    assert again()[1] is False
    assert again()[1] is True
