"""Text laid out without rich."""

import unicodedata

import pytest
from screen import FORBIDDEN, HOSTILE

from dpo_cli.safe_text import plain
from dpo_cli.terminal import cut, side_by_side, width, wrap


def test_plain_text_acts_on_nothing():
    for text in HOSTILE:
        left = {c for c in plain(text) if unicodedata.category(c) in FORBIDDEN} - {"\n", "\ufe0f"}
        assert not left
    assert plain("a\x1bb\n\u202e") == "a␛b\n<U+202E>"


def test_wide_and_combining_characters_are_counted():
    assert width("ab") == 2
    assert width("漢字") == 4
    assert width("e\u0301") == 1
    assert width("ｱ한👩") == 1 + 2 + 2
    assert cut("漢字漢字", 6) == "漢字…"
    assert cut("abcdef", 6) == "abcdef"


def test_lines_break_at_spaces():
    assert wrap("one two three", 7) == ["one two", "three"]
    assert wrap("  one two", 6) == ["  one", "two"]
    assert wrap("one\n\ntwo", 9) == ["one", "", "two"]
    assert wrap("", 9) == [""]
    assert wrap("abcdefgh ij", 3) == ["abc", "def", "gh", "ij"]
    assert wrap("漢字漢字", 5) == ["漢字", "漢字"]


@pytest.mark.parametrize("room", [-1, 1, 2, 7, 40])
def test_no_line_is_wider_than_its_room_and_no_letter_is_lost(room):
    text = "漢字 a bcd\t👩  efghijklmnop — שלום " * 3
    lines = wrap(text, room)
    assert all(width(line) <= max(2, room) for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_columns_are_reached_by_the_cursor():
    rule = "\x1b[11G\x1b[2m │ \x1b[0m"
    assert side_by_side([["a"], ["b", "c"]], 10) == ["a" + rule + "b", rule + "c"]
