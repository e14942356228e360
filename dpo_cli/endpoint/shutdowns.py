"""When models end: what an endpoint's own list says, else one dated table of what OpenAI has announced."""

import re
from collections.abc import Mapping
from datetime import date

# The shutdowns in the model list of OpenAI's SDK 3.57.0, `openai/types/shared/chat_model.py`.
SHUTDOWNS = {
    "2024-09-13": ("gpt-3.5-turbo-0301", "gpt-3.5-turbo-0613", "gpt-3.5-turbo-16k", "gpt-3.5-turbo-16k-0613"),
    "2024-12-06": ("gpt-4-vision-preview",),
    "2025-06-06": ("gpt-4-32k", "gpt-4-32k-0314", "gpt-4-32k-0613"),
    "2025-07-28": ("o1-preview", "o1-preview-2024-09-12"),
    "2025-10-10": ("gpt-4o-audio-preview-2024-10-01",),
    "2025-10-27": ("o1-mini", "o1-mini-2024-09-12"),
    "2026-02-12": ("codex-mini-latest",),
    "2026-02-17": ("chatgpt-4o-latest",),
    "2026-03-26": ("gpt-4-0125-preview", "gpt-4-0314", "gpt-4-turbo-preview"),
    "2026-05-07": ("gpt-4o-audio-preview", "gpt-4o-audio-preview-2024-12-17", "gpt-4o-audio-preview-2025-06-03",
                   "gpt-4o-mini-audio-preview", "gpt-4o-mini-audio-preview-2024-12-17"),
    "2026-07-23": ("gpt-4o-mini-search-preview", "gpt-4o-mini-search-preview-2025-03-11", "gpt-4o-search-preview",
                   "gpt-4o-search-preview-2025-03-11", "gpt-5-chat-latest", "gpt-5.1-chat-latest", "gpt-5.1-codex"),
    "2026-08-10": ("gpt-5.2-chat-latest", "gpt-5.3-chat-latest"),
    "2026-09-28": ("gpt-3.5-turbo-1106",),
    "2026-10-23": ("gpt-3.5-turbo", "gpt-3.5-turbo-0125", "gpt-4", "gpt-4-0613", "gpt-4-1106-preview", "gpt-4-turbo",
                   "gpt-4-turbo-2024-04-09", "gpt-4.1-nano", "gpt-4.1-nano-2025-04-14", "gpt-4o-2024-05-13", "o1",
                   "o1-2024-12-17", "o3-mini", "o3-mini-2025-01-31", "o4-mini", "o4-mini-2025-04-16"),
    "2026-12-11": ("gpt-5", "gpt-5-2025-08-07", "gpt-5-mini", "gpt-5-mini-2025-08-07", "gpt-5-nano",
                   "gpt-5-nano-2025-08-07", "o3", "o3-2025-04-16"),
    "2027-01-14": ("gpt-4.1", "gpt-4.1-2025-04-14", "gpt-4.1-mini", "gpt-4.1-mini-2025-04-14", "gpt-4o",
                   "gpt-4o-2024-08-06", "gpt-4o-2024-11-20", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"),
    "2027-01-20": ("gpt-audio-mini", "gpt-audio-mini-2025-12-15"),
    "2027-04-01": ("gpt-5.1", "gpt-5.1-2025-11-13", "gpt-5.4-nano", "gpt-5.4-nano-2026-03-17"),
}  # fmt: skip


def shutdown_of(model: str, listed: Mapping[str, str] | None = None) -> date | None:
    """The day on which a model ends; None: nobody has announced one.

    Args:
        model: its name, at OpenAI or through a router, fine-tuned or not.
        listed: model -> day, as the endpoint's own list has it; it wins over the table.
    """
    days = {name: day for day, names in SHUTDOWNS.items() for name in names} | dict(listed or {})
    plain = re.sub(r"^openai/|^ft:|:.*$", "", model.removeprefix("ft:"))
    found = days.get(model) or days.get(plain)
    try:
        return date.fromisoformat(found[:10]) if found else None
    except ValueError:
        return None


def shutdown_warning(model: str, today: date, instead: str, listed: Mapping[str, str] | None = None) -> str | None:
    """A warning if a model's end is announced, with the model to take instead."""
    day = shutdown_of(model, listed)
    if day is None:
        return None
    return f"{model} {'was to shut down' if day <= today else 'shuts down'} on {day}; {instead}"
