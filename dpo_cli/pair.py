"""Judgments to preference pairs: reads completions.jsonl and judgments.jsonl, writes train.jsonl and val.jsonl.

Pure and free: the same files and settings give the same bytes. A prompt gives at most one pair, its best against its
worst judged completion; a completion without text is never a side. Which file a pair goes to depends on its prompt
alone, so that no prompt is in both and adding prompts moves none across. Other strategies, rollouts and imports are
not covered.
"""

from collections import Counter
from pathlib import Path

from msgspec import Struct

from dpo_cli.config import Config, PairSection
from dpo_cli.errors import UserError
from dpo_cli.judges import inverts
from dpo_cli.length import length_controlled
from dpo_cli.schema import (
    Completions,
    Judgment,
    Message,
    Preference,
    canonical,
    completions_id,
    preference_id,
    split_side,
)
from dpo_cli.store import read_latest, write_rows

EPSILON = 1e-9  # means of integers, such as 7.000000000000001


class Paired(Struct, kw_only=True):
    """How many pairs went where, and why the other prompts gave none."""

    train: int
    val: int
    skipped: dict[str, int]
    warnings: list[str]
    train_path: str
    val_path: str


class _NoPair(Exception):
    """Why a prompt gives no pair."""


def run(config: Config, dry_run: bool = False) -> Paired:
    """Make the pairs and replace both files; with `dry_run` only count them.

    Raises:
        UserError: no judgments, or no pair comes out of them; the files are as they were.
    """
    data = Path(config.data)
    judgments = read_latest(data / "judgments.jsonl", Judgment)
    if not judgments:
        raise UserError("no judgments", where=str(data / "judgments.jsonl"), hint="nothing-dpo judge")
    completions = read_latest(data / "completions.jsonl", Completions)
    used = length_controlled(judgments, completions) if config.pair.length_control else judgments
    sides: dict[bool, list[Preference]] = {False: [], True: []}
    skipped: Counter[str] = Counter()
    for key in sorted(judgments.keys() | completions.keys()):
        try:
            pair = make_pair(completions.get(key), used.get(key), config.pair)
        except _NoPair as reason:
            skipped[str(reason)] += 1
        else:
            sides[split_side(key, config.pair.seed, config.pair.val_share)].append(pair)
    train, val = sides[False], sides[True]
    if not train and not val:
        raise _nothing(skipped, config.pair)
    result = Paired(
        train=len(train), val=len(val), skipped=dict(skipped.most_common()), warnings=_warn(train, val, config.pair),
        train_path=str(data / "train.jsonl"), val_path=str(data / "val.jsonl"),
    )  # fmt: skip
    if not dry_run:
        # If the disk fills up between the two, they still share no prompt.
        write_rows(Path(result.val_path), val)
        write_rows(Path(result.train_path), train)
    return result


def make_pair(row: Completions | None, judgment: Judgment | None, settings: PairSection) -> Preference:
    """The pair of one prompt.

    Raises:
        _NoPair: there is none; says why.
    """
    if judgment is None:
        raise _NoPair("not judged yet")
    if row is None:
        raise _NoPair("judged, but no longer in completions.jsonl")
    if judgment.error is not None:
        raise _NoPair("the judge failed")
    if judgment.skipped is not None:
        raise _NoPair(judgment.skipped.partition(":")[0])
    if judgment.completions_id != completions_id(row.completions):
        raise _NoPair("judged before its completions changed")
    scores, ranking = judgment.scores or [], judgment.ranking or []
    if len(scores) != len(row.completions) or sorted(ranking) != list(range(len(scores))):
        raise _NoPair("the judgment does not fit its completions")
    # Of identical texts the first stands for all: it is the one that the judge saw.
    first = {canonical(text): index for index, text in reversed(list(enumerate(row.completions)))}
    ranking = [index for index in ranking if first[canonical(row.completions[index])] == index]
    ranking = [index for index in ranking if canonical(row.completions[index])]
    if len(ranking) < 2:
        raise _NoPair("fewer than two different texts")
    chosen, rejected = ranking[0], ranking[-1]
    gap = scores[chosen] - scores[rejected]
    if gap <= EPSILON:
        raise _NoPair("a tie")
    if gap < settings.min_gap - EPSILON:
        raise _NoPair("the gap is below min_gap")
    if settings.require_consistent and _inverted(judgment, chosen, rejected):
        raise _NoPair("an order inverts the pair")
    return _preference(row, scores, chosen, rejected)


def _inverted(judgment: Judgment, chosen: int, rejected: int) -> bool:
    """Whether the judge, in any order, preferred the rejected completion; never so if it did not see it."""
    orders = judgment.orders or []
    if orders and rejected not in orders[0].order:
        return False
    return judgment.consistent is False or any(inverts(order, chosen, rejected) for order in orders)


def _preference(row: Completions, scores: list[float], chosen: int, rejected: int) -> Preference:
    good, bad = _answer(row.completions[chosen]), _answer(row.completions[rejected])
    return Preference(
        id=preference_id(row.prompt, good, bad), prompt=row.prompt, chosen=good, rejected=bad,
        chosen_score=scores[chosen], rejected_score=scores[rejected], score_gap=scores[chosen] - scores[rejected],
        chosen_finish_reason=row.finish_reasons[chosen], rejected_finish_reason=row.finish_reasons[rejected],
    )  # fmt: skip


def _answer(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _warn(train: list[Preference], val: list[Preference], settings: PairSection) -> list[str]:
    """What is odd about the split. It is not mended: moving a prompt across would break it for every later run."""
    if not val and settings.val_share > 0:
        return [
            f"val.jsonl is empty: none of the {len(train)} pairs' prompts falls into the share of "
            f"{settings.val_share:g}; make more pairs or raise pair.val_share, else there is nothing to evaluate on"
        ]
    if not train:
        return [f"train.jsonl is empty: all {len(val)} pairs are held out; make more pairs or lower pair.val_share"]
    return []


# What to try, by the reason that is most frequent.
_HINTS = {
    "not judged yet": "nothing-dpo judge",
    "the judge failed": "nothing-dpo judge, which asks again",
    "judged before its completions changed": "nothing-dpo judge",
    "the gap is below min_gap": "a lower --min-gap, or more completions a prompt: nothing-dpo generate --n 5",
    "a tie": "more completions a prompt: nothing-dpo generate --n 5",
    "an order inverts the pair": "--no-require-consistent, or a stronger judge model",
}


def _nothing(skipped: Counter[str], settings: PairSection) -> UserError:
    reasons = ", ".join(f"{count} x {reason}" for reason, count in skipped.most_common())
    most = skipped.most_common(1)[0][0]
    hint = _HINTS.get(most, "more varied completions: nothing-dpo generate --temperature 1.0 --n 5")
    if most == "the gap is below min_gap":
        hint += f" (min_gap is {settings.min_gap:g})"
    return UserError(f"no pair comes out of {skipped.total()} prompts: {reasons}", hint=hint)
