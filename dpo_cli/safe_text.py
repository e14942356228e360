"""Text that others wrote, made safe to show: control, bidirectional and zero-width characters by name."""

import re
from collections.abc import Iterator
from functools import cache

from dpo_cli.errors import UserError

# Everything that moves the cursor, reorders text or takes no room. The emoji selector U+FE0F stays after a symbol.
_HIDDEN = (
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
    "|(?<![\u203c-\u3299\U0001f000-\U0001faff])\ufe0f"
)


@cache
def _hidden() -> re.Pattern[str]:
    return re.compile(_HIDDEN)  # takes 10 ms, which --help has no need of


def pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces, each with whether it stands for a character that would have acted; newlines stay."""
    position = 0
    for match in _hidden().finditer(text):
        yield text[position : match.start()], False
        yield _name(match.group()), True
        position = match.end()
    yield text[position:], False


def plain(text: str) -> str:
    """The text as it can be shown: newlines are obeyed, everything else that would act is named."""
    return "".join(piece for piece, _ in pieces(text))


def _name(character: str) -> str:
    code = ord(character)
    if character == "\t":
        return "→   "
    if code < 0x20:
        return chr(0x2400 + code)  # U+2400 CONTROL PICTURES: ␀ … ␟
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0xA0 else f"<U+{code:04X}>"


def check_run_name(name: str) -> str:
    """A run's name, which is a folder's: no part of a path, and nothing in it that acts where it is shown.

    Raises:
        UserError: it is none.
    """
    if not name.strip() or name != name.strip() or ".." in name or name == "." or re.search(r"[/\\]", name):
        raise UserError(f"'{name}' is no name for a run", where="--name", hint="a folder name, without '/' or '..'")
    if not name.isprintable() or plain(name) != name:
        raise UserError(f"'{name}' is no name for a run: it holds characters that can't be seen", where="--name")
    return name
