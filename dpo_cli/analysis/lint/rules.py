"""Rules about single rows: what is wrong with a pair on its own.

Each rule takes the pairs and yields findings. Not covered: what a judge would say about the texts.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise

from dpo_cli.analysis.lint.findings import Finding, Pair, error, warning
from dpo_cli.data.records import Message, ToolCall, text_of

CHARACTERS_PER_TOKEN = (
    3.5  # of English text in the vocabularies of 2024 and later, rounded down: rather too many tokens
)

# Tokens of chat templates. As text they are either encoded as the control token itself, or teach the model to spell it.
CONTROL = re.compile(
    r"<\|[A-Za-z0-9_.\-]{1,40}\|>"  # Llama 3, ChatML, Phi, GPT: <|eot_id|>, <|im_start|>
    r"|\[/?INST\]|<</?SYS>>|</s>"  # Llama 2, Mistral
    r"|<(?:start|end)_of_turn>"  # Gemma
    r"|<｜[^｜<>]{1,40}｜>"  # DeepSeek
    r"|\[/?(?:SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS)\]"
)
# A completion that goes on to write the next turn.
HEADER = re.compile(
    r"^(?:#{2,3} ?(?:Instruction|Response|Human|Assistant|User|System)\b:?|(?:Human|Assistant|User|System):)",
    re.MULTILINE,
)
SIDES = ("chosen", "rejected")
PROMPTS_KEPT = 1 << 14  # whose tokens are kept at hand


def check_rows(pairs: Iterable[Pair], max_length: int, count_tokens: Callable[[str], int] | None) -> Iterator[Finding]:
    """What every rule finds, one rule after the other; the pairs are read once."""
    rules: list[Callable[[Pair], Iterator[Finding]]] = [
        check_sides,
        check_template,
        check_thinking,
        check_cut,
        LengthRule(max_length, count_tokens).check,
    ]
    found: list[list[Finding]] = [[] for _ in rules]
    for pair in pairs:
        for own, rule in zip(found, rules, strict=True):
            own.extend(rule(pair))
    return chain.from_iterable(found)


def check_sides(pair: Pair) -> Iterator[Finding]:
    """Sides without text, and pairs that prefer a text over itself."""
    empty = [side for side in SIDES if not text_of(getattr(pair.row, side)).strip()]
    if empty:
        yield error("empty-side", [pair], f"{' and '.join(empty)} without text")
    elif pair.chosen_key == pair.rejected_key:
        yield error("identical-sides", [pair], "chosen and rejected say the same")


def check_cut(pair: Pair) -> Iterator[Finding]:
    """Pairs of which the token limit ended one side only; where that is not recorded, it can't be told."""
    ends = pair.row.chosen_finish_reason, pair.row.rejected_finish_reason
    if None in ends or (ends[0] == "length") == (ends[1] == "length"):
        return
    if ends[0] == "length":
        yield error("cut-side", [pair], "chosen was cut by the token limit: it teaches to stop in mid-sentence")
    else:
        yield warning("cut-side", [pair], "rejected was cut by the token limit: the pair may teach length alone")


def check_template(pair: Pair) -> Iterator[Finding]:
    """What the chat template can't carry: its own tokens in a text, roles out of order, in prompts and in sides."""
    row = pair.row
    for field in ("prompt", *SIDES):
        tokens = {token for message in getattr(row, field) for token in CONTROL.findall(message["content"])}
        if tokens:
            yield error("template", [pair], f"{field} holds {', '.join(sorted(tokens))}")
    fault = _roles(row.prompt)
    if fault:
        yield error("template", [pair], fault)
    for side in SIDES:
        messages: list[Message] = getattr(row, side)
        fault = _side_roles(messages)
        if fault:
            yield error("template", [pair], f"{side} {fault}")
        elif any(message["role"] in ("user", "system") for message in messages):
            yield warning("template", [pair], f"{side} holds a message that the model does not write")
        header = HEADER.search(text_of(messages)) if messages else None
        if header:
            yield warning("template", [pair], f"{side} goes on to another turn: {header.group()!r}")
    unread = sum(isinstance(call["function"].get("arguments"), str) for call in _calls(row.chosen))
    if unread:
        yield warning("template", [pair], "chosen calls a tool with arguments that are no JSON object")


def _calls(messages: Sequence[Message]) -> list[ToolCall]:
    return [call for message in messages for call in message.get("tool_calls", [])]


def _roles(prompt: Sequence[Message]) -> str | None:
    """What is wrong with the order of the roles: system messages, then turns, a user's message or a tool's result last.

    User and assistant take turns; the results of the tools that the assistant calls come before it goes on.
    """
    roles = [message["role"] for message in prompt]
    unknown = sorted(set(roles) - {"system", "user", "assistant", "tool"})
    if unknown:
        return f"the prompt has a message of role {', '.join(unknown)}"
    head = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    turns = roles[head:]
    if "system" in turns:
        return "the prompt has a system message after its first turn"
    if not turns or turns[-1] not in ("user", "tool"):
        return "the prompt does not end with a user message"
    before: str | None = None
    for message in prompt[head:]:
        role = message["role"]
        if role == "tool" and before not in ("calls", "tool"):
            return "the prompt has a tool's result that no call asked for"
        if role in ("user", "assistant") and (role == "user") != (before in (None, "assistant")):
            return "the prompt's user and assistant messages do not take turns"
        before = "calls" if message.get("tool_calls") else role
    return None


def _side_roles(messages: Sequence[Message]) -> str | None:
    """What is wrong with the order of a side's messages: the assistant begins and ends it, tools answer its calls."""
    if not messages:
        return "has no message"
    if messages[0]["role"] != "assistant":
        return f"begins with a {messages[0]['role']} message"
    if messages[-1]["role"] != "assistant":
        return f"ends with a {messages[-1]['role']} message"
    for before, message in pairwise(messages):
        if message["role"] == "tool" and not before.get("tool_calls") and before["role"] != "tool":
            return "has a tool's result that no call asked for"
        if message["role"] == before["role"] == "assistant":
            return "has two assistant messages in a row"
    return None


def check_thinking(pair: Pair) -> Iterator[Finding]:
    """Pairs of which one side alone thinks before it answers: what they teach is to think, or not to."""
    thinks = [side for side in SIDES if any(map(_thinks, getattr(pair.row, side)))]
    if len(thinks) == 1:
        yield warning("thinking", [pair], f"{thinks[0]} alone thinks before it answers")


def _thinks(message: Message) -> bool:
    return bool(message.get("reasoning_content")) or "</think>" in message["content"]


class LengthRule:
    """Pairs over `max_length` tokens, the chat template's own not counted.

    Args:
        max_length: of prompt and completion together.
        count_tokens: tokens of a text; None: estimated.
    """

    def __init__(self, max_length: int, count_tokens: Callable[[str], int] | None) -> None:
        self._limit = max_length
        self._count, self._unit = (count_tokens, "tokens") if count_tokens else (estimate_tokens, "tokens (estimated)")
        self._prompts: dict[int, tuple[int, int]] = {}  # pairs of one prompt stand together, most often

    def check(self, pair: Pair) -> Iterator[Finding]:
        """What is too long of one pair."""
        prompt, system = self._prompt(pair)
        side = max(self._count(text_of(pair.row.chosen)), self._count(text_of(pair.row.rejected)))
        if system + side > self._limit:
            tokens = f"{system + side} {self._unit} without the conversation"
            yield error("length", [pair], f"{tokens}; max_length is {self._limit}")
        elif prompt + side > self._limit:
            tokens = f"{prompt + side} {self._unit}"
            yield warning("length", [pair], f"{tokens}; max_length is {self._limit}: the prompt loses its oldest part")

    def _prompt(self, pair: Pair) -> tuple[int, int]:
        """Tokens of a pair's prompt, and of its system messages."""
        if pair.prompt_key not in self._prompts:
            if len(self._prompts) == PROMPTS_KEPT:
                self._prompts.clear()
            system = [message for message in pair.row.prompt if message["role"] == "system"]
            self._prompts[pair.prompt_key] = self._count(text_of(pair.row.prompt)), self._count(text_of(system))
        return self._prompts[pair.prompt_key]


def estimate_tokens(text: str) -> int:
    """Tokens of a text, where no tokenizer is at hand."""
    return round(len(text) / CHARACTERS_PER_TOKEN)
