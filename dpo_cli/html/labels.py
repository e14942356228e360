"""Where the names of points go in a plot: beside their point, and on no other name, point or edge.

Sizes are estimates from the number of letters, since nothing here measures a font.
"""

import math
from collections.abc import Sequence

from msgspec import Struct

LETTER, LINE = 5.6, 10  # width of a letter, about, and height of a line
RADIUS = 4  # of a point
BASELINE = 8  # of a line's height, how much stands above the baseline
NEAR = 7  # from a point to its name
RINGS = (NEAR, 16, 28, 42, 58, 76)  # distances to try
ANGLES = (0, 180, -90, 90, -45, 45, -135, 135, -20, 20, -160, 160)  # degrees clockwise from the right, best first

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Label(Struct, frozen=True):
    """A name at (x, y), its baseline; `anchor` as SVG has it. `is_far`: a line to its point is wanted."""

    x: float
    y: float
    anchor: str
    is_far: bool


def place(
    points: Sequence[tuple[float, float]], names: Sequence[str], window: Box, line: Sequence[tuple[float, float]] = ()
) -> list[Label]:
    """A place for each name, in order of the points.

    Args:
        points: centres (x, y) of what is named, in pixels, y down.
        names: of the points, in the same order.
        window: where names may stand.
        line: points of a curve that names do better not to cross.
    """
    circles = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points]
    taken: list[Box] = [(x - 3, y - 3, x + 3, y + 3) for x, y in line]
    found: dict[int, Label] = {}
    for index in sorted(range(len(points)), key=lambda index: points[index][1]):
        label = min(
            _candidates(points[index], len(names[index])),
            key=lambda one: _overlap(box(one, len(names[index])), [*taken, *circles], window),
        )
        taken.append(box(label, len(names[index])))
        found[index] = label
    return [found[index] for index in range(len(points))]


def box(label: Label, letters: int) -> Box:
    """What a name of so many letters covers."""
    width = LETTER * letters
    left = label.x - {"start": 0.0, "middle": width / 2, "end": width}[label.anchor]
    return left, label.y - BASELINE, left + width, label.y + LINE - BASELINE


def _candidates(point: tuple[float, float], letters: int) -> list[Label]:
    """Places around a point, nearest and best first: `min` keeps the first of equals."""
    return [
        Label(
            x=point[0] + ring * math.cos(math.radians(angle)),
            y=point[1] + ring * math.sin(math.radians(angle)) + _drop(angle),
            anchor="middle" if abs(angle) == 90 else "start" if abs(angle) < 90 else "end",
            is_far=ring > NEAR,
        )
        for ring in RINGS
        for angle in ANGLES
    ]


def _drop(angle: float) -> float:
    """From the point to the baseline: centred beside it, above it when up, below it when down."""
    return 4.0 + 4.0 * math.sin(math.radians(angle))


def _overlap(one: Box, others: Sequence[Box], window: Box) -> float:
    """Square pixels that a name would share with others, or have outside the window."""
    inside = _shared(one, window)
    outside = (one[2] - one[0]) * (one[3] - one[1]) - inside
    return round(outside + sum(_shared(one, other) for other in others), 6)


def _shared(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
