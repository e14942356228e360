"""The columns of a row by what they mean: each is read, known to be harmless, left out and named, or refused.

Columns go by many names; `--columns prompt=question,input=context` says what others mean. Reads and writes nothing.
"""

import ast
import math
import re
from collections import Counter
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import msgspec

from dpo_cli.data.bad_rows import Fault
from dpo_cli.data.messages import MEDIA, REASONING, Message, Prompt, from_cell, read_messages, read_tools, said
from dpo_cli.errors import UserError

_Row = dict[str, Any]

# What a conversation so far goes by.
MESSAGES = ("messages", "conversations", "conversation", "context")
# What one user's text goes by; `input` joins an instruction, and stands alone where there is none.
ASKED = ("prompt", "instruction", "question", "query", "input")
SYSTEM = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")
GOOD = (
    "chosen", "good", "better", "preferred", "accepted", "chosen_response", "response_chosen", "chosen_answer",
    "preferred_response", "preferred_output", "preferred_completion", "winner", "positive", "response_j",
)  # fmt: skip
BAD = (
    "rejected", "bad", "worse", "dispreferred", "rejected_response", "response_rejected", "rejected_answer",
    "dispreferred_response", "non_preferred_output", "non_preferred_completion", "loser", "negative",
    "rejected_messages", "response_k",
)  # fmt: skip
ANSWER = ("completion", "response", "output", "answer", "answers", "target")
LABEL = ("label", "kto_tag")
CANDIDATES = ("generations", "completions", "responses", "answers", "candidates", "all_generated_responses")
MARKS = ("ratings", "rating", "scores", "rewards", "ranks", "overall_scores", "all_rm_scores")

# What `--columns` may map to: role -> the name under which it is read here.
ROLES = {
    "prompt": "prompt", "messages": "messages", "system": "system", "input": "input", "history": "history",
    "tools": "tools", "chosen": "chosen", "rejected": "rejected", "completion": "completion", "answer": "answer",
    "chosen_score": "chosen_score", "rejected_score": "rejected_score", "margin": "margin", "label": "label",
    "chosen_reasoning": "chosen_reasoning", "rejected_reasoning": "rejected_reasoning",
    "generations": "generations", "ratings": "ratings", "id": "id", "ignore": "",
}  # fmt: skip

NAMES = frozenset(
    {*MESSAGES, *ASKED, *SYSTEM, *TOOLS, *GOOD, *BAD, *ANSWER, *LABEL, *CANDIDATES, *MARKS, "history", "id"}
)
_THOUGHTS = {
    "": REASONING,
    **{
        side: (*(f"{side}_{name}" for name in REASONING), *(f"{name}_{side}" for name in REASONING))
        for side in ("chosen", "rejected")
    },
}
_PLACES = ("input", "system", "history", "tools", "chosen_reasoning", "rejected_reasoning")
# What a row may say about itself that is nothing to train on.
HARMLESS = re.compile(
    r"(_id|id|ids|idx|index|uid|uuid|(prompt|row|question|conversation|sample|example|chosen|rejected|pair|turn)_?id|"
    r"unnamed:?_?\d*|__index_level_\d+__|number|"
    r"source|dataset|data_source|subset|split|origin|category|categories|topic|domain|task|type|tags?|"
    r"lang|language|locale|(chosen_|rejected_|generation_|prompt_)?models?(_name)?|annotators?|created(_at)?|"
    r"timestamp|date|hash|version|meta|metadata|info|license|url|"
    r"num_?turns|turns?|(chosen_|rejected_|prompt_)?(length|len|n_?tokens|num_?tokens|tokens|token_?count)|"
    r"(chosen_|rejected_)?finish_reasons?|parallel_tool_calls|score_gap|distilabel_metadata)"
)
# What carries content and is nowhere read: dropping it would change what a row says.
CONTENT = {
    "input", "context", "history", "documents", "document", "passages", "passage", "tool_calls", "function_call",
    "persona", "few_shot", "demonstrations", "prefix", "suffix", "title", "post", "background",
}  # fmt: skip
_SCORE = re.compile(
    r"(?:(?:avg|mean|overall|llm|gpt4)_)?(?:(chosen|rejected)_(?:(?:avg|mean|overall)_)?(?:score|rating|reward|grade)s?"
    r"|(?:score|rating|reward|grade)s?_(chosen|rejected))"
)


@lru_cache(4096)
def plain_name(name: str) -> str:
    """A column's name without capitals, blanks and hyphens."""
    return re.sub(r"[\s\-]+", "_", name.strip().lstrip("\ufeff")).lower()


@lru_cache(4096)
def _scored_side(name: str) -> str | None:
    """Whose score a column is: `chosen`, `rejected`, or nobody's."""
    match = _SCORE.fullmatch(name)
    return next(filter(None, match.groups())) if match else None


@lru_cache(4096)
def _is_harmless(name: str) -> bool:
    return HARMLESS.fullmatch(name.strip()) is not None


def read_mapping(text: str | None) -> dict[str, str]:
    """`prompt=question,ignore=note` as column -> the name under which it is read; "" for one to be left out.

    Raises:
        UserError: it is no such list, or names no role that there is.
    """
    mapping: dict[str, str] = {}
    for part in filter(None, (text or "").split(",")):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or role not in ROLES:
            known = ", ".join(ROLES)
            raise UserError(f"'{part}' is no ROLE=COLUMN", where="--columns", hint=f"roles are {known}")
        mapping[plain_name(column)] = ROLES[role]
    return mapping


class Cells:
    """The cells of one row; knows which of them were read.

    Args:
        row: as the file has it.
        mapping: what `read_mapping` gave.
        dropped: counts what is left out, by name.
    """

    def __init__(self, row: _Row, mapping: dict[str, str] | None = None, dropped: Counter[str] | None = None) -> None:
        self.mapping = mapping or {}
        self.dropped: Counter[str] = Counter() if dropped is None else dropped
        self._own: dict[str, str] = {}  # name -> the file's own
        self._values: _Row = {}
        for given, value in row.items():
            name = plain_name(str(given))
            if self.mapping and name in self.mapping:
                name = self.mapping[name]
            elif self.mapping and name in self.mapping.values():
                name = f"{name} "  # the mapped one has its place
            if name and value is not None:
                self._values[name] = value
                self._own[name] = str(given)
        self._left = dict.fromkeys(self._values)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    @property
    def names(self) -> list[str]:
        """The file's names of what is there."""
        return sorted(self._own.values())

    @property
    def left(self) -> list[str]:
        """The file's names of what is there and not yet read."""
        return [self._own[name] for name in self._left if not _is_empty(self._values[name])]

    def has(self, names: tuple[str, ...]) -> str | None:
        """The first of these names that is there and not yet read."""
        return next((name for name in names if name in self._left), None)

    def peek(self, name: str | None) -> Any:
        """A cell that is not thereby read."""
        return self._values.get(name) if name else None

    def take(self, *names: str) -> Any:
        """The first of these cells that is there; None where none is."""
        name = self.has(names)
        if name is None:
            return None
        del self._left[name]
        return self._values[name]

    def own(self, name: str) -> str:
        """The file's own name of a column."""
        return self._own.get(name, name)

    def score(self, side: str) -> float | None:
        """The score of `chosen` or `rejected`, under any of its names; None where it is not known.

        Raises:
            ValueError: it is no number.
        """
        found = None
        for name in [name for name in self._left if _scored_side(name) == side]:
            value = number(self._values[name], self.own(name))
            self._left.pop(name)
            found = value if found is None else found
        return found

    def forget_score(self, side: str) -> None:
        """The scores of a side say nothing here."""
        self._left = {name: None for name in self._left if _scored_side(name) != side}

    def reasoning(self, side: str = "") -> str | None:
        """What a side, or the answer, thought before it, where that is a column of its own."""
        value = self.take(*_THOUGHTS[side])
        if value is None or value == "":
            return None
        if not isinstance(value, str):
            raise ValueError(f'the reasoning of "{side or "the answer"}" is not a text')
        return value

    def finish(self, keep: Collection[str] = ()) -> None:
        """Nothing else is read: harmless columns pass, content that has no place is refused, the rest is counted.

        Args:
            keep: columns that are read elsewhere.

        Raises:
            ValueError: a column carries content that has no place.
        """
        for name in self._left:
            own, value = self._own[name], self._values[name]
            if name in keep or _is_empty(value) or _is_harmless(name):
                continue
            kind = name.strip().rstrip("s")
            if any(kind == medium or kind.endswith(f"_{medium}") for medium in MEDIA):
                raise ValueError(f'the row has "{own}"; only text can be read')
            if name in CONTENT or name in REASONING:
                raise ValueError(
                    f'the column "{own}" has no place here; --columns ROLE={own} gives it one (roles: '
                    f"{', '.join(_PLACES)}), --columns ignore={own} leaves it out"
                )
            self.dropped[own] += 1


def number(value: Any, name: str) -> float | None:
    """A number, also where it stands as text; None where it is not known.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str):
        if value.strip().lower() in ("", "null", "none", "na", "n/a"):
            return None
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f'"{name}" is not a number') from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            value = float(value) if not isinstance(value, (list, dict)) else None
        except (TypeError, ValueError):
            value = None
        if value is None:
            raise ValueError(f'"{name}" is not a number')
    if not math.isfinite(value):
        raise ValueError(f'"{name}" is {value}, not a number; null says that it is not known')
    return float(value)


def _is_empty(value: Any) -> bool:
    return value in ("", [], {}) or (isinstance(value, float) and math.isnan(value))


def read_conversation(cells: Cells, keep_answer: bool = False) -> Prompt:
    """The prompt of a row: its messages or texts, with system text, history and tools in their places.

    Args:
        cells: the row.
        keep_answer: keep an assistant's message at the end of `messages`, which else is the answer and not read.

    Raises:
        ValueError: the row holds no usable prompt.
    """
    tools = read_tools(cells.take(*TOOLS))
    prompt = _asked(cells, keep_answer)
    history = cells.peek("history")
    if not _is_empty(history) and history is not None:
        prompt = [*read_history(cells.take("history")), *prompt]
    prompt = with_system(prompt, cells)
    if not any(said(message).strip() for message in prompt):
        raise ValueError("the prompt has no text")
    return Prompt(prompt, tools)


def _asked(cells: Cells, keep_answer: bool) -> list[Message]:
    # A `context` that is a text is what a question is about.
    talk = next((name for name in MESSAGES if name in cells and (name != "context" or _is_talk(cells.peek(name)))), "")
    if "prompt" not in cells and talk:
        messages = read_turns(cells.take(talk), cells.own(talk), cells.dropped)
        if keep_answer or messages[-1]["role"] != "assistant":
            return messages
        if len(messages) == 1:
            raise ValueError(f'"{cells.own(talk)}" holds an answer and nothing that it answers')
        return messages[:-1]
    name = cells.has(ASKED)
    if name is None:
        raise Fault(
            f'no "prompt" and no "messages"; the row has {", ".join(cells.names) or "nothing"}',
            hint="--columns prompt=NAME, where another column holds it",
        )
    messages = read_messages(cells.take(name), cells.own(name), dropped=cells.dropped)
    joins = name == "instruction" or "input" in cells.mapping.values()
    more = cells.take("input") if joins and isinstance(cells.peek("input"), str) else ""
    if not more:
        return messages
    # A line each, as LLaMA-Factory and ms-swift join an instruction and its input.
    last = messages[-1]
    return [*messages[:-1], {**last, "content": f"{last['content']}\n{more}" if last["content"] else more}]


def _is_talk(value: Any) -> bool:
    return isinstance(value, (list, dict)) or (isinstance(value, str) and from_cell(value, "context") is not None)


def read_turns(value: Any, field: str, dropped: Counter[str] | None = None) -> list[Message]:
    """Messages, or turns of `{"human": …, "assistant": …}` and `{"input": …, "output": …}`.

    Raises:
        ValueError: naming the field.
    """
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for asked, answered in (("human", "assistant"), ("user", "assistant"), ("input", "output")):
            if asked in value[0] and answered in value[0]:
                pairs = [(turn.get(asked), turn.get(answered)) for turn in value if isinstance(turn, dict)]
                return _turns(pairs, field)
    return read_messages(value, field, dropped=dropped)


def read_history(value: Any) -> list[Message]:
    """Earlier turns: a list of [question, answer], as JSON too, or messages.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            try:
                value = ast.literal_eval(value.strip())
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                raise ValueError('"history" is not a list of [question, answer]') from None
    if isinstance(value, (list, tuple)) and all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value):
        return _turns([(turn[0], turn[1]) for turn in value], "history")
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return read_turns(value, "history")
    raise ValueError('"history" is not a list of [question, answer]')


def _turns(pairs: list[tuple[Any, Any]], field: str) -> list[Message]:
    messages: list[Message] = []
    for asked, answered in pairs:
        for role, text in (("user", asked), ("assistant", answered)):
            if text is None:
                continue
            if not isinstance(text, str):
                raise ValueError(f'"{field}" has a turn that is not a text')
            messages.append({"role": role, "content": text})
    return messages


def with_system(prompt: list[Message], cells: Cells) -> list[Message]:
    """The prompt with the row's system text, if it does not have it already.

    Raises:
        ValueError: it has another one.
    """
    name = cells.has(SYSTEM)
    if name is None or _is_empty(cells.peek(name)):
        return prompt
    own, text = cells.own(name), cells.take(name)
    if not isinstance(text, str):
        raise ValueError(f'"{own}" is not a text')
    if prompt and prompt[0]["role"] == "system":
        if prompt[0]["content"].strip() == text.strip():
            return prompt
        raise ValueError(f'"{own}" says something else than the system message of the prompt')
    return [{"role": "system", "content": text}, *prompt]
