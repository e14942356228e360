"""A pair made of the cells of a row: its sides, what they begin with, and what the row says of them. Reads nothing."""

import re
from typing import Any

from dpo_cli.data.columns import MESSAGES, Cells, number
from dpo_cli.data.messages import Message, Prompt, message_key, read_messages
from dpo_cli.data.records import Preference, preference_id

HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def read_side(cells: Cells, names: tuple[str, ...], side: str) -> list[Message]:
    """The messages of one side.

    Raises:
        ValueError: naming the field.
    """
    name = cells.has(names)
    value = cells.take(*names)
    if name is None or value is None:
        raise ValueError(f'no "{side}"')
    messages = read_messages(value, cells.own(name), role="assistant", dropped=cells.dropped)
    reasoning = cells.reasoning(side)
    if reasoning and "reasoning_content" not in messages[-1]:
        messages = [*messages[:-1], {**messages[-1], "reasoning_content": reasoning}]
    return messages


def make(cells: Cells, prompt: Prompt, chosen: list[Message], rejected: list[Message]) -> Preference:
    """The pair of a row, with what the row says about its sides.

    Raises:
        ValueError: a score is no number.
    """
    good, bad = cells.score("chosen"), cells.score("rejected")
    gap = number(cells.take("score_gap"), "score_gap") if "score_gap" in cells else None
    margin = number(cells.take("margin"), "margin") if "margin" in cells else None
    weight = number(cells.take("weight"), "weight") if "weight" in cells else None
    own = cells.peek("id")
    reasons = [cells.take(f"{side}_finish_reason") for side in ("chosen", "rejected")]
    for name in (*MESSAGES, "all_messages"):  # the chosen conversation once more, as UltraFeedback has it
        if isinstance(cells.peek(name), list) and cells.has((name,)):
            _pass_if_known(cells, name, prompt.messages + chosen)
    return Preference(
        id=own if isinstance(own, str) and own else preference_id(prompt.messages, chosen, rejected, prompt.tools),
        prompt=prompt.messages,
        chosen=chosen,
        rejected=rejected,
        chosen_score=good,
        rejected_score=bad,
        score_gap=good - bad if good is not None and bad is not None else gap,
        chosen_finish_reason=reasons[0] if isinstance(reasons[0], str) else None,
        rejected_finish_reason=reasons[1] if isinstance(reasons[1], str) else None,
        margin=margin,
        tools=prompt.tools,
        weight=weight,
    )


def _pass_if_known(cells: Cells, name: str, known: list[Message]) -> None:
    try:
        said = read_messages(cells.peek(name), name)
    except ValueError:
        return
    if [*map(message_key, said)] == [*map(message_key, known)][-len(said) :]:
        cells.take(name)


def without_chosen(prompt: Prompt, chosen: list[Message]) -> Prompt:
    """The prompt, where its messages end with the chosen answer as well."""
    messages = prompt.messages
    if len(messages) > len(chosen) and messages[-len(chosen) :] == chosen and chosen[0]["role"] == "assistant":
        return Prompt(messages[: -len(chosen)], prompt.tools)
    return prompt


def divide(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt and sides of two conversations; as in TRL's `extract_prompt`, but identical ones keep a message each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if not prompt:
        raise ValueError('"chosen" and "rejected" share no first message that could be the prompt')
    if not chosen[0]["role"] == rejected[0]["role"] == "assistant":
        raise ValueError('"chosen" and "rejected" part before an assistant message')
    return prompt, chosen, rejected


def longer(shared: list[Message], given: list[Message]) -> list[Message]:
    """The prompt, where both its own field and the sides hold it: one of them may lack the system message."""
    keys = [[*map(message_key, messages)] for messages in (shared, given)]
    if keys[0][-len(given) :] == keys[1]:
        return shared
    if keys[1][-len(shared) :] == keys[0]:
        return given
    raise ValueError('"prompt" is not what "chosen" and "rejected" begin with')


def last_turn(messages: list[Message]) -> int:
    """Where the assistant's last answer begins; 0 where there is none at the end."""
    return len(messages) - 1 if len(messages) > 1 and messages[-1]["role"] == "assistant" else 0


def transcript_prompt(prompt: Prompt) -> Prompt:
    """The prompt, where it is one text that holds a conversation as HH writes it, the answer left open."""
    if len(prompt.messages) != 1:
        return prompt
    text = prompt.messages[0]["content"]
    if not HH_TURN.match(text) or not text.rstrip().endswith("\n\nAssistant:"):
        return prompt
    return Prompt(transcript(f"{text.rstrip()} ", "prompt")[:-1], prompt.tools)


def transcript(text: Any, field: str) -> list[Message]:
    """The messages of a conversation as HH writes it.

    Raises:
        ValueError: it is none, or does not end with the assistant.
    """
    start, *turns = HH_TURN.split(text) if isinstance(text, str) else ("not a text",)
    if start.strip() or not turns or turns[-2] != "Assistant":
        raise ValueError(f'"{field}" is not a "\\n\\nHuman: … \\n\\nAssistant: …" transcript')
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2], strict=True)]


def stripped(side: list[Message]) -> list[Message]:
    """A side without the blank that follows `Assistant:` in a transcript."""
    made: list[Message] = [{**message, "content": message["content"].strip()} for message in side]
    return made
