"""The page: whole, closed to the outside, and deaf to what completions say."""

from html.parser import HTMLParser

import pytest
from test_audit import audited, judged, order, row, simulated

from dpo_cli import svg
from dpo_cli.report import page
from dpo_cli.schema import Judgment

HOSTILE = "</p></svg><script>alert(1)</script><img src=https://evil.example/x onerror='go()'>\u202e\x1b[31m &amp;"
VOID = {"meta", "!doctype"}


class Page(HTMLParser):
    """Elements and attributes of a page; fails where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def hostile():
    rows = simulated(20)
    bad = row(99, HOSTILE, HOSTILE + " again", HOSTILE * 200)
    rows.append((bad, judged(bad, order([0, 1, 2], 9, 1, 30), order([1, 2, 0], 1, 30, 9), judge={"model": HOSTILE})))
    rows.append((row(100), Judgment(id=HOSTILE, completions_id="", skipped=HOSTILE)))
    rows.append((row(101), Judgment(id=HOSTILE + "!", completions_id="", error=HOSTILE)))
    return audited(*rows)


def test_hostile_text_is_shown_and_stays_text():
    text = page(hostile())
    found = Page(text)
    assert {"script", "img", "iframe", "link", "a", "object"}.isdisjoint(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert "<script>alert(1)</script>" in found.text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<U+202E>" in found.text


def test_the_page_loads_nothing():
    text = page(audited(*simulated(20)))
    assert "://" not in text
    assert "url(" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in Page(text).attributes


def test_the_page_has_every_part():
    found = audited(*simulated(60, primacy=3.0, per_character=0.01))
    text = Page(page(found)).text
    for part in ("Does it prefer what it sees first?", "How it uses its scale", "Krippendorff", "Scores as given",
                 "Scores with --length-control", "Largest gap", "prefers what it is shown first"):  # fmt: skip
        assert part in text
    assert f"{found.judges['m'].first_wins.share:.1%}" in text
    assert Page(page(found)).tags.count("svg") == 7


def test_a_page_of_little_is_a_page():
    assert "Nothing stands out" in Page(page(audited())).text
    single = row(1, "a", "b")
    assert "How it uses its scale" in Page(page(audited((single, judged(single, order([0, 1], 5, 5)))))).text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-0.7, 0.8, [-0.5, 0, 0.5]), (3, 3, [3]), (0, 0.04, [0, 0.01, 0.02, 0.03, 0.04])],
)
def test_ticks_are_round(low, high, expected):
    assert svg.ticks(low, high) == pytest.approx(expected)


def test_a_bar_is_as_high_as_its_count():
    drawn = Page(svg.bars("t", ["1", "2"], [5, 10]))
    heights = [float(value) for name, value in drawn.attributes if name == "height"]
    assert heights == [pytest.approx(heights[1] / 2), svg.FLOOR - svg.TOP]


def test_a_curve_goes_through_its_finite_points():
    drawn = Page(svg.lines("t", {"a": [(0, 0), (1, float("nan")), (2, 4)], "b": [(0, 2)]}, "x", "y"))
    curves = [value.split() for name, value in drawn.attributes if name == "points" and value]
    assert [len(curve) for curve in curves] == [2, 1]
    (left, low), (right, high) = (map(float, point.split(",")) for point in curves[0])
    assert left < right
    assert low > high  # y grows downwards
    assert "a: from 0 to 4." in drawn.text


def test_an_interval_is_red_where_it_leaves_chance_out():
    def style(low, high):
        return [value for name, value in Page(svg.interval("n", low, 0.5, high, 0.4)).attributes if name == "class"]

    assert "bad" in style(0.45, 0.6)
    assert "good" in style(0.3, 0.6)
