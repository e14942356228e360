"""Make text that models and users wrote safe to show, and format numbers for people.

Escape sequences, control, bidirectional and zero-width characters are shown in a dim style, never obeyed. Rich markup
stays as it was typed, because text becomes `rich.text.Text` and is never parsed. Every piece of text that this
program did not write itself passes through `safe`. Letters that are written right to left are text and stay.
"""

import math
import re
from collections.abc import Iterable

from rich.text import Text

HIDDEN_STYLE = "dim italic"

# Everything that moves the cursor, reorders text or takes no room. The emoji selector U+FE0F stays after a symbol.
_HIDDEN = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![\u203c-\u3299\U0001f000-\U0001faff])\ufe0f"
)


def safe(text: str, style: str = "") -> Text:
    """Text to render: newlines are obeyed, everything else that would act on the terminal is shown."""
    shown = Text(style=style)
    position = 0
    for match in _HIDDEN.finditer(text):
        shown.append(text[position : match.start()])
        shown.append(_name(match.group()), HIDDEN_STYLE)
        position = match.end()
    shown.append(text[position:])
    return shown


def safe_line(text: str, style: str = "") -> Text:
    """The same on one line: a newline is shown as `⏎`."""
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


def plain(text: str) -> str:
    """The same without styles, for output that is not drawn by rich."""
    return safe(text).plain


def _name(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "→   "
    if code < 0x20:
        return chr(0x2400 + code)  # U+2400 CONTROL PICTURES: ␀ … ␟
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0xA0 else f"<U+{code:04X}>"


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
