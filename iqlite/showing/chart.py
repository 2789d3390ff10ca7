"""Curves as small SVG: axes with round numbers, a line a series in colours that the page's style sheet gives, and few enough points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 460, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 28
COLOURS = 8  # and then other dashes
MOST = 400  # points of a line
MOST_OF_ALL = 2400  # of all lines of a chart

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: (step, or what else is counted; value) in order."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Chart:
    """A drawn chart: `svg`, and the lines' points as they are drawn, for whoever reads values off it; `unit` is what is counted from left to right."""

    title: str
    what: str
    svg: Markup
    lines: list[tuple[str, str, list[Point]]]
    frame: tuple[float, float, float, float]
    unit: str

    def rows(self, count: int = 24) -> list[tuple[float, list[float | None]]]:
        """Evenly spread steps, each with every line's value there or before it."""
        steps = sorted({x for _, _, points in self.lines for x, _ in points})
        chosen = [steps[round(n * (len(steps) - 1) / max(1, min(count, len(steps)) - 1))] for n in range(min(count, len(steps)))]
        return [(step, [next((y for x, y in reversed(points) if x <= step), None) for _, _, points in self.lines]) for step in chosen]


def downsampled(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points: of each of as many equal runs of neighbours the lowest and the highest, in their order, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    groups = max(1, most // 2)
    found: list[Point] = []
    for group in range(groups):
        some = points[group * len(points) // groups : (group + 1) * len(points) // groups]
        low, high = min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])
        found += [low] if low[0] == high[0] else sorted((low, high))
    return found


def chart(title: str, what: str, series: Sequence[Series], unit: str = "step") -> Chart | None:
    """Draws lines over one pair of axes; points that aren't finite are left out. None where nothing is left. `unit` is what x counts."""
    kept = [(one.name, [p for p in one.points if math.isfinite(p[1])]) for one in series]
    kept = [(name, points) for name, points in kept if points]
    if not kept:
        return None
    most = max(20, min(MOST, MOST_OF_ALL // len(kept)))
    lines = [(name, f"s{n % COLOURS} d{n // COLOURS % 3}", downsampled(points, most)) for n, (name, points) in enumerate(kept)]
    xs, ys = [x for _, _, points in lines for x, _ in points], [y for _, _, points in lines for _, y in points]
    if min(ys) < 0 <= max(ys) + min(ys) and -min(ys) < 1e-3 * max(ys):  # a divergence that rounding has made negative
        ys = [max(0.0, y) for y in ys]
    x_ticks, y_ticks = ticks(min(xs), max(xs), 5, whole=True), ticks(min(ys), max(ys), 4)
    x0, x1 = min(xs[0], x_ticks[0], min(xs)), max(x_ticks[-1], max(xs))
    y0, y1 = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, title)]
    for tick in y_ticks:
        _, y = at(x0, tick)
        drawn.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y))
        drawn.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(LEFT - 6, y + 4, number(tick)))
    for tick in x_ticks:
        x, _ = at(tick, y0)
        anchor = "end" if x > WIDTH - RIGHT - 16 else "middle"
        drawn.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(x, HEIGHT - 8, anchor, f"{tick:,.0f}")
        )
    for _, style, points in lines:
        places = [at(x, y) for x, y in points]
        if len(places) == 1:
            drawn.append(Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(style, *places[0]))
        else:
            drawn.append(Markup('<polyline class="line {}" points="{}"/>').format(style, " ".join(f"{x:.1f},{y:.1f}" for x, y in places)))
    drawn.append(Markup('<line class="cursor" x1="0" x2="0" y1="{}" y2="{}" visibility="hidden"/></svg>').format(TOP, HEIGHT - BOTTOM))
    return Chart(title, what, Markup("").join(drawn), lines, (x0, x1, LEFT, WIDTH - RIGHT), unit)


def ticks(low: float, high: float, about: int, *, whole: bool = False) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, the first at most `low` and the last at least `high`."""
    if high - low <= 1e-12 * max(1.0, abs(low), abs(high)):
        low, high = (low, low + 1) if whole else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * times for times in (1, 2, 5, 10) if power * times >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number as people read it: three significant digits, thousands apart, no 1e+05."""
    if value == 0 or abs(value) < 1e-12:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Interval:
    """A value with its interval, to be drawn beside others."""

    name: str
    value: float
    low: float
    high: float


def forest(rows: Sequence[Interval], low: float, high: float, middle: float, label: str) -> Markup:
    """Values with their intervals, one below the other, beside a line at `middle`."""
    width, row, left = 460, 26, 190

    def at(x: float) -> float:
        return left + (min(max(x, low), high) - low) / (high - low) * (width - left - 14)

    height = row * len(rows) + 26
    drawn = [Markup('<svg class="chart forest" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, label)]
    drawn.append(Markup('<line class="middle" x1="{:.1f}" x2="{:.1f}" y1="4" y2="{}"/>').format(at(middle), at(middle), height - 22))
    for n, one in enumerate(rows):
        y = row * n + 17
        name = one.name if len(one.name) <= 32 else one.name[:31] + "…"
        drawn.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(left - 10, y + 4, name))
        drawn.append(Markup('<line class="line s0" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>').format(at(one.low), at(one.high), y, y))
        drawn.append(Markup('<circle class="dot s0" cx="{:.1f}" cy="{}" r="4.5"/>').format(at(one.value), y))
    for tick in (low, middle, high):
        drawn.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{:.0%}</text>').format(at(tick), height - 6, tick))
    return Markup("").join([*drawn, Markup("</svg>")])
