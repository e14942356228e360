"""Make text that models and users wrote safe to show, and format numbers for people.

Escape sequences, control, bidirectional and zero-width characters are shown in a dim style, never obeyed. Rich markup
stays as it was typed, because text becomes `rich.text.Text` and is never parsed. Every piece of text that this
program did not write itself passes through `safe`. Letters that are written right to left are text and stay.
"""

import math
from collections.abc import Iterable

from rich.text import Text

from dpo_cli.safe_text import pieces

HIDDEN_STYLE = "dim italic"
LABEL = "cyan"  # ids, roles, names of settings
ID_SHOWN = 8  # characters of an id in a list


def safe(text: str, style: str = "") -> Text:
    """Text to render: newlines are obeyed, everything else that would act on the terminal is shown."""
    shown = Text(style=style)
    for piece, hidden in pieces(text):
        shown.append(piece, HIDDEN_STYLE if hidden else None)
    return shown


def safe_line(text: str, style: str = "") -> Text:
    """Text of others on one line, made safe: a newline is shown as `⏎`."""
    shown = Text(style=style)
    for number, line in enumerate(text.split("\n")):
        if number:
            shown.append(" ⏎ ", HIDDEN_STYLE)
        shown.append_text(safe(line))
    return shown


def joined(parts: Iterable[Text], separator: str = " · ") -> Text:
    """Texts in a row, each in its own style."""
    row = Text()
    for position, part in enumerate(parts):
        if position:
            row.append(separator, "dim")
        row.append_text(part)
    return row


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `12 min 31 s` or `3 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"


def dollars(amount: float) -> str:
    """Dollars with cents, and with the digits that matter where it is less than one."""
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.4f}"


def number(value: float | None) -> str:
    """A number with about four digits; `–` where there is none."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float | None) -> str:
    """A share as `61.3%`; `–` where there is none."""
    return "–" if share is None else f"{100 * share:.1f}%"
