"""What a language model is asked about candidates: the shape of its reply, the schema, and what a reply says.

A reply is read for what it says: labels in any case and with words around them, scores as numbers or as text, a
ranking as a list or as "A > B" or left out. What does not say a score for every label is no verdict.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from msgspec import Struct

LOWEST, HIGHEST = 1, 10

_RANKED = f"""\
- `rationale`: for each label in turn, one short sentence of evidence from its text.
- `scores`: for every label an integer from {LOWEST} (worst) to {HIGHEST} (best), by the criteria at the top.
- `ranking`: every label once, best first, as the scores have it."""
_RATED = f"""\
- `rationale`: one or two short sentences of evidence from the candidate's text.
- `score`: an integer from {LOWEST} (worst) to {HIGHEST} (best), by the criteria at the top."""
_GRADED = """\
- `rationale`: one short sentence.
- `correct`: whether the candidate gives the right answer."""

GRADING = """\
You grade the answers of a quiz. The conversation holds a question and, as its last part, what the right answer is. The
candidate is correct if it gives that answer, in whatever words, style or length, and does not take it back or give
another one beside it. What else it says, and how, does not matter."""

_LABEL = re.compile(
    r"\W*(?:\d+\s*[.):]\s*)?(?:(?:candidate|completion|response|answer|option|text|label)[\W_]*)?([a-z]{1,2})\W*", re.I
)
_SCORE_TEXT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:(?:/|out of)\s*10(?:\.0)?)?\s*\.?\s*", re.I)
_BETWEEN = re.compile(r"[>≻»,;=\n]|→|->")
_TRUTHS = {"true": True, "yes": True, "false": False, "no": False}


class Verdict(Struct):
    """A valid reply: label -> score, and the labels best first; no labels where the judge ranked by its scores."""

    scores: dict[str, float]
    ranking: list[str]


class Form(Struct, frozen=True):
    """What is asked about the candidates: the shape of the reply, its schema, and how it becomes a verdict.

    `keys` are those of the reply that may hold the verdict, the one that is asked for first; `rubric` replaces the
    judge's own where the question is another one; `signed` asks for the code of the request as well.
    """

    shape: Callable[[Sequence[str]], str]
    explained: str
    schema: Callable[[Sequence[str]], dict[str, Any]]
    check: Callable[[dict[str, Any], Sequence[str]], Verdict]
    keys: tuple[str, ...]
    rubric: str | None = None
    signed: bool = False


def read_ranking(value: dict[str, Any], labels: Sequence[str]) -> Verdict:
    """Scores of all candidates and their ranking.

    Raises:
        ValueError: it does not say both; says what is wrong.
    """
    given, said = _first(value, "scores", "ratings", "score"), value.get("ranking")
    if given is None and (beside := _beside(value, labels)):
        given = beside
    ranking = [] if said in (None, "", []) else _labels(said, labels)
    if isinstance(given, list) and given and all(isinstance(one, dict) for one in given):
        pairs = [(_first(one, "label", "candidate", "name"), _first(one, "score", "rating")) for one in given]
    elif isinstance(given, dict):
        pairs = list(given.items())
    elif isinstance(given, list) and len(given) == len(labels) and ranking:
        pairs = list(zip(labels, given, strict=True))
    else:
        raise ValueError("not one score for each label")
    scores = {_label(label, labels): _score(score) for label, score in pairs}
    if len(scores) != len(pairs) or set(scores) != set(labels):
        raise ValueError("not one score for each label")
    if isinstance(given, list) and not isinstance(given[0], dict):
        in_turn = [scores[label] for label in ranking]
        if in_turn != sorted(in_turn, reverse=True):
            raise ValueError("scores without labels, which the ranking does not confirm")
    return Verdict({label: scores[label] for label in labels}, ranking)


def read_rating(value: dict[str, Any], labels: Sequence[str]) -> Verdict:
    """The score of one candidate.

    Raises:
        ValueError: there is none; says what is wrong.
    """
    return Verdict(dict.fromkeys(labels, _score(_first(value, "score", "rating"))), list(labels))


def read_grade(value: dict[str, Any], labels: Sequence[str]) -> Verdict:
    """Whether one answer is right: a score of 1 or 0.

    Raises:
        ValueError: it does not say.
    """
    correct = _first(value, "correct", "is_correct")
    if isinstance(correct, str):
        correct = _TRUTHS.get(correct.strip().lower())
    if not isinstance(correct, bool):
        raise ValueError("`correct` is neither true nor false")
    return Verdict(dict.fromkeys(labels, float(correct)), list(labels))


def _beside(value: dict[str, Any], labels: Sequence[str]) -> dict[str, Any]:
    """What an object says of each label in keys of its own; nothing unless of all."""
    found = {}
    for key, part in value.items():
        match = _LABEL.fullmatch(key) if isinstance(key, str) else None
        if match and match[1].upper() in labels:
            found[key] = part
    return found if len(found) == len(labels) > 1 else {}


def _first(value: dict[str, Any], *keys: str) -> Any:
    return next((value[key] for key in keys if key in value), None)


def _label(value: Any, labels: Sequence[str]) -> str:
    """The label that `b`, `candidate B` or `"B":` stands for."""
    found = _LABEL.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[1].upper() not in labels:
        raise ValueError("a label that was not shown")
    return found[1].upper()


def _labels(value: Any, labels: Sequence[str]) -> list[str]:
    """A ranking, given as a list, as text, or as an object of ranks."""
    if isinstance(value, dict):
        value = _by_rank(value)
    parts = [part for part in _BETWEEN.split(value) if part.strip()] if isinstance(value, str) else value
    if isinstance(parts, list) and len(parts) == 1 and len(labels) > 1 and isinstance(parts[0], str):
        parts = [part for part in _BETWEEN.split(parts[0]) if part.strip()]
    if isinstance(parts, list):
        parts = [_first(part, "label", "candidate", "name") if isinstance(part, dict) else part for part in parts]
    try:
        found = [_label(part, labels) for part in parts]
    except (TypeError, ValueError):
        found = []
    if sorted(found) != sorted(labels):
        raise ValueError("the ranking does not hold each label once")
    return found


def _by_rank(value: dict[str, Any]) -> list[Any]:
    """The labels of `{"1": "A", "2": "B"}` or of `{"A": 1, "B": 2}`, the lowest rank first; none of anything else."""
    if all(str(key).isdecimal() for key in value):
        return [value[key] for key in sorted(value, key=int)]
    if all(type(rank) is int for rank in value.values()) and len(set(value.values())) == len(value):
        return sorted(value, key=lambda label: value[label])
    return []


def _score(value: Any) -> float:
    """A score given as 8, 8.5, "8", "8/10" or {"score": 8}."""
    if isinstance(value, dict):
        value = _first(value, "score", "rating")
    if isinstance(value, str) and (found := _SCORE_TEXT.fullmatch(value)):
        value = float(found[1])
    if type(value) not in (int, float):
        raise ValueError(f"a score that is no number from {LOWEST} to {HIGHEST}")
    if not (LOWEST <= value <= HIGHEST and math.isfinite(value)):
        raise ValueError(f"a score that is not from {LOWEST} to {HIGHEST}")
    return float(value)


def _ranking_shape(labels: Sequence[str]) -> str:
    scores = ", ".join(f'"{label}": integer' for label in labels)
    return f'{{"rationale": "text", "scores": {{{scores}}}, "ranking": [labels]}}'


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_SCORE = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))}  # strict modes refuse minimum and maximum

# Several candidates beside each other, of which two are a comparison.
RANKING = Form(
    _ranking_shape,
    _RANKED,
    lambda labels: {
        "scores": _closed(dict.fromkeys(labels, _SCORE)),
        "ranking": {"type": "array", "items": {"type": "string", "enum": list(labels)}},
    },
    read_ranking,
    ("scores", "ratings", "score"),
)
# One candidate by itself.
RATING = Form(
    lambda _: '{"rationale": "text", "score": integer}',
    _RATED,
    lambda _: {"score": _SCORE},
    read_rating,
    ("score", "rating"),
)
# One answer to a question, beside the right one, which is the last message of the prompt.
GRADE = Form(
    lambda _: '{"rationale": "text", "correct": true or false}',
    _GRADED,
    lambda _: {"correct": {"type": "boolean"}},
    read_grade,
    ("correct", "is_correct"),
    GRADING,
)


def verdict_schema(labels: Sequence[str], strict: bool, form: Form = RANKING) -> dict[str, Any]:
    """`response_format` for a verdict: evidence first, every key required, no other."""
    code = {"code": {"type": "string"}} if form.signed else {}
    schema = _closed({**code, "rationale": {"type": "string"}, **form.schema(labels)})
    named = {"name": "verdict", "schema": schema}
    return {"type": "json_schema", "json_schema": named | ({"strict": True} if strict else {})}
