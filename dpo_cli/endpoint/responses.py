"""What an OpenAI-compatible endpoint says: chat completions, errors in all their forms, and Retry-After.

Each part of a completion is read for itself, so that one that is odd costs none of the others. What is no answer (no
text, an error, half a text) is told from what is one by `Choice.lacks`. A stream of events is read as the completion
that it spells.
"""

import json
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from dpo_cli.data.records import Usage

T = TypeVar("T")

THINKING_ENDS = "</think>"

# Why a choice is no answer, and what can be done about it.
IN_REASONING = "no text, all of it went into reasoning_content"
CUT_IN_REASONING = "no text, it ended while it was reasoning"
TOOL_CALLS = "no text, but tool calls that nobody offered"
EMPTY = "no text"
SERVER_ERROR = "ended by an error of the server"
ABORTED = "aborted by the server"
FILTERED = "stopped by a content filter"
UNREADABLE = "a choice without a message"
ADVICE = {
    IN_REASONING: "start the server without a reasoning parser, or --set model.chat_template_kwargs="
    "'{enable_thinking = false}'",
    CUT_IN_REASONING: "raise max_tokens, or have the model reason less: --set model.chat_template_kwargs="
    "'{enable_thinking = false}'",
    TOOL_CALLS: "start the server without a tool call parser",
    EMPTY: "is the chat template the model's own? is max_tokens enough?",
    SERVER_ERROR: "the same command asks again",
    ABORTED: "the same command asks again",
    FILTERED: "the provider does not answer these",
}
PASSING = (EMPTY, SERVER_ERROR, ABORTED)  # asked once more, it may be an answer
# Finish reasons by which some servers mean OpenAI's.
_ENDINGS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(("content_filter", "safety", "recitation", "blocklist", "prohibited_content"), "content_filter"),
}
_ERRORS = ("error", "failed", "engine_error")
_ABORTS = ("abort", "aborted", "cancelled", "canceled")


class Unreadable(Exception):
    """A complete reply that is no chat completion; the same request would get the same."""


class ErrorReply(Exception):
    """An error in the place of a completion, as some proxies wrap it into a success."""

    def __init__(self, error: "Error") -> None:
        super().__init__(error.message)
        self.error = error


class Choice(Struct, omit_defaults=True):
    """One answer; `text` is empty where the model refused.

    `reasoning` and `tool_calls` are what came beside the text, `error` the server's words where it broke off. Where
    they were asked for: its tokens with their log-probabilities, and those of the prompt's tokens from the second one
    on.
    """

    text: str
    finish_reason: str
    refusal: str | None = None
    token_ids: list[int] = []
    log_probs: list[float] = []
    prompt_log_probs: list[float] = []
    reasoning: str = ""
    tool_calls: list[Any] = []
    error: str = ""

    def lacks(self, tools: bool = False) -> str | None:
        """Why this is no answer; None: it is one, as a tool call is where `tools` were offered."""
        if self.finish_reason in _ERRORS or self.error:
            return SERVER_ERROR
        if self.finish_reason in _ABORTS:
            return ABORTED
        if self.finish_reason == "content_filter":
            return FILTERED
        if self.refusal or after_thinking(self.text) or (tools and self.tool_calls):
            return None
        if (self.text.strip() and THINKING_ENDS not in self.text) or (
            self.reasoning and self.finish_reason == "length"
        ):
            return CUT_IN_REASONING
        if self.reasoning:
            return IN_REASONING
        return TOOL_CALLS if self.tool_calls else EMPTY


class Reply(Struct, omit_defaults=True):
    """What is kept of a response: its choices by index, its tokens, the model that says it answered, its dollars.

    `counted` says whether the endpoint counted the tokens, of input and of output; `raw` is the whole response where it
    is no answer, and `unreadable` says why where it can't be read.
    """

    choices: list[Choice]
    usage: Usage
    model: str = ""
    usd: float = 0.0
    prompt_token_ids: list[int] = []
    counted: bool = True
    raw: str = ""
    unreadable: str = ""

    def lacks(self, tools: bool = False) -> str | None:
        """Why none of the choices is an answer; None: one is."""
        found = [choice.lacks(tools) for choice in self.choices]
        return None if None in found else next(iter(found), EMPTY)


class Error(Struct):
    """An error response."""

    message: str = ""
    param: str | None = None
    code: str | None = None


def after_thinking(text: str) -> str:
    """What follows the model's thinking, where that stands in its text; nothing if it never ends."""
    _, ended, answer = text.rpartition(THINKING_ENDS)
    if ended:
        return answer.strip()
    return "" if text.lstrip().startswith("<think>") else text.strip()


def read_reply(content: bytes) -> Reply:
    """Read a chat completion, or a completion of a bare prompt.

    Raises:
        ErrorReply: an error stands in its place.
        Unreadable: it is none, or has no choices.
        ValueError: it is no JSON: cut off, perhaps.
    """
    body = _decode(content)
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    if not isinstance(body, dict):
        raise Unreadable(f"a {type(body).__name__} in the place of a completion")
    given = body.get("choices")
    choices = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    if not choices:
        if body.get("error") or body.get("object") == "error":
            raise ErrorReply(_error(body))
        raise Unreadable(
            "no choices in it" if "choices" in body else f"none of its fields is `choices`: {', '.join(body)}"
        )
    if len(choices) > 1:
        places = [_count(one.get("index")) for one in choices]
        order = sorted(range(len(choices)), key=lambda at: at if (place := places[at]) is None else place)
        choices = [choices[at] for at in order]
    usage, counted = read_usage(body.get("usage"))
    model = body.get("model")
    return Reply(
        list(map(_choice, choices)),
        usage,
        model if isinstance(model, str) else "",
        prompt_token_ids=_numbers(body.get("prompt_token_ids"), _ids),
        counted=counted,
    )


def read_usage(value: Any) -> tuple[Usage, bool]:
    """The tokens that were counted, and whether both of input and output were; what can't be a count is none."""
    usage = value if isinstance(value, dict) else {}
    given = _first_count(usage, "prompt_tokens", "input_tokens")
    taken = _first_count(usage, "completion_tokens", "output_tokens")
    cached = _first_count(usage.get("prompt_tokens_details"), "cached_tokens") or 0
    reasoning = _first_count(usage.get("completion_tokens_details"), "reasoning_tokens") or 0
    found = Usage(given or 0, min(cached, given or 0), taken or 0, min(reasoning, taken or 0))
    return found, given is not None and taken is not None


def read_usage_of(content: bytes) -> tuple[Usage, bool]:
    """The tokens that a reply counts which is otherwise unreadable."""
    try:
        body = _decode(content)
    except Unreadable:
        body = None
    return read_usage(body.get("usage") if isinstance(body, dict) else None)


def _decode(content: bytes) -> Any:
    """JSON, also with what only some readers take: NaN, halves of surrogates, bytes that are no UTF-8; or events."""
    try:
        return msgspec.json.decode(content)
    except ValueError:
        text = content.decode("utf-8-sig", "replace").strip()
    if not text.startswith(("{", "[", "<", "data:", "event:", ":")):
        raise Unreadable(f"no JSON, but {text[:80]!r}" if text else "an empty reply")
    try:
        body = _join_events(text) if text.startswith(("data:", "event:", ":")) else _load(text)
        return msgspec.json.decode(_clean(json.dumps(body, ensure_ascii=False)))
    except RecursionError:
        raise Unreadable("nested too deeply") from None


def _load(text: str) -> Any:
    """JSON, in which what is no finite number is null; what stands behind it is nothing."""

    def finite(number: str) -> float | None:
        value = float(number)
        return value if math.isfinite(value) else None

    reader = json.JSONDecoder(strict=False, parse_constant=lambda _: None, parse_float=finite)
    return reader.raw_decode(text.strip())[0]


def _join_events(text: str) -> dict[str, Any]:
    """The completion that a stream of events spells; what is cut off lacks its finish reasons.

    Raises:
        ValueError: an event is no JSON.
    """
    joined: dict[str, Any] = {"choices": []}
    choices: dict[Any, dict[str, Any]] = {}
    ended = False
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name != "data":
            continue
        if value.strip() == "[DONE]":
            ended = True
            continue
        event = _load(value)
        if not isinstance(event, dict):
            continue
        joined |= {key: event[key] for key in ("usage", "model", "error") if event.get(key)}
        for one in event.get("choices") or ():
            choice = choices.setdefault(one.get("index"), {"index": one.get("index"), "message": {}})
            for key, part in (one.get("delta") or one.get("message") or {}).items():
                if isinstance(part, str) and key != "role":
                    choice["message"][key] = choice["message"].get(key, "") + part
            if one.get("finish_reason"):
                choice["finish_reason"] = one["finish_reason"]
    if not ended and not all("finish_reason" in one for one in choices.values()):
        raise ValueError("a stream of events that is cut off")
    return joined | {"choices": list(choices.values())}


def _choice(value: dict[str, Any]) -> Choice:
    message = value.get("message") or value.get("delta")  # as in an event, where a proxy joined them
    if isinstance(message, str):
        message = {"content": message}
    error = value.get("error")
    if not isinstance(message, dict):
        message = {"content": value.get("text")}  # in place of a message, where the prompt was bare
        error = error or (None if isinstance(value.get("text"), str) else UNREADABLE)
    text, thinking, refusal = _texts(message.get("content"))
    beside = message.get("reasoning_content") or message.get("reasoning")
    said, calls, reason = message.get("refusal"), message.get("tool_calls"), value.get("finish_reason")
    return Choice(
        text,
        _ENDINGS.get(reason.lower(), reason) if isinstance(reason, str) else "",
        (said if isinstance(said, str) else refusal) or None,
        _numbers(value.get("token_ids"), _ids),
        _numbers(value.get("logprobs"), _log_probs),
        _numbers(value.get("prompt_logprobs"), _prompt_log_probs),
        beside if isinstance(beside, str) else thinking,
        calls if isinstance(calls, list) else [],
        _error({"error": error}).message or UNREADABLE if error else "",
    )


def _texts(content: Any) -> tuple[str, str, str]:
    """Text, thinking and refusal of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content, "", ""
    found: dict[str, list[str]] = {"text": [], "thinking": [], "refusal": []}
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, str):
            found["text"].append(part)
        elif isinstance(part, dict):
            kind = str(part.get("type", "text"))
            kind = "thinking" if kind in ("thinking", "reasoning") else "refusal" if kind == "refusal" else "text"
            given = next((part[key] for key in (kind, "text", "content", "reasoning") if part.get(key)), "")
            found[kind].append(given if isinstance(given, str) else "".join(_texts(given)))
    return "".join(found["text"]), "".join(found["thinking"]), "".join(found["refusal"])


def _clean(text: str) -> str:
    """A text that can be written: a half of a surrogate pair becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _count(value: Any) -> int | None:
    """A number of things, however it is written; None: it is none."""
    if type(value) is int and 0 <= value < 2**53:
        return value
    try:
        number = None if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if number is not None and 0 <= number < 2**53 and number.is_integer() else None


def _first_count(value: Any, *names: str) -> int | None:
    if isinstance(value, dict):
        for name in names:
            if (found := _count(value.get(name))) is not None:
                return found
    return None


def _numbers(value: Any, read: Callable[[Any], list[T]]) -> list[T]:
    """What a server says beside its answer, if it says it in the form that is read here."""
    try:
        return [] if value is None else read(value)
    except (TypeError, KeyError, AttributeError, StopIteration, ValueError):
        return []


def _ids(value: Any) -> list[int]:
    return msgspec.convert(value, list[int])


def _log_probs(value: Any) -> list[float]:
    return _finite(one["logprob"] for one in value["content"])


def _prompt_log_probs(value: Any) -> list[float]:
    """Of each token a dictionary, in which it comes first; none for the first token."""
    return _finite(next(iter(one.values()))["logprob"] for one in value[1:])


def _finite(values: Iterable[Any]) -> list[float]:
    found = [float(value) for value in values]
    if not all(map(math.isfinite, found)):
        raise ValueError("a log-probability that is no number")
    return found


def read_error(content: bytes) -> Error:
    """Read an error in any of the forms that servers and proxies use."""
    try:
        body = msgspec.json.decode(content)
    except ValueError:
        return Error(content[:500].decode("utf-8", "replace"))
    return _error(body[0] if isinstance(body, list) and len(body) == 1 else body)


def _error(body: Any) -> Error:
    error = body.get("error") or body if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return Error(_clean(str(error)))
    message = error.get("message") or error.get("detail") or error.get("msg") or ""
    if isinstance(message, dict):  # Mistral's
        message = message.get("detail") or message
    param, code, beside = error.get("param"), error.get("code"), error.get("metadata")
    if isinstance(beside, dict) and ("flagged_input" in beside or "reasons" in beside):  # OpenRouter's moderation
        code = "content_filter"
    if isinstance(message, list) and message and isinstance(message[0], dict) and param is None:  # FastAPI's
        place = [str(part) for part in message[0].get("loc") or () if part != "body"]
        param = place[0] if place else None
    return Error(_clean(str(message)), None if param is None else str(param), None if code is None else str(code))


def retry_after(headers: Any) -> float | None:
    """Seconds that Retry-After asks for, given as seconds or as an HTTP date (against the server's own clock)."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        from email.utils import parsedate_to_datetime  # 15 ms, for a form that few servers use

        try:
            now = parsedate_to_datetime(headers["Date"]).timestamp() if "Date" in headers else time.time()
            seconds = parsedate_to_datetime(value).timestamp() - now
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def one_line(text: str) -> str:
    """Foreign text on one line, without control characters, of bearable length."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= 300 else f"{line[:300]}…"
