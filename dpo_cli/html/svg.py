"""Plots as SVG text: bars, a share with its interval, points with a line through them, curves.

Each function returns one `<svg>` element, for a page that has `STYLE` and the colours of `variables`, or for a file of
its own through `standalone`. It scales with its place and carries a title and a description for
readers who don't see it. There is nothing in it that runs or is loaded, and all text is escaped. Axes are linear.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from msgspec import Struct

from dpo_cli.html.labels import LETTER, RADIUS
from dpo_cli.html.labels import place as place_labels
from dpo_cli.html.markup import Markup, joined, markup

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, FLOOR = 46, 14, 28, 210  # margins, and where the x axis is
SERIES = 4  # colours there are
TICKS, NAME = 5, 24  # labels of an axis, characters of a curve's name
DOTS = 40  # points of a curve that are still drawn one by one

T = TypeVar("T", bound=tuple[float, ...])

# Colours by name: on light paper, on dark.
COLOURS = {
    "ink": ("#1d1f24", "#e8e6e1"),
    "dim": ("#6b7078", "#9aa0a8"),
    "line": ("#e4e2dc", "#343840"),
    "good": ("#2f8f5b", "#58c08a"),
    "bad": ("#d2622a", "#f0894f"),
    "series-0": ("#3b6fb6", "#78a8ea"),
    "series-1": ("#c2527c", "#e88bb0"),
    "series-2": ("#7a8b2f", "#b5c763"),
    "series-3": ("#7d5bb5", "#b699ec"),
}
CARD = ("#fff", "#1e2127")
LIGHT, DARK = 0, 1

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


def variables(theme: int) -> str:
    """The colours of a theme as CSS variables."""
    return " ".join(f"--{name}: {pair[theme]};" for name, pair in COLOURS.items())


def standalone(drawn: str) -> str:
    """A plot as a file of its own: its colours are written out, for viewers that know no CSS variables.

    Args:
        drawn: what a function here returned.
    """
    light, dark = _written_out(LIGHT), _written_out(DARK)
    style = f"svg {{ background: {CARD[LIGHT]}; }} {light} @media (prefers-color-scheme: dark) {{ "
    style += f"svg {{ background: {CARD[DARK]}; }} {dark} }}"
    named = str(drawn).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace("<title>", f"<style>{style}</style><title>", 1)


def _written_out(theme: int) -> str:
    """`STYLE` with a theme's colours in the place of variables."""
    return re.sub(r"var\(--([\w-]+)\)", lambda match: COLOURS[match[1]][theme], STYLE)


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

    def rows(self) -> Markup:
        """Lines across at round values, with their labels."""
        parts = []
        for tick in ticks(*self.y):
            y = self.down(tick)
            style = "grid" if tick else "zero"
            parts.append(markup('<path class="{}" d="M{},{:.1f}H{}"/>', style, LEFT, y, WIDTH - RIGHT))
            parts.append(_text(LEFT - 7, y + 4, _number(tick), "end"))
        return joined(parts)

    def columns(self) -> Markup:
        """Labels of round values below."""
        return joined(_text(self.across(tick), FLOOR + 17, _number(tick)) for tick in ticks(*self.x))


def bars(title: str, labels: Sequence[str], counts: Sequence[int], x_label: str = "") -> Markup:
    """Counts as bars, each above its label."""
    axes = _Axes((0, len(counts)), (0, max(counts, default=0) or 1))
    every = math.ceil(len(labels) / 12)  # labels that don't run into each other
    drawn = []
    for place, (label, count) in enumerate(zip(labels, counts, strict=True)):
        left, right, top = axes.across(place + 0.08), axes.across(place + 0.92), axes.down(count)
        drawn.append(
            markup(
                '<rect class="fill-0" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" rx="2">'
                "<title>{}: {:,}</title></rect>",
                left,
                top,
                right - left,
                FLOOR - top,
                label,
                count,
            )
        )
        if place % every == 0:
            drawn.append(_text((left + right) / 2, FLOOR + 17, label))
    most = max(range(len(counts)), key=lambda place: counts[place], default=0)
    described = f"{sum(counts):,} in {len(counts)} bars; the highest at {labels[most]}." if counts else "Empty."
    return _svg(title, described, axes.rows() + joined(drawn) + _below(x_label))


def interval(name: str, low: float, value: float, high: float, mark: float, style: str = "") -> Markup:
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
        markup('<path class="track" d="M{},{}H{}"/>', pad, y, WIDTH - pad),
        markup('<path class="whisker {}" d="M{:.1f},{}H{:.1f}"/>', style, from_, y, to),
        markup('<circle class="{}" cx="{:.1f}" cy="{}" r="5"/>', style, at, y),
        markup('<path class="mark" d="M{:.1f},{}v18"/>', chance, y - 9),
        *(_text(WIDTH * share, 62, f"{share:.0%}", end) for share, end in ((0, "start"), (0.5, "middle"), (1, "end"))),
    ]
    return _svg(name, words, joined(drawn), 66)


def scatter(
    title: str, points: Sequence[tuple[float, float]], slope: float | None, x_label: str, y_label: str
) -> Markup:
    """Points, and the line of a slope, if there is one, through the origin."""
    axes = _Axes(_range([x for x, _ in points]), _range([y for _, y in points]))
    drawn = joined(
        markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"/>', axes.across(x), axes.down(y)) for x, y in points
    )
    line, described = "", f"{len(points):,} points."
    if slope is not None:
        left, right = (axes.at(x, slope * x) for x in axes.x)
        line = markup('<path class="fit" d="M{}L{}"/>', left, right)
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
) -> Markup:
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
        drawn.append(markup('<path class="mark" d="M{},{:.1f}H{}"/>', LEFT, axes.down(limit), WIDTH - RIGHT))
    left = float(LEFT)
    for place, (name, curve) in enumerate(curves.items()):
        points, band = _finite(curve), shaded.get(name, [])
        outline = [axes.at(x, low) for x, low, _ in band] + [axes.at(x, high) for x, _, high in reversed(band)]
        drawn.append(
            markup('<polygon class="band fill-{}" points="{}"/>', place % SERIES, " ".join(outline))
            if band
            else Markup()
        )
        drawn.append(_curve(axes, place, name, points, name not in unjoined))
        if len(curves) > 1:
            drawn.append(markup('<rect class="fill-{}" x="{:.1f}" y="4" width="12" height="4"/>', place % SERIES, left))
            drawn.append(_text(left + 17, 9, name[:NAME], "start"))
            left += 34 + LETTER * len(name[:NAME])
        said += [f"{name}: from {points[0][1]:.3g} to {points[-1][1]:.3g}."] if points else []
    drawn += [_text(axes.across(x), FLOOR + 17, name) for x, name in enumerate(x_names)]
    drawn.append(_below(x_label) + _beside(y_label) + ("" if x_names else axes.columns()))
    return _svg(title, " ".join(said), joined(drawn))


def against(
    title: str,
    curve: tuple[str, Sequence[tuple[float, float]]],
    points: Mapping[str, Sequence[tuple[float, float, str]]],
    x_label: str,
    y_label: str,
) -> Markup:
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
        drawn.append(
            markup('<rect class="fill-{}" x="{:.1f}" y="{}" width="12" height="4"/>', place % SERIES, left, TOP - 10)
        )
        drawn.append(_text(left + 17, TOP - 5, name[:NAME], "start"))
        left += 34 + LETTER * len(name[:NAME])
    named = [(place, x, y, name) for place, group in enumerate(points.values(), 1) for x, y, name in group]
    centres = [(axes.across(x), axes.down(y)) for _, x, y, _ in named]
    names = [name[:NAME] for *_, name in named]
    line = [(axes.across(x), axes.down(y)) for x, y in curve[1]]
    for (place, x, y, name), (across, down), label in zip(
        named, centres, place_labels(centres, names, (LEFT, TOP, WIDTH, FLOOR), line), strict=True
    ):
        if label.is_far:
            drawn.append(
                markup('<path class="grid" d="M{:.1f},{:.1f}L{:.1f},{:.1f}"/>', across, down, label.x, label.y)
            )
        drawn.append(
            markup(
                '<circle class="fill-{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}: {:.3g}, {:.3g}</title></circle>',
                place % SERIES,
                across,
                down,
                RADIUS,
                name,
                x,
                y,
            )
        )
        drawn.append(_text(label.x, label.y, name[:NAME], label.anchor))
    said = "; ".join(f"{name} {x:.3g}, {y:.3g}" for _, x, y, name in named)
    return _svg(title, said, joined(drawn) + _below(x_label) + _beside(y_label))


def _curve(axes: _Axes, place: int, name: str, points: Sequence[tuple[float, float]], is_line: bool) -> Markup:
    """A line, and its points where they are few, each with its value for a pointer that rests on it."""
    through = " ".join(axes.at(x, y) for x, y in points)
    again = " again" if place >= SERIES else Markup()
    line = (
        markup('<polyline class="curve stroke-{}{}" points="{}"/>', place % SERIES, again, through)
        if is_line
        else Markup()
    )
    if is_line and len(points) > DOTS:
        return line
    return line + joined(
        markup(
            '<circle class="fill-{}" cx="{:.1f}" cy="{:.1f}" r="3"><title>{}, {}: {:.4g}</title></circle>',
            place % SERIES,
            axes.across(x),
            axes.down(y),
            name,
            _number(x),
            y,
        )
        for x, y in points
    )


def _mark(axes: _Axes, x: float, name: str) -> Markup:
    at = axes.across(x)
    line = markup('<path class="event" d="M{:.1f},{}V{}"><title>{}</title></path>', at, TOP, FLOOR, name)
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


def _text(x: float, y: float, text: str, anchor: str = "middle", style: str = "") -> Markup:
    classed = markup(' class="{}"', style) if style else Markup()
    return markup('<text{} x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>', classed, x, y, anchor, text)


def _below(label: str) -> Markup:
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, label) if label else Markup()


def _beside(label: str) -> Markup:
    middle = (TOP + FLOOR) / 2
    if not label:
        return Markup()
    return markup('<g transform="rotate(-90 11 {})">{}</g>', middle, _text(11, middle, label))


def _svg(title: str, description: str, drawn: str, height: int = HEIGHT) -> Markup:
    return markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title><desc>{}</desc>{}</svg>',
        WIDTH,
        height,
        title,
        title,
        description,
        drawn,
    )
