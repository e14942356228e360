"""Thinking in chat templates: where a template opens it for the model, takes it out of answers, and what to train then.

A template may end the generation prompt with `<think>`, so that the model always thinks first, and may leave the
thinking of an answer out. Then prompt plus answer is not what the model would write after the prompt, and
`model.thinking` says what it shall be: the thinking as the rows have it (keep), none after a closed empty one (empty),
or none after a prompt that opens none (strip). Works on texts alone; reads and writes nothing.
"""

import re
from typing import NamedTuple

from dpo_cli.config.settings import Thinking
from dpo_cli.data.records import Message

TAGS = {"<think>": "</think>", "[THINK]": "[/THINK]"}
_OPENING = re.compile(r"(<think>|\[THINK\])(\s*)$")
_CLOSED_EMPTY = re.compile(r"\s*(<think>\s*</think>|\[THINK\]\s*\[/THINK\])\s*")
_THOUGHT = re.compile(r"\s*(?:<think>|\[THINK\])?(.*?)(?:</think>|\[/THINK\])\s*(.*)", re.DOTALL)

SET = (
    "--set model.thinking=keep trains on the thinking that the rows hold, empty on answers after an empty thinking, "
    "strip on answers alone; or --set model.chat_template=FILE with a template for training"
)


class Turn(NamedTuple):
    """What the model is asked with, and what it shall write."""

    prompt: str
    completion: str


def split(message: Message) -> tuple[str | None, Message]:
    """The thinking of an assistant's message, and the message without it; None: it holds none."""
    thought, content = message.get("reasoning_content"), message["content"]
    found = _THOUGHT.fullmatch(content)
    if thought is None and found is None:
        return None, message
    rest = message.copy()
    rest.pop("reasoning_content", None)
    if found is not None:
        thought, rest["content"] = thought or found[1].strip(), found[2]
    return thought, rest


def opening(prompt: str) -> str:
    """What a prompt ends with if it opens thinking: the tag and the white space after it; else nothing."""
    found = _OPENING.search(prompt)
    return found[0] if found else ""


def build(prompt: str, answer: str, thought: str | None, how: Thinking) -> Turn | None:
    """Prompt and completion as `how` says; None: the template does something else besides.

    Args:
        prompt: as rendered, ready to be answered.
        answer: the whole conversation as rendered, the thinking of its last message left out.
        thought: that thinking.
        how: what to do with it.
    """
    opened = opening(prompt)
    before = prompt.removesuffix(opened) if opened else prompt
    if not answer.startswith(before):
        return None
    turn = answer[len(before) :]
    if (empty := _CLOSED_EMPTY.match(turn)) is not None:
        turn = turn[empty.end() :]
    if how == "strip":
        return Turn(before, turn)
    tag = opened.strip() or "<think>"
    inner = f"{thought.strip()}\n" if how == "keep" and thought else "\n"
    return Turn(prompt, f"{'' if opened else tag + chr(10)}{inner}{TAGS[tag]}\n\n{turn}")
