"""What an OpenAI-compatible endpoint says: chat completions, errors in all their forms, and Retry-After."""

import math
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from dpo_cli.data.records import Usage

T = TypeVar("T")


class Choice(Struct, omit_defaults=True):
    """One answer; `text` is empty where the model refused.

    Where they were asked for: its tokens with their log-probabilities, and those of the prompt's tokens from the second
    one on.
    """

    text: str
    finish_reason: str
    refusal: str | None = None
    token_ids: list[int] = []
    log_probs: list[float] = []
    prompt_log_probs: list[float] = []


class Reply(Struct, omit_defaults=True):
    """What is kept of a response: its choices by index, its tokens, the model that says it answered, its dollars."""

    choices: list[Choice]
    usage: Usage
    model: str = ""
    usd: float = 0.0
    prompt_token_ids: list[int] = []


class Error(Struct):
    """An error response."""

    message: str = ""
    param: str | None = None
    code: str | None = None


class _Message(Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(Struct):
    message: _Message | None = None
    text: str | None = None  # in place of the message, where the prompt was bare
    index: int = 0
    finish_reason: str | None = None
    token_ids: Any = None
    logprobs: Any = None  # in no form that all servers share: where it is another, there are none
    prompt_logprobs: Any = None

    def read(self) -> Choice:
        """The answer."""
        if self.message is None and self.text is None:
            raise msgspec.ValidationError("a choice without a message")
        message = self.message or _Message(self.text)
        return Choice(
            message.content or "",
            self.finish_reason or "",
            message.refusal,
            _numbers(self.token_ids, _ids),
            _numbers(self.logprobs, _log_probs),
            _numbers(self.prompt_logprobs, _prompt_log_probs),
        )


def _numbers(value: Any, read: Callable[[Any], list[T]]) -> list[T]:
    """What a server says beside its answer, if it says it in the form that is read here."""
    try:
        return [] if value is None else read(value)
    except (TypeError, KeyError, AttributeError, StopIteration, msgspec.ValidationError):
        return []


def _ids(value: Any) -> list[int]:
    return msgspec.convert(value, list[int])


def _log_probs(value: Any) -> list[float]:
    return [float(one["logprob"]) for one in value["content"]]


def _prompt_log_probs(value: Any) -> list[float]:
    """Of each token a dictionary, in which it comes first; none for the first token."""
    return [float(next(iter(one.values()))["logprob"]) for one in value[1:]]


class _InputDetails(Struct):
    cached_tokens: int | None = None


class _OutputDetails(Struct):
    reasoning_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None


class _Response(Struct):
    choices: list[_Choice]
    usage: _Usage | None = None
    model: str | None = None
    prompt_token_ids: Any = None


_decode_response = msgspec.json.Decoder(_Response).decode


def read_reply(content: bytes) -> Reply:
    """Read a chat completion.

    Raises:
        msgspec.MsgspecError: it is none, or has no choices.
    """
    response = _decode_response(content)
    if not response.choices:
        raise msgspec.ValidationError("no choices")
    usage = response.usage or _Usage()
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    reasoning = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else 0
    return Reply(
        [choice.read() for choice in sorted(response.choices, key=lambda choice: choice.index)],
        Usage(usage.prompt_tokens, cached or 0, usage.completion_tokens, reasoning or 0),
        response.model or "",
        prompt_token_ids=_numbers(response.prompt_token_ids, _ids),
    )


def read_error(content: bytes) -> Error:
    """Read an error in any of the forms that servers and proxies use."""
    try:
        body = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return Error(content[:500].decode("utf-8", "replace"))
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return Error(str(error))
    message = error.get("message") or error.get("detail") or ""
    param, code = error.get("param"), error.get("code")
    return Error(str(message), None if param is None else str(param), None if code is None else str(code))


def retry_after(headers: Any) -> float | None:
    """Seconds that Retry-After asks for, given as seconds or as an HTTP date (against the server's own clock)."""
    value = headers.get("Retry-After")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
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
