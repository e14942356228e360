"""Chat messages, tool calls and tools, in the one form that all records have, read from the forms that the field uses.

A message always has a `role` and a text `content` (empty where it only calls tools); `reasoning_content`, `tool_calls`,
`tool_call_id` and `name` are there where they say something. Arguments of a tool call are an object, as chat templates
want them, or the text as it came where that is no JSON object; `wire` makes text of them, as endpoints want them.
Read are OpenAI's form (content parts and `function_call` included), ShareGPT's `from` and `value`, one message alone, a
text alone, and any of these as JSON in a table's cell. Images, audio and files are refused by name.
"""

import ast
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, TypeGuard

import msgspec

_encode_sorted = msgspec.json.Encoder(order="sorted").encode


class Function(TypedDict):
    """What a tool call calls, and with what: an object, or the model's own text where that is no JSON object."""

    name: str
    arguments: NotRequired[dict[str, Any] | str]


class ToolCall(TypedDict):
    """One call in an assistant's message; a message of the role `tool` answers it by its id."""

    function: Function
    type: NotRequired[str]
    id: NotRequired[str]


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


# A tool's JSON schema, `{"type": "function", "function": {...}}`; nothing in it is ours to read.
Tool: TypeAlias = dict[str, Any]


class Prompt(NamedTuple):
    """A conversation that is to be answered, and the tools that the answer may call."""

    messages: list[Message]
    tools: list[Tool] | None = None


# ShareGPT's `from`, as LLaMA-Factory, axolotl and ms-swift name them.
SPEAKERS = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "model": "assistant", "bot": "assistant",
    "system": "system", "observation": "tool", "tool": "tool", "tool_response": "tool", "function_response": "tool",
    "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
CALLING = {"function_call", "tool_call"}  # speakers whose text is a call
_TOOL_ROLES = CALLING | {"tool_response", "function_response", "observation"}  # also as roles, in ms-swift
REASONING = ("reasoning_content", "reasoning", "thinking")
# Types of content parts, and names of columns, that are no text.
MEDIA = ("image", "audio", "video", "file", "document")


def content_id(*parts: Any) -> str:
    """Hash of JSON-able content: 16 hexadecimal digits, the same on every machine."""
    return hashlib.sha256(_encode_sorted(parts)).hexdigest()[:16]


def prompt_id(messages: Sequence[Message], tools: list[Tool] | None = None) -> str:
    """Id of a prompt: a hash of its roles and texts, and of calls, reasoning and tools where there are any."""
    said = [[message["role"], message["content"], *_more(message)] for message in messages]
    return content_id(said, tools) if tools else content_id(said)


def _more(message: Message) -> list[Any]:
    """What a message says beside its text. The ids of calls say nothing, and who spoke only names a tool."""
    if len(message) == 2:
        return []
    more: dict[str, Any] = {}
    if reasoning := message.get("reasoning_content"):
        more["reasoning_content"] = reasoning
    if calls := message.get("tool_calls"):
        more["tool_calls"] = [call["function"] for call in calls]
    if message["role"] == "tool" and message.get("name"):
        more["name"] = message["name"]
    return [more] if more else []


def message_key(message: Message) -> tuple[str, ...]:
    """What a message says, up to white space and Unicode form: equal keys, equal messages."""
    plain = message["role"], canonical(message["content"])
    return (*plain, *(str(_encode_sorted(more), "utf-8") for more in _more(message)))


def canonical(text: str) -> str:
    """A text without what no reader sees: Unicode NFC, each run of whitespace one space. Equal means identical."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    elif text.isprintable() and "  " not in text and text[:1] != " " != text[-1:]:
        return text  # as it comes out of what follows, in a fifth of the time
    return " ".join(text.split())


def said(message: Message) -> str:
    """A message as one text: its reasoning between <think> tags, its content, each tool call as a line of JSON."""
    if len(message) == 2:
        return message["content"]
    reasoning = message.get("reasoning_content")
    parts = [f"<think>\n{reasoning}\n</think>"] if reasoning else []
    if message["content"]:
        parts.append(message["content"])
    parts += [call_text(call) for call in message.get("tool_calls", [])]
    return "\n".join(parts)


def call_text(call: ToolCall) -> str:
    """A tool call as a line of JSON, its arguments as an object where they are one."""
    return msgspec.json.encode(call["function"]).decode()


def text_of(messages: Sequence[Message]) -> str:
    """What messages say, as one text."""
    return said(messages[0]) if len(messages) == 1 else "\n".join(map(said, messages))


def wire(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI-compatible endpoints take them: arguments as JSON texts, every call with an id."""
    sent: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for number, message in enumerate(messages):
        plain: dict[str, Any] = dict(message)
        if calls := message.get("tool_calls"):
            plain["tool_calls"] = [
                {"id": f"call_{number}_{index}", "type": "function", **call, "function": _wire_function(call)}
                for index, call in enumerate(calls)
            ]
            open_calls = [call["id"] for call in plain["tool_calls"]]
        elif message["role"] == "tool":
            answered = plain.get("tool_call_id") or (open_calls[0] if open_calls else f"call_{number}")
            plain["tool_call_id"] = answered
            open_calls = [call for call in open_calls if call != answered]
        sent.append(plain)
    return sent


def _wire_function(call: ToolCall) -> dict[str, str]:
    arguments = call["function"].get("arguments", "{}")
    text = arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()
    return {"name": call["function"]["name"], "arguments": text}


def read_messages(value: Any, field: str, role: str = "user", dropped: Counter[str] | None = None) -> list[Message]:
    """Read chat messages; a bare text is one message of `role`, and one message is a list of one.

    Args:
        value: what the row holds.
        field: how it is called there.
        role: of a bare text.
        dropped: counts keys of messages that are not read.

    Raises:
        ValueError: naming the field.
    """
    if is_plain(value):
        return value
    if isinstance(value, str):
        cell = from_cell(value, field)
        if cell is None:
            return [{"role": role, "content": value}]
        value = cell
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(f'"{field}" is not a string or a list of {{"role", "content"}} messages')
    if not value:
        raise ValueError(f'"{field}" is empty')
    messages: list[Message] = []
    for one in value:
        message = _read_message(one, field, role if len(value) == 1 else None, dropped)
        speaker = str(one.get("role", one.get("from"))).lower()
        if speaker in CALLING and messages and messages[-1]["role"] == "assistant":
            # A call is a turn of its own there, and belongs to the answer before it.
            calls = messages[-1].get("tool_calls", []) + message["tool_calls"]
            messages[-1] = {**messages[-1], "tool_calls": calls}
            continue
        messages.append(message)
    return messages


def from_cell(text: str, field: str) -> Any:
    """The messages of a cell that holds them as JSON, or as Python prints a list; None: it is a text.

    Raises:
        ValueError: it looks like a list of messages and can't be read as one.
    """
    start = text.lstrip()[:40].replace(" ", "").replace("\n", "")
    if not start.startswith(("[{", "{")):
        return None
    if not any(f"{quote}{key}{quote}" in text[:10_000] for quote in "\"'" for key in ("role", "from")):
        return None
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            if start.startswith(("[{'role'", '[{"role"', "[{'from'", '[{"from"', "[{'content'", '[{"content"')):
                raise ValueError(
                    f'"{field}" holds messages as text that is not JSON; write them with json.dumps'
                ) from None
            return None
    rows = [value] if isinstance(value, dict) else value
    if isinstance(rows, list) and rows and all(isinstance(row, dict) and _has_speaker(row) for row in rows):
        return value
    return None


def _has_speaker(row: dict[str, Any]) -> bool:
    return ("role" in row and ("content" in row or "tool_calls" in row)) or ("from" in row and "value" in row)


def is_plain(value: Any) -> TypeGuard[list[Message]]:
    """Whether this is a list of messages, each of a role and a text alone: `read_messages` returns it as it is."""
    return isinstance(value, list) and bool(value) and all(map(_is_plain, value))


def _is_plain(value: Any) -> bool:
    """Whether this is a message already, with nothing to drop: five times faster than converting it."""
    return (
        isinstance(value, dict)
        and len(value) == 2
        and isinstance(value.get("role"), str)
        and isinstance(value.get("content"), str)
        and value["role"] not in _TOOL_ROLES
    )


def _read_message(row: dict[str, Any], field: str, role: str | None, dropped: Counter[str] | None) -> Message:
    given = {key: value for key, value in row.items() if value is not None}
    if "from" in given and "role" not in given:
        message, known = _read_speaker(given["from"], given.get("value"), field), {"from", "value"}
    elif isinstance(given.get("role"), str) and given["role"] in _TOOL_ROLES and "tool_calls" not in given:
        message, known = _read_speaker(given["role"], given.get("content"), field), {"role", "content"}
    else:
        named = given.get("role", role)
        if not isinstance(named, str):
            raise ValueError(f'"{field}" has a message without a "role"')
        content = given.get("content")
        if content is None and not any(given.get(key) for key in ("tool_calls", "function_call", *REASONING)):
            raise ValueError(f'"{field}" has a message ({named}) without "content"')
        message, known = {"role": named, "content": _read_content(content, field)}, {"role", "content"}
    if reasoning := next((given[key] for key in REASONING if given.get(key)), None):
        if not isinstance(reasoning, str):
            raise ValueError(f'"{field}" has a message whose reasoning is not a text')
        message["reasoning_content"] = reasoning
    calls = given.get("tool_calls") or given.get("function_call")
    if calls:
        message["tool_calls"] = read_tool_calls(calls, field)
    for key in ("tool_call_id", "name"):
        if given.get(key):
            message[key] = str(given[key])
    if dropped is not None:
        known |= {*REASONING, "tool_calls", "function_call", "tool_call_id", "name"}
        dropped.update(f"{field}[].{key}" for key, value in given.items() if key not in known and value not in ("", []))
    for key in given.keys() - known:
        if key.rstrip("s") in MEDIA and given[key]:
            raise ValueError(f'"{field}" has a message with {key}; only text can be read')
    return message


def _read_speaker(speaker: Any, text: Any, field: str) -> Message:
    """ShareGPT's `{"from", "value"}`; a call is a message whose text is JSON with `name` and `arguments`."""
    if not isinstance(speaker, str) or speaker.lower() not in SPEAKERS:
        raise ValueError(f'"{field}" has a message from {speaker!r}; known are {", ".join(sorted(SPEAKERS))}')
    if speaker.lower() in CALLING:
        return {"role": "assistant", "content": "", "tool_calls": read_tool_calls(text, field)}
    return {"role": SPEAKERS[speaker.lower()], "content": _read_content(text, field)}


def _read_content(content: Any, field: str) -> str:
    """The text of a message: a string, or parts of which every one is text."""
    if isinstance(content, str):
        return content
    if content is None:
        return ""
    if not isinstance(content, list) or not all(isinstance(part, (dict, str)) for part in content):
        raise ValueError(f'"{field}" has a message whose "content" is not a text')
    texts = []
    for part in content:
        kind = "text" if isinstance(part, str) else str(part.get("type", "text"))
        text = part if isinstance(part, str) else part.get("text")
        if not isinstance(text, str) or any(medium in kind for medium in MEDIA):
            raise ValueError(f'"{field}" has a message with a part of type {kind}; only text can be read')
        texts.append(text)
    return "".join(texts)


def read_tool_calls(value: Any, field: str) -> list[ToolCall]:
    """Tool calls, in OpenAI's form, as `{"name", "arguments"}` alone, or as JSON text of either.

    Raises:
        ValueError: naming the field.
    """
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            raise ValueError(f'"{field}" has a tool call that is not JSON') from None
    calls = value if isinstance(value, list) else [value]
    return [_read_call(call, field) for call in calls]


def _read_call(call: Any, field: str) -> ToolCall:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'"{field}" has a tool call without a "name"')
    read: Function = {"name": function["name"]}
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        read["arguments"] = _object_or_text(arguments)
    elif isinstance(arguments, dict):
        read["arguments"] = arguments
    elif arguments is not None:
        raise ValueError(f'"{field}" has a tool call whose "arguments" are not an object or its JSON')
    made: ToolCall = {"type": "function", "function": read}
    if call.get("id"):
        made["id"] = str(call["id"])
    return made


def _object_or_text(text: str) -> dict[str, Any] | str:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, UnicodeEncodeError):
        return text


def read_tools(value: Any, field: str = "tools") -> list[Tool] | None:
    """The tools of a row: a list of JSON schemas, or the JSON text of one; None where there are none.

    Raises:
        ValueError: naming the field.
    """
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = msgspec.json.decode(value)
        except (msgspec.DecodeError, RecursionError):
            raise ValueError(f'"{field}" is text that is not JSON') from None
    if isinstance(value, list) and value and all(isinstance(tool, str) for tool in value):
        return [tool for text in value for tool in read_tools(text, field) or []]
    if isinstance(value, dict):
        value = [value]
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f'"{field}" is not a list of JSON schemas')
    return value
