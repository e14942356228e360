"""The records that the stages hand to each other: prompts, completions, judgments, preferences.

Ids are hashes of content, so that files are joined by key and never by position. Rows from other tools are read in
the forms that the field uses (prompt-only, `messages`, prompt-completion, preference); what is written has one form.
What a message may hold is in `data.messages`.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import msgspec

# Everybody takes the record types from here.
from dpo_cli.data.messages import Message as Message
from dpo_cli.data.messages import Prompt as Prompt
from dpo_cli.data.messages import Tool as Tool
from dpo_cli.data.messages import ToolCall as ToolCall
from dpo_cli.data.messages import canonical as canonical
from dpo_cli.data.messages import content_id as content_id
from dpo_cli.data.messages import message_key as message_key
from dpo_cli.data.messages import prompt_id as prompt_id
from dpo_cli.data.messages import read_messages as read_messages
from dpo_cli.data.messages import read_tools as read_tools
from dpo_cli.data.messages import said as said
from dpo_cli.data.messages import text_of as text_of


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


class Completions(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of completions.jsonl: what the SFT adapter answered to one prompt.

    `completions` are the texts. Where any is more than a text (a tool call, reasoning), `messages` holds the whole
    message of each, None for those that are a text alone; `answer` gives one in either case. `tools` are the prompt's.
    """

    id: str
    prompt: list[Message]
    completions: list[str]
    finish_reasons: list[str]
    model: str
    sampling: dict[str, Any]
    usage: Usage = msgspec.field(default_factory=Usage)
    tools: list[Tool] | None = None
    messages: list[Message | None] = []

    def answer(self, index: int) -> Message:
        """One completion as the assistant's message."""
        whole = self.messages[index] if index < len(self.messages) else None
        return whole or {"role": "assistant", "content": self.completions[index]}

    @property
    def answers(self) -> list[Message]:
        """Every completion as the assistant's message."""
        return [self.answer(index) for index in range(len(self.completions))]


class Order(msgspec.Struct, omit_defaults=True):
    """One order in which a judge saw the candidates.

    `order` holds completion indices as they were shown; `scores` maps label (`A` = first shown) to score; `raw` is
    the judge's reply as it came; `model` says who of a panel it was. Where criteria were scored apart, `criteria` maps
    each to its scores, `scores` are their weighted mean, and `raw` is a JSON object of one reply a criterion.
    """

    order: list[int]
    scores: dict[str, float]
    raw: str
    model: str | None = None
    criteria: dict[str, dict[str, float]] = {}


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
    tools: list[Tool] | None = None
    weight: float | None = None


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


def completions_id(texts: list[str], messages: Sequence[Message | None] = ()) -> str:
    """Id of one prompt's completions, in their order; `messages` as in `Completions`."""
    return content_id(texts, messages) if any(messages) else content_id(texts)


def preference_id(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], tools: list[Tool] | None = None
) -> str:
    """Id of a pair: a hash of its three texts, and of the prompt's tools where there are any."""
    return content_id(prompt, chosen, rejected, tools) if tools else content_id(prompt, chosen, rejected)


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


def rationale(order: Order) -> str:
    """The evidence that a judge gave with an order, where it is readable; else its words as they came."""
    if order.criteria:
        replies = msgspec.json.decode(order.raw, type=dict[str, str])
        return "\n".join(f"{name}: {_rationale(raw)}" for name, raw in replies.items())
    return _rationale(order.raw)


def _rationale(raw: str) -> str:
    try:
        found = msgspec.json.decode(raw)["rationale"]
    except (msgspec.DecodeError, KeyError, TypeError):
        return raw
    return found if isinstance(found, str) else raw


def judge_name(row: Judgment) -> str:
    """What a judgment says of its judge: the models or the function, or all of it."""
    for key in ("model", "function", "judge", "name"):
        value = row.judge.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return ", ".join(map(str, value))
    return json.dumps(row.judge, ensure_ascii=False) if row.judge else "unnamed"
