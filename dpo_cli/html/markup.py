"""Markup that escapes by default: what is put into a template is text, unless it is markup already.

Text is named where it would act on a terminal or reorder a line (`safe_text.plain`), then escaped by MarkupSafe.
"""

from collections.abc import Iterable
from typing import Any

from markupsafe import Markup, escape

from dpo_cli.safe_text import plain

__all__ = ["Markup", "escaped", "joined", "markup"]


def escaped(text: str) -> Markup:
    """Text that others wrote, for an element or an attribute; markup stays as it is."""
    return escape(text if isinstance(text, Markup) else plain(text))


def markup(template: str, *values: Any) -> Markup:
    """A template of our own, with values put into its `{}`: text is escaped, markup and numbers are not."""
    return Markup(template).format(*(escaped(value) if isinstance(value, str) else value for value in values))


def joined(parts: Iterable[str]) -> Markup:
    """Pieces one after the other; what is no markup is escaped."""
    return Markup("").join(map(escaped, parts))
