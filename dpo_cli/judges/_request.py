"""The request that asks a language model for a verdict: its message, its fields, and which model gets which."""

import re
from typing import Any
from urllib.parse import urlsplit

from dpo_cli.config.settings import JudgeSection
from dpo_cli.judges._forms import RANKING, Form, verdict_schema


def request(
    model: str,
    message: str,
    labels: list[str],
    cap: int | None,
    settings: JudgeSection,
    form: Form = RANKING,
) -> dict[str, Any]:
    """The request body; beyond OpenAI only what every endpoint knows: model, messages, format and output cap."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": message}]}
    openai = is_openai(settings.url)
    if cap is not None:
        body["max_completion_tokens" if openai else "max_tokens"] = cap
    if settings.response_format is not None:
        schema = settings.response_format == "json_schema"
        body["response_format"] = verdict_schema(labels, True, form) if schema else {"type": "json_object"}
    if settings.flex:
        body["service_tier"] = "flex"
    if openai:
        extra: dict[str, Any] = {"reasoning_effort": settings.reasoning_effort}
        if re.match(r"gpt-(5\.([6-9]|\d\d)|[6-9]|\d\d)", model):
            # Each message is sent once: writing it to the cache would cost a quarter more and never pay.
            extra["prompt_cache_options"] = {"mode": "explicit"}
        body |= {name: value for name, value in extra.items() if value is not None}
    return body | settings.extra_body


def is_openai(url: str) -> bool:
    """Whether an endpoint is OpenAI's own, or Azure's."""
    host = urlsplit(url).hostname or ""
    return host == "api.openai.com" or host.endswith((".api.openai.com", ".openai.azure.com"))
