"""Rows of prompts and of demonstrations, in the forms that the field uses.

A prompt is `prompt`, `messages`, ShareGPT's `conversations`, `instruction` with its `input`, `question` or `query`,
what the sides of a preference begin with, or what the `body` of a request for OpenAI's Batch API asks; `system`,
`history` and `tools` belong to it. In an array a text alone is a prompt. An answer is `completion`, `response`,
`output` or `answer`, or the assistant's message that ends `messages`. Reads and writes nothing.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from dpo_cli.data.bad_rows import BadRows, Fault
from dpo_cli.data.columns import (
    ANSWER,
    ASKED,
    BAD,
    CANDIDATES,
    GOOD,
    LABEL,
    MARKS,
    MESSAGES,
    Cells,
    read_conversation,
    read_mapping,
)
from dpo_cli.data.formats.preferences import read_pair
from dpo_cli.data.messages import Message, Prompt, read_messages
from dpo_cli.data.reader import parse_rows

REQUEST = ("custom_id", "method", "url")  # what a request for a batch has beside its body
ANSWERS = frozenset({*GOOD, *BAD, *ANSWER, *LABEL, *CANDIDATES, *MARKS})


class PromptFile:
    """Reads a file of prompts as `--columns` and `--skip-bad` say, and knows what it left out.

    Args:
        path: the file, or a folder of files.
        columns: what columns mean.
        skip_bad: leave rows out that can't be read.

    Raises:
        UserError: `columns` can't be read.
    """

    def __init__(self, path: Path, columns: str | None = None, skip_bad: bool = False) -> None:
        self.path = path
        self.dropped: Counter[str] = Counter()
        self.bad = BadRows(skip_bad, offer=True)
        self._mapping = read_mapping(columns)

    def __iter__(self) -> Iterator[Prompt]:
        rows = parse_rows(
            self.path, lambda row: read_prompt(row, self._mapping, self.dropped), self.bad, texts="prompt"
        )
        return (prompt for _, prompt in rows)

    def notes(self, folder: Path | None) -> list[str]:
        """Lines on what was left out; writes the bad rows to a folder."""
        notes = [f"columns left out: {counted(self.dropped)}"] if self.dropped else []
        place = self.bad.write(folder) if folder else None
        if self.bad.rows:
            notes.append(
                f"bad rows left out: {counted(self.bad.reasons)}" + (f"; they are in {place}" if place else "")
            )
        return notes


def counted(reasons: Mapping[str, int]) -> str:
    """`note (300 rows), rationale (12 rows)`."""
    return ", ".join(f"{name} ({count:,} row{'s' * (count != 1)})" for name, count in reasons.items())


def read_prompt(
    row: dict[str, Any], mapping: dict[str, str] | None = None, dropped: Counter[str] | None = None
) -> Prompt:
    """The prompt of a row; what answers it is no part of it.

    Args:
        row: as the file has it.
        mapping: what columns mean, as `columns.read_mapping` gives it.
        dropped: counts columns that are left out.

    Raises:
        ValueError: the row holds no usable prompt, or content that has no place.
    """
    if not mapping and len(row) == 1:  # what most files hold: a fifth of the time of what follows
        asked = row.get("prompt")
        if _is_asked_plainly(asked):
            return Prompt(asked, None)
        if isinstance(asked, str) and asked.lstrip()[:1] not in ("", "[", "{"):
            return Prompt([{"role": "user", "content": asked}], None)
    cells = Cells(row, mapping, dropped)
    if cells.has((*ASKED, *MESSAGES)) is None:
        if cells.has(GOOD):
            pair = read_pair(cells)[1]
            return Prompt(pair.prompt, pair.tools)
        if isinstance(cells.peek("body"), dict) and cells.has(REQUEST):
            return _read_request(cells)
    prompt = read_conversation(cells)
    for side in ("chosen", "rejected"):
        cells.reasoning(side)
        cells.forget_score(side)
    cells.reasoning()
    cells.finish(keep=ANSWERS)
    return prompt


def _read_request(cells: Cells) -> Prompt:
    """What a line for OpenAI's Batch API asks; the model and the sampling settings of its body are left out.

    https://platform.openai.com/docs/guides/batch

    Raises:
        ValueError: it asks for no completion of messages or of a text.
    """
    inner = Cells(cells.take("body"))
    for name in REQUEST:
        cells.take(name)
    if inner.has(("messages", "prompt")) is None:
        raise Fault('"body" has no "messages"', hint="requests to /v1/chat/completions are read")
    prompt = read_conversation(inner)
    left = inner.left
    inner.finish()
    cells.finish(keep=ANSWERS)
    cells.dropped.update(f"body.{name}" for name in dict.fromkeys([*left, *inner.dropped]))
    return prompt


def _is_asked_plainly(value: Any) -> TypeGuard[list[Message]]:
    """Whether this is a list of messages with a role and a text each and nothing else, the last one the user's."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict)
            and message.keys() == {"role", "content"}
            and message["role"] in ("system", "user", "assistant")
            and isinstance(message["content"], str)
            and bool(message["content"].strip())
            for message in value
        )
        and value[-1]["role"] == "user"
    )


def read_demonstration(
    row: dict[str, Any], mapping: dict[str, str] | None = None, dropped: Counter[str] | None = None
) -> tuple[Prompt, list[Message]]:
    """Prompt and completion of a row for supervised fine-tuning.

    Raises:
        ValueError: the row holds no prompt or no completion, or content that has no place.
    """
    cells = Cells(row, mapping, dropped)
    prompt, tools = read_conversation(cells, keep_answer=True)
    name = cells.has(ANSWER)
    if name is not None:
        answer = read_messages(cells.take(name), cells.own(name), role="assistant", dropped=cells.dropped)
    elif len(prompt) > 1 and prompt[-1]["role"] == "assistant":
        prompt, answer = prompt[:-1], prompt[-1:]
    else:
        raise Fault(
            f'no "completion", and no "messages" that end with an assistant message; the row has '
            f"{', '.join(cells.names) or 'nothing'}",
            hint="--columns prompt=NAME,completion=NAME, where other columns hold them",
        )
    reasoning = cells.reasoning()
    if reasoning and "reasoning_content" not in answer[-1]:
        answer = [*answer[:-1], {**answer[-1], "reasoning_content": reasoning}]
    cells.finish()
    return Prompt(prompt, tools), answer
