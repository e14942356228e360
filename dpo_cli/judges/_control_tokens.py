"""Control tokens of chat templates, made text: a judge's tokenizer must not read a turn out of what it is shown.

A local server tokenizes the whole conversation, template and texts alike, and takes `<|im_start|>` in a completion for
the beginning of a turn. One space within each such sign leaves it readable and keeps it from being a token. Texts
without such signs are not changed.
"""

import re
from collections.abc import Collection

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


def disarm(text: str, known: Collection[str] = ()) -> str:
    """The text with a space within each control token.

    Args:
        text: what a judge is shown.
        known: tokens of the judge's own tokenizer, where it is known.
    """
    if any(sign in text for sign in "<[]"):
        text = _CONTROL.sub(r"\g<0> ", text)
    for token in known:
        if token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
