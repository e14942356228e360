"""Prompts with their judgments, each read when its turn comes, and the pairs that completions of one prompt make.

Reads completions.jsonl and judgments.jsonl; writes nothing. Of the rows only the places in their files are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

from dpo_cli.analysis.length_bias import Points, deviations, without_length
from dpo_cli.data.jsonl import LatestRows
from dpo_cli.data.records import (
    Completions,
    Judgment,
    Preference,
    canonical,
    completions_id,
    message_key,
    said,
)
from dpo_cli.judges._ranking import any_inverts
from dpo_cli.stages.pair.reasons import FAILED
from dpo_cli.stages.pair.rollouts import Rollout, make_pair

COMPLETIONS, JUDGMENTS = "completions.jsonl", "judgments.jsonl"


class NoPair(Exception):
    """Why a prompt gives no pair."""


class JudgedPrompt(Struct, gc=False):
    """A prompt with its judgment; `ranking` holds the completions that may be a side, best first."""

    row: Completions
    judgment: Judgment
    scores: list[float]
    ranking: list[int]


class JudgedPrompts:
    """Judgments with their completions, by id.

    Args:
        judgments: by id.
        completions: by id.
        length_control: take what is linear in length out of the scores; everything is read for it once.

    `keys` are the ids in their order; `errors` are those of the judgments that were looked at.
    """

    def __init__(
        self, judgments: Mapping[str, Judgment], completions: Mapping[str, Completions], length_control: bool
    ) -> None:
        self.keys = sorted(judgments.keys() | completions.keys())
        self.errors: list[str] = []
        self._judgments = judgments
        self._completions = completions
        self._slope: float | None = None
        if length_control:
            points = Points()
            for key, judgment in judgments.items():
                points.add(deviations(judgment, completions.get(key)))
            slope = points.slope()
            self._slope = slope.value if slope is not None else None

    def __getitem__(self, key: str) -> JudgedPrompt:
        """A prompt of which two completions or more may be sides.

        Raises:
            NoPair: it gives no pair, whatever the strategy; says why.
        """
        row, judgment = self._completions.get(key), self._judgments.get(key)
        if judgment is not None and judgment.error is not None:
            self.errors.append(judgment.error)
        if self._slope is not None and judgment is not None and row is not None:
            judgment = without_length(judgment, row, self._slope)
        return _usable(row, judgment)

    def completions(self, key: str) -> Completions:
        """The completions of a prompt."""
        return self._completions[key]


@contextmanager
def judged_prompts(data: Path, length_control: bool) -> Iterator[JudgedPrompts | None]:
    """The prompts of a folder; None where nothing was judged.

    Raises:
        UserError: `file:line` of what is no record.
    """
    with LatestRows(data / JUDGMENTS, Judgment) as judgments, LatestRows(data / COMPLETIONS, Completions) as answers:
        yield JudgedPrompts(judgments, answers, length_control) if judgments else None


def _usable(row: Completions | None, judgment: Judgment | None) -> JudgedPrompt:
    if judgment is None:
        raise NoPair("not judged yet")
    if row is None:
        raise NoPair("judged, but no longer in completions.jsonl")
    if judgment.error is not None:
        raise NoPair(FAILED)
    if judgment.skipped is not None:
        raise NoPair(judgment.skipped.partition(":")[0])
    if judgment.completions_id != completions_id(row.completions, row.messages):
        raise NoPair("judged before its completions changed")
    scores, ranking = judgment.scores or [], judgment.ranking or []
    if len(scores) != len(row.completions) or sorted(ranking) != list(range(len(scores))):
        raise NoPair("the judgment does not fit its completions")
    ranking = _distinct(row, ranking)
    if len(ranking) < 2:
        raise NoPair("fewer than two different texts")
    return JudgedPrompt(row, judgment, scores, ranking)


def _distinct(row: Completions, ranking: Sequence[int]) -> list[int]:
    """Of identical texts the first stands for all: it is the one that the judge saw; one without text never does."""
    keys: list[object]
    if any(row.messages):
        answers = row.answers
        keys = [message_key(answer) for answer in answers]
        texts = [canonical(said(answer)) for answer in answers]
    else:  # what a message with a text and nothing else comes to
        texts = [canonical(text) for text in row.completions]
        keys = [*texts]
    first = {key: index for index, key in reversed(list(enumerate(keys)))}
    return [index for index in ranking if first[keys[index]] == index and texts[index]]


def inverted(prompt: JudgedPrompt, chosen: int, rejected: int) -> bool:
    """Whether the judge, in any order, preferred the rejected completion; never so if it did not see it.

    `consistent` is about the best and the worst: it speaks for other pairs only where no orders do.
    """
    orders = prompt.judgment.orders or []
    if orders and rejected not in orders[0].order:
        return False
    meant = not orders or (chosen, rejected) == (prompt.ranking[0], prompt.ranking[-1])
    if meant and prompt.judgment.consistent is False:
        return True
    return any_inverts(orders, chosen, rejected, prompt.judgment.weights)


def preference(prompt: JudgedPrompt, chosen: int, rejected: int) -> Preference:
    """The pair of two completions of a prompt."""
    return make_pair(*(side_of(prompt.row, index, prompt.scores[index]) for index in (chosen, rejected)))


def side_of(row: Completions, index: int, score: float) -> Rollout:
    """One completion and its score, as a side of a pair."""
    return Rollout(row.prompt, [row.answer(index)], score, row.finish_reasons[index], row.tools)
