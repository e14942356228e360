"""JSON as language models write it: every object or array that a text holds.

Read beyond the standard: raw line breaks and tabs in strings, single quotes, quotes that should have been escaped,
trailing commas, `//` comments, words without quotes, Python's True, False and None. A key that stands twice with
different values, and an object that does not end, are not read. Pure functions.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

MOST_DEEP = 32  # levels of nesting; a verdict has three
MOST_STARTS = 64  # opening braces of a text that are tried beyond the standard: each may cost its whole length

_OPENING = re.compile(r"\{\s*[\"'“\w}]|\[\s*\{")
_SPACE = re.compile(r"(?:\s+|//[^\n]*)*")
# A quote ends a string only where a value can end, so that one within the string may stand unescaped.
_ENDS = {
    quote: re.compile(rf"(?<!\\)(?:\\\\)*{closing}(?=\s*(?:[:,}}\]]|//|\Z))")
    for quote, closing in (('"', '"'), ("'", "'"), ("“", "[”“]"))
}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_WORD = re.compile(r"(?:(?!//)[^\s,:\[\]{}\"'])+(?:[ \t]+(?:(?!//)[^\s,:\[\]{}\"'])+)*")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def find_values(text: str) -> Iterator[tuple[Any, str]]:
    """Each outermost object or array of objects in a text, with the part of the text that it was read from.

    If the text as a whole is JSON, only that, whatever it is.
    """
    text = text.strip()
    strict = json.JSONDecoder(strict=False, parse_constant=lambda name: None, object_pairs_hook=_object)
    try:
        yield strict.decode(text), text
    except (ValueError, RecursionError):
        pass
    else:
        return
    end = starts = 0
    while opening := _OPENING.search(text, end):
        start = opening.start()
        try:
            value, end = strict.raw_decode(text, start)
        except RecursionError:
            return
        except ValueError:
            starts += 1
            if starts > MOST_STARTS:
                return
            try:
                value, end = _read_value(text, start, 0)
            except ValueError:
                end = start + 1
                continue
        yield value, text[start:end]


def _object(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"the key {key} twice")
        found[key] = value
    return found


def _read_value(text: str, start: int, depth: int) -> tuple[Any, int]:
    """The value that begins at `start`, and where it ends."""
    if depth > MOST_DEEP:
        raise ValueError("too deep")
    start = _skip(text, start)
    match text[start : start + 1]:
        case "{":
            return _read_object(text, start + 1, depth)
        case "[":
            return _read_array(text, start + 1, depth)
        case '"' | "'" | "“":
            return _read_string(text, start)
    word = _WORD.match(text, start)
    if word is None:
        raise ValueError("no value")
    return _constant(word[0]), word.end()


def _read_object(text: str, place: int, depth: int) -> tuple[dict[Any, Any], int]:
    pairs = []
    while (place := _skip(text, place)) < len(text) and text[place] != "}":
        key, place = _read_value(text, place, MOST_DEEP)  # a key is a string, a number or a word
        place = _skip(text, place)
        if text[place : place + 1] != ":":
            raise ValueError("a key without a value")
        value, place = _read_value(text, place + 1, depth + 1)
        pairs.append((key, value))
        place = _next(text, place, "}")
    if place >= len(text):
        raise ValueError("it does not end")
    return _object(pairs), place + 1


def _read_array(text: str, place: int, depth: int) -> tuple[list[Any], int]:
    values = []
    while (place := _skip(text, place)) < len(text) and text[place] != "]":
        value, place = _read_value(text, place, depth + 1)
        values.append(value)
        place = _next(text, place, "]")
    if place >= len(text):
        raise ValueError("it does not end")
    return values, place + 1


def _next(text: str, place: int, closing: str) -> int:
    """The place after a comma, or that of the closing bracket."""
    place = _skip(text, place)
    if text[place : place + 1] == ",":
        return place + 1
    if text[place : place + 1] != closing:
        raise ValueError("no comma")
    return place


def _read_string(text: str, start: int) -> tuple[str, int]:
    end = _ENDS[text[start]].search(text, start + 1)
    if end is None:
        raise ValueError("a string that does not end")
    return _ESCAPE.sub(_unescape, text[start + 1 : end.end() - 1]), end.end()


def _unescape(match: re.Match[str]) -> str:
    sign = match[1]
    return chr(int(sign[1:], 16)) if len(sign) > 1 else _ESCAPED.get(sign, sign)


def _constant(word: str) -> Any:
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    number = _NUMBER.fullmatch(word)
    if number is None:
        return word
    return float(word) if number[1] or number[2] else int(word[:20])


def _skip(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place
