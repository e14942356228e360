"""Small plots in a terminal: a sparkline on one line, a curve in Braille dots.

Values that are not finite leave a gap. Axes are linear; a plot has no more points than its width has room for, since
neighbours are averaged.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

BLOCKS = "▁▂▃▄▅▆▇█"
# The bit of each dot of a Braille cell, by column, from the top down (Unicode chart U+2800).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as one line of blocks, at most `width` long; the lowest is `▁`, a gap is a space."""
    if not values:
        return ""
    columns = _resample(values, min(width, len(values)))
    low, high = _range(columns)
    return "".join(" " if not math.isfinite(value) else BLOCKS[_level(value, low, high, 8)] for value in columns)


class Frame(NamedTuple):
    """The part of the plane that a plot shows, and its size: `width` characters of two dots, `height` lines of four."""

    left: float
    right: float
    low: float
    high: float
    width: int
    height: int

    def dot(self, x: float, y: float) -> tuple[int, int]:
        """Column and row of a point in dots, from the upper left."""
        rows = 4 * self.height
        column = _level(x, self.left, self.right, 2 * self.width)
        return column, rows - 1 - _level(y, self.low, self.high, rows)


def frame(points: Sequence[tuple[float, float]], width: int, height: int) -> Frame:
    """The frame that holds the points (x, y) whose y is finite."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    return Frame(*_range([x for x, _ in finite]), *_range([y for _, y in finite]), width, height)


def braille(points: Sequence[tuple[float, float]], frame: Frame) -> list[str]:
    """A curve through points (x, y) in order of x; a y that is not finite breaks it.

    Returns:
        `frame.height` lines of `frame.width` characters, the highest value on the first line.
    """
    cells = [[0x2800] * frame.width for _ in range(frame.height)]
    before: tuple[int, int] | None = None
    for x, y in points:
        if not math.isfinite(y):
            before = None
            continue
        here = frame.dot(x, y)
        for column, row in _line(before or here, here):
            cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
        before = here
    return ["".join(map(chr, line)) for line in cells]


def bar(share: float, width: int) -> str:
    """A horizontal bar as long as a share of `width` characters, to an eighth of one."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def interval(low: float, value: float, high: float, mark: float, width: int) -> str:
    """A value between the ends of its interval, on a scale from 0 to 1 with a mark: `····├─●─┤··┊·····`."""

    def column(share: float) -> int:
        return _level(share, 0, 1, width)

    line = ["·"] * width
    line[column(mark)] = "┊"
    line[column(low) : column(high) + 1] = "─" * (column(high) + 1 - column(low))
    line[column(low)], line[column(high)] = "├", "┤"
    line[column(value)] = "●"
    return "".join(line)


def _resample(values: Sequence[float], width: int) -> list[float]:
    """Means of `width` neighbouring groups; not a number where a group has no finite value."""
    means = []
    for column in range(width):
        group = values[column * len(values) // width : (column + 1) * len(values) // width]
        finite = [value for value in group if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means


def _range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)]
    return (min(finite), max(finite)) if finite else (0.0, 0.0)


def _level(value: float, low: float, high: float, levels: int) -> int:
    """Which of `levels` equal steps from low to high; the middle one where there is no range."""
    if high <= low:
        return (levels - 1) // 2
    return min(levels - 1, int((value - low) / (high - low) * levels))


def _line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """The dots from start to end."""
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return [
        (round(start[0] + (end[0] - start[0]) * i / steps), round(start[1] + (end[1] - start[1]) * i / steps))
        for i in range(steps + 1)
    ]
