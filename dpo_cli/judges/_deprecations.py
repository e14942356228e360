"""Judge models whose end is announced: they are accepted, with a date."""

from datetime import date

from dpo_cli.config.settings import JudgeSection

# Shutdowns that OpenAI has announced (model list of its SDK, 3.52).
ENDINGS = {
    "2026-07-23": ("gpt-5-chat-latest", "gpt-5.1-chat-latest", "gpt-5.1-codex"),
    "2026-08-10": ("gpt-5.2-chat-latest", "gpt-5.3-chat-latest"),
    "2026-12-11": ("gpt-5", "gpt-5-mini", "gpt-5-nano", "gpt-5-2025-08-07", "gpt-5-mini-2025-08-07",
                   "gpt-5-nano-2025-08-07"),
    "2027-01-14": ("gpt-4.1", "gpt-4.1-mini", "gpt-4.1-2025-04-14", "gpt-4.1-mini-2025-04-14", "gpt-4o",
                   "gpt-4o-2024-11-20", "gpt-4o-2024-08-06", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"),
    "2027-04-01": ("gpt-5.1", "gpt-5.1-2025-11-13", "gpt-5.4-nano", "gpt-5.4-nano-2026-03-17"),
}  # fmt: skip


def ending_warning(model: str, today: date) -> str | None:
    """A warning if OpenAI has announced the end of a model."""
    for day, models in ENDINGS.items():
        if model in models:
            was = "was to shut down" if date.fromisoformat(day) <= today else "shuts down"
            return f"{model} {was} on {day}; the default judge model is {JudgeSection().model}"
    return None
