"""Two answers in columns of their own, and what says which is better: a winner, or a score each.

So are PKU-SafeRLHF (`response_0`, `response_1`, `better_response_id`), Chatbot Arena (`response_a`, `winner`; whole
`conversation_a` as well), AlpacaFarm (`output_1`, `output_2`, `preference` of 1 or 2) and HelpSteer3 (`response1`,
`overall_preference` from -3, the first, to 3). Written from what these data sets say of themselves. Reads nothing.
"""

import re
from typing import Any

from dpo_cli.data.columns import BAD, GOOD, Cells, number, read_conversation, read_turns
from dpo_cli.data.formats.pairs import divide, make
from dpo_cli.data.messages import Prompt, read_messages
from dpo_cli.data.records import Preference

_STEMS = ("response", "answer", "output", "completion", "conversation")
_ENDS = (("_a", "_b"), ("_0", "_1"), ("_1", "_2"), ("1", "2"))
_VERDICTS = (
    "winner", "preference", "preferred", "better", "choice", "better_response_id", "preferred_id",
    "overall_preference", "preference_strength",
)  # fmt: skip
_WON = ("winner_model_a", "winner_model_b", "winner_tie")
_SIGNED = ("overall_preference", "preference_strength")
_NAMED = re.compile(r"(?:(?:model|assistant|response|answer|output|completion)[_ ]?)?([ab012])")
_TIE = re.compile(r"(?:tie|both|neither|equal|same|none)\b.*")


def is_compared(cells: Cells) -> bool:
    """Whether a row has two answers side by side, and something that compares them."""
    names = _sides(cells)
    if names is None or cells.has(BAD) or cells.has(tuple(name for name in GOOD if name not in _VERDICTS)):
        return False
    return cells.has(_VERDICTS) is not None or _one_of_three(cells) or all(_score(name) in cells for name in names)


def read_compared(cells: Cells) -> Preference:
    """The pair of a row, with scores where the row has some; a tie is a pair without a gap, which is left out later.

    Raises:
        ValueError: what compares them cannot be understood.
    """
    names = _sides(cells)
    assert names is not None, "is_compared"
    values = [cells.take(name) for name in names]
    scores = [number(cells.take(_score(name)), _score(name)) if _score(name) in cells else None for name in names]
    better = _better_of(cells, names, scores)
    if names[0].startswith("conversation"):
        messages, *sides = divide(*(read_turns(value, name) for name, value in zip(names, values, strict=True)))
        prompt = Prompt(messages)
    else:
        prompt = read_conversation(cells)
        sides = [
            read_messages(value, cells.own(name), role="assistant", dropped=cells.dropped)
            for name, value in zip(names, values, strict=True)
        ]
    good, bad = (1, 0) if better > 0 else (0, 1)
    pair = make(cells, prompt, sides[good], sides[bad])
    higher, lower = scores[good], scores[bad]
    if higher is not None and lower is not None and (higher > lower or not better):
        pair.chosen_score, pair.rejected_score, pair.score_gap = higher, lower, higher - lower
    elif not better:
        pair.score_gap = 0.0
    return pair


def _sides(cells: Cells) -> tuple[str, str] | None:
    both = ((f"{stem}{first}", f"{stem}{second}") for stem in _STEMS for first, second in _ENDS)
    return next((names for names in both if all(name in cells for name in names)), None)


def _score(name: str) -> str:
    """The column of an answer's score: `answer_0` has `score_0`."""
    return re.sub(r"^[a-z]+", "score", name)


def _one_of_three(cells: Cells) -> bool:
    return all(name in cells for name in _WON)


def _better_of(cells: Cells, names: tuple[str, str], scores: list[float | None]) -> int:
    """As `_better`, by whatever the row has: one winner of three columns, a verdict, or the scores."""
    if _one_of_three(cells):
        won = [number(cells.take(name), name) or 0.0 for name in _WON]
        return (won[1] > won[0]) - (won[1] < won[0])
    verdict = cells.has(_VERDICTS)
    if verdict is not None:
        return _better(cells.take(verdict), verdict, names)
    first, second = scores
    if first is None or second is None:
        raise ValueError(f'"{_score(names[0])}" and "{_score(names[1])}" are not both numbers')
    return (second > first) - (second < first)


def _better(value: Any, column: str, names: tuple[str, str]) -> int:
    """Which answer is better: -1 the first, 1 the second, 0 neither.

    Raises:
        ValueError: it says none of these.
    """
    ends = [name[-1] for name in names]
    if column in _SIGNED:
        signed = number(value, column)
        return 0 if not signed else 1 if signed > 0 else -1
    text = str(value).strip().lower() if not isinstance(value, bool) else ""
    text = text.removesuffix(".0")
    match = _NAMED.fullmatch(text)
    if match and match[1] in ends:
        return 1 if match[1] == ends[1] else -1
    if text in names:
        return 1 if text == names[1] else -1
    if _TIE.fullmatch(text):
        return 0
    raise ValueError(f'"{column}" is {value!r}: neither {names[0]} nor {names[1]} nor a tie')
