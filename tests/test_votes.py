"""Votes beyond the cyclic orders, and a rubric that is asked criterion by criterion."""

import json
import re
from collections import Counter

import pytest
from batch_server import BatchServer
from judging import LONG, SHORT, Log, config, judgments, reply, row, rows, run, write
from openai_server import Call, Server, candidates
from typer.testing import CliRunner

from dpo_cli.cli import app
from dpo_cli.config.settings import JudgeSection
from dpo_cli.data.records import Order, rationale
from dpo_cli.endpoint import batch
from dpo_cli.errors import UserError
from dpo_cli.judges._orders import count_votes, cyclic_orders, plan_votes
from dpo_cli.judges._ranking import any_inverts
from dpo_cli.judges._rubric import read_criteria
from dpo_cli.judges._task import make_task
from dpo_cli.stages import judge

RUBRIC = """You judge answers to a child.

## Truth (weight 3)

It is true.

## criterion: Warmth

It is kind.

# Scale

Use all of it.
"""


def task(*texts: str):
    return make_task(row(1, *texts), lambda text: True)


def votes(some, count: int):
    return plan_votes(some, JudgeSection(votes=count, seed=1))


# Votes


def test_votes_are_shifts_then_reversals_then_repeats():
    """Of three candidates there are 3 shifts and 3 reversals, which are all orders; then each comes a second time."""
    some = task("a", "b", "c")
    found = votes(some, 8)
    shifts = cyclic_orders(some, 3, 1)
    assert [vote.order for vote in found[:6]] == shifts + [order[::-1] for order in shifts]
    assert len({tuple(vote.order) for vote in found[:6]}) == 6
    assert [(vote.order, vote.repeat) for vote in found[6:]] == [(shifts[0], 1), (shifts[1], 1)]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 16])
def test_there_are_as_many_votes_as_asked_and_no_order_again_before_all_were_asked(size, count):
    found = votes(task(*map(str, range(size))), count)
    assert len(found) == count
    assert len({(tuple(vote.order), vote.repeat) for vote in found}) == count
    often = Counter(tuple(vote.order) for vote in found)
    assert max(often.values()) - min(often.values()) <= 1
    if count >= 2 * size and size > 1:  # each stands before each other as often as behind it, as far as repeats allow
        whole = found[: len(often)]
        before = sum(vote.order.index(0) < vote.order.index(1) for vote in whole)
        assert 2 * before == len(whole)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 9, 11])
@pytest.mark.parametrize("settings", [{"orders": one} for one in (1, 2, 3, 8, "full", "auto")] + [{"votes": 5}])
def test_votes_are_counted_without_planning_them(size, settings):
    section = JudgeSection(**settings)
    assert count_votes(size, section) == len(plan_votes(task(*map(str, range(size))), section))


def test_a_few_votes_are_the_orders_of_before():
    for size in (2, 3, 5):
        some = task(*map(str, range(size)))
        assert [vote.order for vote in votes(some, 2)] == cyclic_orders(some, 2, 1)


def test_repeats_are_asked_and_paid_apart_and_kept_in_the_ledger(tmp_path):
    """The judge's third reply to the same message differs: the mean of 2, 2, 2, 2 and 7 for the better one is 3."""
    write(tmp_path, [row(1, SHORT, LONG)])

    def fault(call: Call) -> str:
        texts = candidates(call.body["messages"][-1]["content"])
        good = 7 if call.attempt == 3 else 2
        return "reply!" + reply({label: good if text == LONG else 1 for label, text in texts.items()})

    with Server(fault=fault) as server:
        result = run(config(tmp_path, server.url, votes=5))
        assert (result.calls, server.calls.total(), len(server.calls)) == (5, 5, 2)
        (tmp_path / "judgments.jsonl").unlink()
        again = run(config(tmp_path, server.url, votes=5))
        assert server.calls.total() == 5
    assert (again.receipt.calls, again.receipt.reused) == (0, 5)
    (judgment,) = judgments(tmp_path).values()
    assert judgment.scores == [1, 3]
    assert judgment.judge["votes"] == 5
    assert "orders" not in judgment.judge


def test_orders_beyond_the_cyclic_ones_are_said_not_to_be_asked(tmp_path):
    write(tmp_path, rows(1))
    log = Log()
    with Server() as server:
        judge.run(config(tmp_path, server.url, orders=5), log)
        assert server.calls.total() == 3
    assert any("--votes 5" in line for line in log.lines)


def test_votes_are_another_judge_than_orders(tmp_path):
    write(tmp_path, rows(1))
    with Server() as server:
        run(config(tmp_path, server.url))
        with pytest.raises(UserError, match=r"judge\.votes was None, now 3"):
            run(config(tmp_path, server.url, votes=3))


def orders(*given: tuple[list[int], int, int]) -> list[Order]:
    """Orders of three, each with the scores of completions 0 and 1; completion 2 has 5."""
    return [
        Order(shown, {"ABC"[place]: (zero, one, 5)[index] for place, index in enumerate(shown)}, "")
        for shown, zero, one in given
    ]


def test_of_up_to_three_orders_each_must_agree_and_of_more_each_relative_position():
    """0 is ahead by 4, 4, 4 where it is shown first, and by -1, 3 and 2 where it is not: one of six is noise."""
    first = [([0, 1, 2], 8, 4), ([2, 0, 1], 8, 4), ([0, 2, 1], 8, 4)]
    later = [([1, 0, 2], 5, 6), ([1, 2, 0], 7, 4), ([2, 1, 0], 6, 4)]
    assert any_inverts(orders(*first[:2], later[0]), 0, 1, {})
    assert not any_inverts(orders(*first, *later), 0, 1, {})
    # Behind in sum wherever it is shown later, 0 only wins by its place.
    later = [([1, 0, 2], 3, 6), ([1, 2, 0], 5, 4), ([2, 1, 0], 6, 5)]
    assert any_inverts(orders(*first, *later), 0, 1, {})
    # Repeats are no further orders.
    assert any_inverts(orders(*[first[0]] * 4, ([1, 0, 2], 3, 6)), 0, 1, {})


# Criteria


def criteria(tmp_path, text: str):
    (tmp_path / "rubric.md").write_text(text)
    return read_criteria(str(tmp_path / "rubric.md"))


def test_sections_are_criteria_with_what_is_common_to_all(tmp_path):
    truth, warmth = criteria(tmp_path, RUBRIC)
    assert [(one.name, one.weight) for one in (truth, warmth)] == [("Truth", 3), ("Warmth", 1)]
    for one, own, other in ((truth, "true", "kind"), (warmth, "kind", "true")):
        assert all(part in one.text for part in ("answers to a child", f"It is {own}.", "Use all of it."))
        assert f"It is {other}." not in one.text


@pytest.mark.parametrize("text", ["Be fair.", "# Fair\n\nBe fair.", "Be fair.\n\n## Scale\n\n1 to 10.", "### a\n### b"])
def test_without_two_sections_the_rubric_is_asked_as_a_whole(tmp_path, text):
    (one,) = criteria(tmp_path, text)
    assert (one.name, one.text) == ("", text)


def test_the_shipped_rubric_is_asked_as_a_whole():
    assert len(read_criteria(None)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("## A\n\na\n\n## A\n\nb", "same name"), ("## A (weight 0)\n\n## B (weight 0)", "weight above")],
)
def test_criteria_that_cannot_be_combined_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        criteria(tmp_path, text)


def by_criterion(call: Call) -> str:
    """The longer text is true (9 against 1) and unkind (2 against 6)."""
    scores = (9, 1) if "It is true." in call.text else (2, 6)
    texts = candidates(call.body["messages"][-1]["content"])
    longest = max(texts.values(), key=len)
    return "reply!" + reply({label: scores[text != longest] for label, text in texts.items()})


def test_criteria_are_scored_apart_and_combined_by_weight(tmp_path):
    """(3 · 9 + 2) / 4 = 7.25 for the longer one, (3 · 1 + 6) / 4 = 2.25 for the other."""
    (tmp_path / "rubric.md").write_text(RUBRIC)
    write(tmp_path, [row(1, SHORT, LONG)])
    settings = config(tmp_path, "", rubric=str(tmp_path / "rubric.md"))
    with Server(fault=by_criterion) as server:
        settings.judge.url = server.url
        assert run(settings, dry_run=True).calls == 4
        assert any("2 criteria" in said for said in run(settings, dry_run=True).estimate.assumptions)
        assert run(settings).judged == 1
        assert server.calls.total() == 4
        run(settings)
        assert server.calls.total() == 4
    (judgment,) = judgments(tmp_path).values()
    shown = CliRunner().invoke(app, ["inspect", "judgments", judgment.id, "--data", str(tmp_path)]).stdout
    assert re.search(r"Truth: A [19]  B [19]", shown)
    assert re.search(r"Warmth: A [26]  B [26]", shown)
    assert judgment.scores == [2.25, 7.25]
    assert judgment.judge["criteria"] == ["Truth", "Warmth"]
    for order in judgment.orders:
        assert {name: sorted(scores.values()) for name, scores in order.criteria.items()} == {
            "Truth": [1, 9], "Warmth": [2, 6],
        }  # fmt: skip
        assert json.loads(order.raw).keys() == {"Truth", "Warmth"}
        assert rationale(order) == "Truth: Why not.\nWarmth: Why not."


def test_a_panel_with_votes_and_criteria_comes_out_of_batches_as_it_does_live(tmp_path, monkeypatch):
    for wait in ("FIRST_POLL_SECONDS", "MAX_POLL_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(batch, wait, 0.02)
    (tmp_path / "rubric.md").write_text(RUBRIC)
    models = ["judge-a", "judge-b", "judge-c"]
    with BatchServer(seconds=0.05, fault=by_criterion) as server:
        for name in ("live", "batch"):
            write(tmp_path / name, rows(3))
            run(
                config(
                    tmp_path / name, server.url, model=models, votes=3, rubric=str(tmp_path / "rubric.md"),
                    batch=name == "batch",
                )
            )  # fmt: skip
    live, batched = (judgments(tmp_path / name) for name in ("live", "batch"))
    assert live == batched
    assert {len(one.orders) for one in live.values()} == {9}
    assert all(len(one.weights) == 3 for one in live.values())
