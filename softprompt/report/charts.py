"""Line and scatter charts as inline SVG, for a report that needs neither a plotting library nor a second file.

Colours come from CSS classes, so a chart follows the page's light or dark theme. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34
MOST_POINTS = 300
GROUPS = 6  # colours of dots: the CSS classes g0 to g5

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line; ``kind`` is its CSS class: ``train`` (thin), ``eval`` (with dots), ``base`` (a dashed level)."""

    name: str
    points: Sequence[Point]
    kind: str


def line_chart(series: Sequence[Series], label: str) -> Markup:
    """An ``<svg>`` with axes, lines and a tooltip on every dot. Empty markup when there is nothing finite to draw."""
    finite = [Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.kind) for s in series]
    shown = [Series(s.name, thin(s.points), s.kind) for s in finite if s.points]
    if not shown:
        return Markup("")
    xs = [x for line in shown for x, _ in line.points]
    ys = [y for line in shown for _, y in line.points]
    low, high = min(xs), max(max(xs), min(xs) + 1)
    x_ticks = [value for value in ticks(low, high) if low <= value <= high]
    y_ticks = ticks(min(ys), max(ys))
    frame = _Frame(low, high, y_ticks[0], y_ticks[-1])
    parts = [_grid(frame, x_ticks, y_ticks), *(_line(frame, line) for line in shown)]
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return opening + Markup("").join(parts) + Markup("</svg>")


@dataclass(frozen=True)
class Dot:
    """One result: ``deviation`` is the half length of the bar through it, ``group`` (from 0) its colour."""

    x: float
    y: float
    deviation: float
    group: int
    name: str


def scatter_chart(dots: Sequence[Dot], label: str) -> Markup:
    """Dots over a logarithmic x axis, for costs. Empty markup when there is nothing finite to draw."""
    shown = [dot for dot in dots if dot.x > 0 and all(map(math.isfinite, (dot.x, dot.y, dot.deviation)))]
    if not shown:
        return Markup("")
    xs = [math.log10(dot.x) for dot in shown]
    low, high = min(xs) - 0.08, max(xs) + 0.08
    x_ticks = [math.log10(value) for value in log_ticks(10**low, 10**high)]
    y_ticks = ticks(min(dot.y - dot.deviation for dot in shown), max(dot.y + dot.deviation for dot in shown))
    frame = _Frame(low, high, y_ticks[0], y_ticks[-1])
    parts = [_grid(frame, x_ticks, y_ticks, _power), *(_dot(frame, dot) for dot in shown)]
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, label)
    return opening + Markup("").join(parts) + Markup("</svg>")


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about ``count`` round numbers between two positive ones, for a logarithmic axis."""
    found: list[float] = []
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        found = [float(factor * 10.0**power) for power in decades for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) <= count:
            return found
    return found[:: math.ceil(len(found) / count)]


def thin(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points; each is the mean of a run of neighbours."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def smooth(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """A running mean over about ``share`` of all points."""
    reach = max(1, round(share * len(points)))
    smoothed = []
    for place, (x, _) in enumerate(points):
        near = [y for _, y in points[max(0, place - reach) : place + reach + 1]]
        smoothed.append((x, sum(near) / len(near)))
    return smoothed


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span ``low`` to ``high`` in about ``count`` steps."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class _Frame:
    """Data limits, and how they map to the drawing."""

    left: float
    right: float
    bottom: float
    top: float

    def place(self, point: Point) -> Point:
        across = (point[0] - self.left) / (self.right - self.left)
        up = (point[1] - self.bottom) / (self.top - self.bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _short(value: float) -> Markup:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return escape(f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e"))
    return escape(f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.6g}")


def _power(value: float) -> Markup:
    """The number whose logarithm stands at ``value``."""
    return _short(float(f"{10**value:.3g}"))


def _grid(
    frame: _Frame,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: Callable[[float], Markup] = _short,
) -> Markup:
    parts = []
    for value in y_ticks:
        _, y = frame.place((frame.left, value))
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
            LEFT, WIDTH - RIGHT, y, y))  # fmt: skip
        parts.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 8, y + 4, _short(value))
        )
    for value in x_ticks:
        x, _ = frame.place((value, frame.bottom))
        parts.append(Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
            x, HEIGHT - BOTTOM + 20, x_label(value)))  # fmt: skip
    return Markup("").join(parts)


def _line(frame: _Frame, line: Series) -> Markup:
    places = [frame.place(point) for point in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(line.kind, path, line.name)
    if line.kind != "eval":
        return drawn
    dots = [
        Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>').format(
            line.kind, x, y, f"{line.name} at step {step:g}: {value:.4g}")
        for (x, y), (step, value) in zip(places, line.points, strict=True)
    ]  # fmt: skip
    return drawn + Markup("").join(dots)


def _dot(frame: _Frame, dot: Dot) -> Markup:
    place = math.log10(dot.x)
    x, y = frame.place((place, dot.y))
    _, above = frame.place((place, dot.y + dot.deviation))
    _, below = frame.place((place, dot.y - dot.deviation))
    colour = f"g{dot.group % GROUPS}"
    drawn = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5"><title>{}</title></circle>').format(
        colour, x, y, dot.name
    )
    if not dot.deviation:
        return drawn
    bar = Markup('<line class="bar {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    return bar.format(colour, x, x, below, above) + drawn
