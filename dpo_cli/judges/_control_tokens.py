"""Control tokens of chat templates, made text: a judge's tokenizer must not read a turn out of what it is shown.

A local server tokenizes the whole conversation, template and texts alike, and takes `<|im_start|>` in a completion for
the beginning of a turn. One space within each such sign leaves it readable and keeps it from being a token. Texts
without such signs are not changed.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from dpo_cli.models.base_model import find_base

_NAMES = (
    "s|bos|eos|pad|unk|mask|cls|sep|start_of_turn|end_of_turn|start_of_image|end_of_image|end_of_utterance|image|video"
    "|audio|think|thinking|tool_call|tool_calls|tool_response|tool_result|tools|eoh|eoa|eod|eot|eop|sop|gmask|system"
    "|user|assistant|human|bot|im_start|im_end|endoftext|begin_of_text|end_of_text|seed:[a-z_]+|unused\\d+|extra_id_\\d+"
    "|reserved_\\d+|special_\\d+|(?:s?start|end|begin)_of_[a-z_]+"
)
_BRACKETED = (
    "INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CONTENT|ARGS|CALL_ID|THINK|IMG|IMG_BREAK|IMG_END"
    "|BEGIN_AUDIO|AUDIO|PREFIX|MIDDLE|SUFFIX|MASK|gMASK|sMASK|CLS|SEP|PAD|UNK|BOS|EOS|SYSTEM|USER|ASSISTANT"
    "|control_\\d+"
)
# The first sign of each, so that those that overlap are all found.
_CONTROL = re.compile(
    r"<(?=[|｜][^<>|｜\n]{1,64}[|｜]>)"  # <|im_start|>, <|eot_id|>, <｜User｜>
    r"|<(?=[|｜][\w ▁/.:-]{1,64}>)|<(?=[\w▁/][\w ▁/.:-]{0,63}[|｜]>)"  # <|turn>, <turn|>
    rf"|<(?=/?(?:{_NAMES})/?>)"  # <start_of_turn>, </s>, <think>
    r"|<(?=</?SYS>>)"
    r"|\[(?=\|[^\[\]|\n]{1,64}\|\])"  # [|user|]
    rf"|\[(?=/?(?:{_BRACKETED})\])"
    r"|[\[\]](?=[~!][a-z]{0,2}\[)|[\[\]](?=[a-z]?~!?[a-z]?[\[\]])",  # ]~!b[, ]~b], [e~[
    re.I,
)


def control_tokens(added: Iterable[tuple[str, bool]]) -> frozenset[str]:
    """Of a tokenizer's added tokens those that no text may hold as a token.

    Args:
        added: each token, and whether it is special. What is not special may be an ordinary word, or white space.
    """
    return frozenset(
        token for token, special in added if len(token) > 1 and (special or disarm(token) != token) and token.strip()
    )


def tokens_of(model: str) -> frozenset[str]:
    """The control tokens of a model whose tokenizer.json is on this machine; none of others."""
    folder = find_base(model)
    try:
        content = (folder / "tokenizer.json").read_bytes() if folder else b"{}"
        added: list[dict[str, Any]] = msgspec.json.decode(content).get("added_tokens") or []
        return control_tokens((str(one["content"]), bool(one.get("special"))) for one in added)
    except (OSError, msgspec.DecodeError, AttributeError, KeyError, TypeError):
        return frozenset()


def disarm_all(value: Any, known: Collection[str] = ()) -> Any:
    """A JSON-able value with every text in it disarmed, keys included."""
    if isinstance(value, str):
        return disarm(value, known)
    if isinstance(value, dict):
        return {disarm(key, known): disarm_all(part, known) for key, part in value.items()}
    return [disarm_all(part, known) for part in value] if isinstance(value, list) else value


def disarm(text: str, known: Collection[str] = ()) -> str:
    """The text with a space within each control token.

    Args:
        text: what a judge is shown.
        known: tokens of the judge's own tokenizer, where it is known.
    """
    if any(sign in text for sign in "<[]"):
        text = _CONTROL.sub(r"\g<0> ", text)
    for token in known:
        while token in text:  # again, where they overlap
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
