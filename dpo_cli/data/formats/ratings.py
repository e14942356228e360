"""One prompt's answers with their scores: UltraFeedback's raw rows, Argilla's and distilabel's, NeMo RL's, and KTO's.

Reads and writes nothing; which answers are paired is a strategy's choice, elsewhere.
"""

from collections import Counter
from typing import Any

from msgspec import Struct

from dpo_cli.data.columns import ANSWER, BAD, CANDIDATES, LABEL, MARKS, Cells, number, read_conversation
from dpo_cli.data.formats.pairs import last_turn, make, transcript_prompt
from dpo_cli.data.messages import Message, Tool, read_messages
from dpo_cli.data.records import Preference

# Under which the answers of a list of objects say what they are, and how good.
TEXTS = ("response", "text", "answer", "completion", "generation", "output", "content", "message", "messages")
SCORES = ("fine-grained_score", "score", "rating", "reward", "overall_score", "overall_rating")
RANKS = ("rank", "ranks", "ranking")


class ScoredAnswers(Struct):
    """One prompt's answers with their scores, of which a strategy makes pairs; `format` is that of the row."""

    prompt: list[Message]
    tools: list[Tool] | None
    answers: list[list[Message]]
    scores: list[float]


def read_nemo_rl(cells: Cells) -> Preference | ScoredAnswers:
    """`{"context", "completions": [{"rank", "completion"}]}`, the lower rank the better one."""
    completions = cells.take("completions")
    prompt = read_conversation(cells, keep_answer=True)
    ranked = []
    for one in completions:
        rank = number(one.get("rank"), "completions[].rank")
        if rank is None:
            raise ValueError('"completions" has one without a rank')
        ranked.append((rank, read_messages(one.get("completion"), "completions[].completion", role="assistant")))
    if len(ranked) != 2:
        return ScoredAnswers(
            prompt.messages, prompt.tools, [answer for _, answer in ranked], [-rank for rank, _ in ranked]
        )
    (best, chosen), (worst, rejected) = sorted(ranked, key=lambda one: one[0])
    if best == worst:
        raise ValueError("both completions have the same rank")
    return make(cells, prompt, chosen, rejected)


def read_kto(cells: Cells) -> ScoredAnswers:
    """`{"prompt", "completion", "label"}`: one answer that is good or not."""
    value = cells.take(*LABEL)
    text = value.strip().lower() if isinstance(value, str) else value
    good = {"true": 1.0, "false": 0.0, "1": 1.0, "0": 0.0, True: 1.0, False: 0.0}.get(text)
    if good is None:
        raise ValueError(f'"label" is {value!r}, not true or false')
    prompt = read_conversation(cells, keep_answer=True)
    if name := cells.has(ANSWER):
        answer = read_messages(cells.take(name), cells.own(name), role="assistant", dropped=cells.dropped)
        return ScoredAnswers(prompt.messages, prompt.tools, [answer], [good])
    start = last_turn(prompt.messages)
    if not start:
        raise ValueError('no "completion", and "messages" does not end with an assistant message')
    return ScoredAnswers(prompt.messages[:start], prompt.tools, [prompt.messages[start:]], [good])


def read_rated(cells: Cells) -> ScoredAnswers:
    """Answers in one list, and their scores in another or beside each; those without a score are counted and left."""
    name, marks = cells.has(CANDIDATES), cells.has(MARKS)
    candidates = cells.take(name) if name else None
    values = cells.take(marks) if marks else None
    if not isinstance(candidates, list):
        raise ValueError(f'"{name}" is not a list of answers')
    if values is None:
        values = [_mark(one) for one in candidates]
    elif marks == "ranks" and isinstance(values, list):
        values = [None if one is None else -(number(one, "ranks") or 0.0) for one in values]
    if not isinstance(values, list) or len(values) != len(candidates):
        raise ValueError(f'"{marks}" is not a list of as many scores as there are {name}')
    prompt = transcript_prompt(read_conversation(cells))
    answers, scores = [], []
    for one, value in zip(candidates, values, strict=True):
        score = number(value, marks or "score") if value is not None else None
        answer = _candidate(one, name or "", cells.dropped)
        if score is None or answer is None:
            cells.dropped[f"{name}[] without a score"] += 1
            continue
        answers.append(answer)
        scores.append(score)
    return ScoredAnswers(prompt.messages, prompt.tools, answers, scores)


def _candidate(value: Any, field: str, dropped: Counter[str]) -> list[Message] | None:
    if isinstance(value, dict) and "role" not in value:
        text = next((value[name] for name in TEXTS if value.get(name) is not None), None)
        dropped.update(f"{field}[].{name}" for name in ("custom_system_prompt", "critique") if value.get(name))
        value = text
    return None if value is None else read_messages(value, f"{field}[]", role="assistant")


def _mark(value: Any) -> Any:
    """What one answer says of its own worth; UltraFeedback's annotations as the mean of their ratings."""
    if not isinstance(value, dict):
        return None
    for name in SCORES:
        if value.get(name) is not None:
            return value[name]
    for name in RANKS:
        if (rank := value.get(name)) is not None:
            return -(number(rank, name) or 0.0)
    notes = value.get("annotations")
    ratings = (
        [note.get("Rating") for note in notes.values() if isinstance(note, dict)] if isinstance(notes, dict) else []
    )
    known = [found for one in ratings if one is not None and (found := number(one, "Rating")) is not None]
    return sum(known) / len(known) if known else None


def is_ranked(cells: Cells) -> bool:
    """Whether a row is NeMo RL's."""
    completions = cells.peek("completions")
    return (
        isinstance(cells.peek("context"), (list, str))
        and isinstance(completions, list)
        and all(isinstance(one, dict) and "rank" in one and "completion" in one for one in completions)
    )


def is_rated(cells: Cells) -> bool:
    """Whether a row has several answers with scores."""
    name = cells.has(CANDIDATES)
    candidates = cells.peek(name)
    if not isinstance(candidates, list) or cells.has(BAD):
        return False
    marked = all(isinstance(one, dict) for one in candidates) and any(_mark(one) is not None for one in candidates)
    return cells.has(MARKS) is not None or marked


def is_raw(cells: Cells) -> bool:
    """Whether a row is one of UltraFeedback's raw ones."""
    completions = cells.peek("completions")
    return isinstance(completions, list) and all(isinstance(one, dict) and "response" in one for one in completions)
