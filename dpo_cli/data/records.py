"""The records that the stages hand to each other: prompts, completions, judgments, preferences.

Ids are hashes of content, so that files are joined by key and never by position. Rows from other tools are read in
the forms that the field uses (prompt-only, `messages`, prompt-completion, preference); what is written has one form.
Messages with images or tool calls are not covered and are refused.
"""

import hashlib
import json
import unicodedata
from typing import Any, TypedDict

import msgspec

_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class Message(TypedDict):
    """One chat message with text content."""

    role: str
    content: str


class Usage(msgspec.Struct, omit_defaults=True):
    """Tokens that an endpoint counted; `input` includes `cached`, `output` includes `reasoning`."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.input + other.input,
            self.cached + other.cached,
            self.output + other.output,
            self.reasoning + other.reasoning,
        )


class Completions(msgspec.Struct, kw_only=True):
    """One line of completions.jsonl: what the SFT adapter answered to one prompt."""

    id: str
    prompt: list[Message]
    completions: list[str]
    finish_reasons: list[str]
    model: str
    sampling: dict[str, Any]
    usage: Usage = msgspec.field(default_factory=Usage)


class Order(msgspec.Struct, omit_defaults=True):
    """One order in which a judge saw the candidates.

    `order` holds completion indices as they were shown; `scores` maps label (`A` = first shown) to score; `raw` is
    the judge's reply as it came; `model` says who of a panel it was.
    """

    order: list[int]
    scores: dict[str, float]
    raw: str
    model: str | None = None


class Judgment(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of judgments.jsonl: scores and ranking, or `skipped` with a reason, or an `error` to retry.

    `completions_id` names the completions that were judged, so that scores never meet other texts; `failures` counts
    the runs that ended in an error. `weights` are those of a panel's models; `flags` say, for a completion's index,
    what is suspicious about it.
    """

    id: str
    completions_id: str
    scores: list[float] | None = None
    ranking: list[int] | None = None
    orders: list[Order] | None = None
    consistent: bool | None = None
    skipped: str | None = None
    error: str | None = None
    failures: int = 0
    judge: dict[str, Any] = msgspec.field(default_factory=dict)
    usage: Usage = msgspec.field(default_factory=Usage)
    usd: float = 0.0
    weights: dict[str, float] = msgspec.field(default_factory=dict)
    flags: dict[int, list[str]] = msgspec.field(default_factory=dict)


class Preference(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of train.jsonl or val.jsonl: TRL's conversational preference format, with the scores."""

    id: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    chosen_score: float | None = None
    rejected_score: float | None = None
    score_gap: float | None = None
    chosen_finish_reason: str | None = None
    rejected_finish_reason: str | None = None
    margin: float | None = None


class Compared(msgspec.Struct, kw_only=True):
    """One line of evaluation.jsonl: what each adapter answered to one prompt, and what was said of it.

    `win` is the share of its comparisons that the policy wins, ties counted half; scores are ratings of each completion
    by itself, empty where the judge gives none. `orders` are the judge's words, one list a comparison, in which 0 is
    the reference's completion and 1 the policy's.
    """

    id: str
    prompt: list[Message]
    reference: list[str]
    policy: list[str]
    win: float
    reference_scores: list[float] = msgspec.field(default_factory=list)
    policy_scores: list[float] = msgspec.field(default_factory=list)
    orders: list[list[Order]] = msgspec.field(default_factory=list)


def content_id(*parts: Any) -> str:
    """Hash of JSON-able content: 16 hexadecimal digits, the same on every machine."""
    return hashlib.sha256(_encode_sorted(parts)).hexdigest()[:16]


def prompt_id(messages: list[Message]) -> str:
    """Id of a prompt: a hash of its roles and texts."""
    return content_id([[message["role"], message["content"]] for message in messages])


def completions_id(texts: list[str]) -> str:
    """Id of one prompt's completions, in their order."""
    return content_id(texts)


def canonical(text: str) -> str:
    """A text without what no reader sees: Unicode NFC, each run of whitespace one space. Equal means identical."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_messages(value: Any, field: str, role: str = "user") -> list[Message]:
    """Read a list of chat messages; a bare string is one message of `role`.

    Raises:
        ValueError: naming the field.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and value and all(map(_is_plain, value)):
        return value
    try:
        messages = msgspec.convert(value, list[Message])
    except msgspec.ValidationError:
        raise ValueError(f'"{field}" is not a string or a list of {{"role", "content"}} messages') from None
    if not messages:
        raise ValueError(f'"{field}" is empty')
    return messages


def _is_plain(value: Any) -> bool:
    """Whether this is a message already, with nothing to drop: five times faster than converting it."""
    return (
        isinstance(value, dict)
        and len(value) == 2
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
    )


def read_prompt(row: dict[str, Any]) -> list[Message]:
    """The prompt of a row: `prompt`, or `messages` without the answer that ends them.

    Raises:
        ValueError: if the row holds no usable prompt.
    """
    if "prompt" in row:
        prompt = read_messages(row["prompt"], "prompt")
    elif "messages" in row:
        prompt = read_messages(row["messages"], "messages")
        if prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    else:
        raise ValueError('no "prompt" and no "messages"')
    for message in prompt:
        if message["content"].strip():
            return prompt
    raise ValueError("the prompt has no text")


def read_demonstration(row: dict[str, Any]) -> tuple[list[Message], list[Message]]:
    """Prompt and completion of a row for supervised fine-tuning.

    Raises:
        ValueError: if the row holds no completion.
    """
    prompt = read_prompt(row)
    if "completion" in row:
        return prompt, read_messages(row["completion"], "completion", role="assistant")
    if "messages" in row and len(row["messages"]) > len(prompt):
        return prompt, read_messages(row["messages"][-1:], "messages")
    raise ValueError('no "completion", and "messages" does not end with an assistant message')


def read_preference(row: dict[str, Any]) -> Preference:
    """A preference from TRL's format, conversational or plain text, with or without our scores.

    Raises:
        ValueError: naming the field that is wrong.
    """
    prompt = read_prompt(row)
    sides = []
    for side in ("chosen", "rejected"):
        if side not in row:
            raise ValueError(f'no "{side}"')
        sides.append(read_messages(row[side], side, role="assistant"))
    chosen, rejected = sides
    extra = {name: row.get(name) for name in Preference.__struct_fields__[4:]}
    try:
        return msgspec.convert(
            {
                "id": row.get("id") or preference_id(prompt, chosen, rejected),
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                **extra,
            },
            Preference,
        )
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def preference_id(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> str:
    """Id of a pair: a hash of its three texts."""
    return content_id(prompt, chosen, rejected)


def split_side(prompt: str, seed: int, val_share: float) -> bool:
    """Whether a prompt's pairs are held out for validation.

    It depends on nothing but the prompt, so that adding prompts moves no old one across.

    Args:
        prompt: `prompt_id` of the prompt.
        seed: seed of the split.
        val_share: share of the prompts that is held out, 0 to 1.
    """
    digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < val_share


def text_of(messages: list[Message]) -> str:
    """The texts of messages as one."""
    return messages[0]["content"] if len(messages) == 1 else "\n".join(message["content"] for message in messages)


def rationale(order: Order) -> str:
    """The evidence that a judge gave with an order, where it is readable; else its words as they came."""
    try:
        said = msgspec.json.decode(order.raw)
        found = said["rationale"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return order.raw
    return found if isinstance(found, str) else order.raw


def judge_name(row: Judgment) -> str:
    """What a judgment says of its judge: the models or the function, or all of it."""
    for key in ("model", "function", "judge", "name"):
        value = row.judge.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return ", ".join(map(str, value))
    return json.dumps(row.judge, ensure_ascii=False) if row.judge else "unnamed"
