"""Plots as SVG text: bars, a share with its interval, points with a line through them, curves.

Each function returns one `<svg>` element, for a page that has `STYLE` and gives the colours `--ink`, `--dim`, `--line`,
`--good`, `--bad` and `--series-0` … `--series-3`. It scales with its place and carries a title and a description for
readers who don't see it. There is nothing in it that runs or is loaded; every text is escaped. Axes are linear.
"""

import html
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct

from dpo_cli.safe_text import plain

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, FLOOR = 46, 14, 28, 210  # margins, and where the x axis is
SERIES = 4  # colours there are
TICKS, NAME = 5, 24  # labels of an axis, characters of a curve's name
LETTER, LINE = 5.6, 10  # width of a letter, about, and height of a line
DOTS = 40  # points of a curve that are still drawn one by one

T = TypeVar("T", bound=tuple[float, ...])

STYLE = """
svg { display: block; width: 100%; height: auto; overflow: hidden; font: 11px system-ui, sans-serif; }
svg text { fill: var(--dim); } svg text.name { fill: var(--ink); font-size: 12px; }
svg .grid { stroke: var(--line); } svg .zero { stroke: var(--dim); }
svg .mark { stroke: var(--dim); stroke-dasharray: 3 3; } svg .fit { stroke: var(--bad); stroke-width: 2.5; }
svg .dot { fill: var(--series-0); fill-opacity: .35; } svg .band { fill-opacity: .15; }
svg .curve { fill: none; stroke-width: 2; stroke-linejoin: round; } svg .again { stroke-dasharray: 7 4; }
svg .event { stroke: var(--bad); stroke-opacity: .6; } svg text.event { fill: var(--bad); stroke: none; }
svg .good { stroke: var(--good); fill: var(--good); } svg .bad { stroke: var(--bad); fill: var(--bad); }
svg .calm { stroke: var(--series-0); fill: var(--series-0); }
svg .track, svg .whisker { stroke-width: 6; stroke-linecap: round; } svg .track { stroke: var(--line); }
svg .whisker { stroke-opacity: .45; }
""" + "".join(
    f"svg .fill-{i} {{ fill: var(--series-{i}); }} svg .stroke-{i} {{ stroke: var(--series-{i}); }}\n"
    for i in range(SERIES)
)


class _Axes(Struct):
    """The window of a plot: values (x, y) to coordinates."""

    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        return LEFT + _part(x, *self.x) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        return FLOOR - _part(y, *self.y) * (FLOOR - TOP)

    def at(self, x: float, y: float) -> str:
        return f"{self.across(x):.1f},{self.down(y):.1f}"

    def rows(self) -> str:
        """Lines across at round values, with their labels."""
        parts = []
        for tick in ticks(*self.y):
            y = self.down(tick)
            style = "grid" if tick else "zero"
            parts.append(f'<path class="{style}" d="M{LEFT},{y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 7, y + 4, _number(tick), "end"))
        return "".join(parts)

    def columns(self) -> str:
        """Labels of round values below."""
        return "".join(_text(self.across(tick), FLOOR + 17, _number(tick)) for tick in ticks(*self.x))


def escaped(text: str) -> str:
    """Text that others wrote, for an element or an attribute; a character that would act is named."""
    return html.escape(plain(text))


def bars(title: str, labels: Sequence[str], counts: Sequence[int], x_label: str = "") -> str:
    """Counts as bars, each above its label."""
    axes = _Axes((0, len(counts)), (0, max(counts, default=0) or 1))
    every = math.ceil(len(labels) / 12)  # labels that don't run into each other
    drawn = []
    for place, (label, count) in enumerate(zip(labels, counts, strict=True)):
        left, right, top = axes.across(place + 0.08), axes.across(place + 0.92), axes.down(count)
        drawn.append(
            f'<rect class="fill-0" x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" '
            f'height="{FLOOR - top:.1f}" rx="2"><title>{escaped(label)}: {count:,}</title></rect>'
        )
        if place % every == 0:
            drawn.append(_text((left + right) / 2, FLOOR + 17, label))
    most = max(range(len(counts)), key=lambda place: counts[place], default=0)
    described = f"{sum(counts):,} in {len(counts)} bars; the highest at {labels[most]}." if counts else "Empty."
    return _svg(title, described, axes.rows() + "".join(drawn) + _below(x_label))


def interval(name: str, low: float, value: float, high: float, mark: float, style: str = "") -> str:
    """A share and its interval on a scale from 0 to 1, with the share that chance would give.

    `style` is `good`, `bad` or `calm`; unset: bad if chance is outside.
    """
    words = f"{value:.1%} ({low:.1%} – {high:.1%}), {mark:.1%} by chance"
    style = style or ("good" if low <= mark <= high else "bad")
    y, pad = 30, 5  # room for the round ends
    from_, at, to, chance = (pad + share * (WIDTH - 2 * pad) for share in (low, value, high, mark))
    drawn = [
        _text(0, y - 14, name, "start", "name"),
        _text(WIDTH, y - 14, words, "end"),
        f'<path class="track" d="M{pad},{y}H{WIDTH - pad}"/>',
        f'<path class="whisker {style}" d="M{from_:.1f},{y}H{to:.1f}"/>',
        f'<circle class="{style}" cx="{at:.1f}" cy="{y}" r="5"/>',
        f'<path class="mark" d="M{chance:.1f},{y - 9}v18"/>',
        *(_text(WIDTH * share, 62, f"{share:.0%}", end) for share, end in ((0, "start"), (0.5, "middle"), (1, "end"))),
    ]
    return _svg(name, words, "".join(drawn), 66)


def scatter(title: str, points: Sequence[tuple[float, float]], slope: float | None, x_label: str, y_label: str) -> str:
    """Points, and the line of a slope, if there is one, through the origin."""
    axes = _Axes(_range([x for x, _ in points]), _range([y for _, y in points]))
    drawn = "".join(f'<circle class="dot" cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="3"/>' for x, y in points)
    line, described = "", f"{len(points):,} points."
    if slope is not None:
        left, right = (axes.at(x, slope * x) for x in axes.x)
        line = f'<path class="fit" d="M{left}L{right}"/>'
        described = f"{len(points):,} points; the line rises by {slope:.3g} for each 1 to the right."
    return _svg(title, described, axes.rows() + axes.columns() + drawn + line + _below(x_label) + _beside(y_label))


def lines(
    title: str,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    x_label: str,
    y_label: str,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    x_names: Sequence[str] = (),
    limit: float | None = None,
    marks: Mapping[float, str] | None = None,
    unjoined: Collection[str] = (),
) -> str:
    """Curves by name, through points in order of x; what is not finite is left out.

    Args:
        title: what they show.
        curves: name -> points (x, y).
        x_label: what the x axis is.
        y_label: what the y axis is.
        bands: name -> (x, low, high) of what is shaded around the curve.
        x_names: names of x = 0, 1, 2 …, instead of numbers.
        limit: a y with a dashed line across.
        marks: x -> name of what happened there, with a line down.
        unjoined: names of curves that are points without a line.
    """
    shaded = {name: _finite(band) for name, band in (bands or {}).items()}
    corners = [point for curve in curves.values() for point in _finite(curve)]
    corners += [(x, edge) for band in shaded.values() for x, *edges in band for edge in edges]
    across, down = [x for x, _ in corners] + list(marks or ()), [y for _, y in corners]
    axes = _Axes(_range(across), _range(down if limit is None else [*down, limit]))
    drawn, said = [axes.rows(), *(_mark(axes, x, name) for x, name in (marks or {}).items())], []
    if limit is not None:
        drawn.append(f'<path class="mark" d="M{LEFT},{axes.down(limit):.1f}H{WIDTH - RIGHT}"/>')
    left = float(LEFT)
    for place, (name, curve) in enumerate(curves.items()):
        points, band = _finite(curve), shaded.get(name, [])
        outline = [axes.at(x, low) for x, low, _ in band] + [axes.at(x, high) for x, _, high in reversed(band)]
        drawn.append(f'<polygon class="band fill-{place % SERIES}" points="{" ".join(outline)}"/>' if band else "")
        drawn.append(_curve(axes, place, name, points, name not in unjoined))
        if len(curves) > 1:
            drawn.append(f'<rect class="fill-{place % SERIES}" x="{left:.1f}" y="4" width="12" height="4"/>')
            drawn.append(_text(left + 17, 9, name[:NAME], "start"))
            left += 34 + LETTER * len(name[:NAME])
        said += [f"{name}: from {points[0][1]:.3g} to {points[-1][1]:.3g}."] if points else []
    drawn += [_text(axes.across(x), FLOOR + 17, name) for x, name in enumerate(x_names)]
    drawn.append(_below(x_label) + _beside(y_label) + ("" if x_names else axes.columns()))
    return _svg(title, " ".join(said), "".join(drawn))


def against(
    title: str,
    curve: tuple[str, Sequence[tuple[float, float]]],
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    x_label: str,
    y_label: str,
) -> str:
    """Named points in groups, beside a curve that they are held against.

    Args:
        title: what they show.
        curve: its name, and points (x, y) in order of x.
        points: name of a group -> (x, y, name of the point).
        x_label: what the x axis is.
        y_label: what the y axis is.
    """
    everything = [*curve[1], *((x, y) for group in points.values() for x, y, _ in group)]
    axes = _Axes(_range([x for x, _ in everything]), _range([y for _, y in everything]))
    drawn, left = [axes.rows(), axes.columns(), _curve(axes, 0, *curve, True)], float(LEFT)
    for place, name in enumerate([curve[0], *points]):
        drawn.append(f'<rect class="fill-{place % SERIES}" x="{left:.1f}" y="{TOP - 10}" width="12" height="4"/>')
        drawn.append(_text(left + 17, TOP - 5, name[:NAME], "start"))
        left += 34 + LETTER * len(name[:NAME])
    names: list[tuple[float, float, str]] = []
    for place, group in enumerate(points.values(), 1):
        for x, y, name in group:
            drawn.append(
                f'<circle class="fill-{place % SERIES}" cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="4">'
                f"<title>{escaped(name)}: {x:.3g}, {y:.3g}</title></circle>"
            )
            names.append((axes.across(x) + 7, axes.down(y) + 4, name[:NAME]))
    drawn += [_text(x, y, name, "start") for x, y, name in _apart(names)]
    said = "; ".join(f"{name} {x:.3g}, {y:.3g}" for group in points.values() for x, y, name in group)
    return _svg(title, said, "".join(drawn) + _below(x_label) + _beside(y_label))


def _apart(names: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Names at (x, y), from the top down, each moved down as far as those above need."""
    placed: list[tuple[float, float, str]] = []
    for x, y, name in sorted(names, key=lambda one: one[1]):
        for left, top, other in sorted(placed, key=lambda one: one[1]):
            beside = x + LETTER * len(name) < left or left + LETTER * len(other) < x
            if not beside and abs(y - top) < LINE:
                y = top + LINE
        placed.append((x, y, name))
    return placed


def _curve(axes: _Axes, place: int, name: str, points: Sequence[tuple[float, float]], joined: bool) -> str:
    """A line, and its points where they are few, each with its value for a pointer that rests on it."""
    through = " ".join(axes.at(x, y) for x, y in points)
    again = " again" if place >= SERIES else ""
    line = f'<polyline class="curve stroke-{place % SERIES}{again}" points="{through}"/>' if joined else ""
    if joined and len(points) > DOTS:
        return line
    return line + "".join(
        f'<circle class="fill-{place % SERIES}" cx="{axes.across(x):.1f}" cy="{axes.down(y):.1f}" r="3">'
        f"<title>{escaped(name)}, {_number(x)}: {y:.4g}</title></circle>"
        for x, y in points
    )


def _mark(axes: _Axes, x: float, name: str) -> str:
    at = axes.across(x)
    line = f'<path class="event" d="M{at:.1f},{TOP}V{FLOOR}"><title>{escaped(name)}</title></path>'
    return line + _text(at, TOP - 3, name, "middle", "event")


def ticks(low: float, high: float) -> list[float]:
    """About five round values from low to high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * TICKS >= high - low)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _finite(points: Sequence[T]) -> list[T]:
    return [point for point in points if all(map(math.isfinite, point))]


def _part(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the greatest, with a little air."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - air, high + air


def _number(value: float) -> str:
    return f"{value + 0:,.10g}".replace("-", "−")


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> str:
    classed = f' class="{style}"' if style else ""
    return f'<text{classed} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _below(label: str) -> str:
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, label) if label else ""


def _beside(label: str) -> str:
    middle = (TOP + FLOOR) / 2
    if not label:
        return ""
    return f'<g transform="rotate(-90 11 {middle})">{_text(11, middle, label)}</g>'


def _svg(title: str, description: str, drawn: str, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escaped(title)}"><title>{escaped(title)}</title>'
        f"<desc>{escaped(description)}</desc>{drawn}</svg>"
    )
