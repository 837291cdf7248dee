"""Line charts for a report: values become the coordinates that the page's template draws as SVG.

A chart knows no colours and makes no text of markup: the template escapes every label and gives each class its colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 34
_MOST_POINTS = 400  # of a line; more would not be seen
_TICKS = 5  # about so many on an axis

Point = tuple[float, float]


class Series(NamedTuple):
    """Values to draw: a line through ``points``, or a dot with a whisker of ``error`` up and down for each."""

    name: str
    look: str  # its class in the page's style
    points: Sequence[Point]
    dots: bool = False
    errors: Sequence[float] = ()


class Level(NamedTuple):
    """A value to compare with: a line across the chart."""

    name: str
    look: str
    value: float
    shown: str  # the value as text


class Tick(NamedTuple):
    """A mark of an axis: where it is, and what stands there."""

    at: float
    text: str


class Drawn(NamedTuple):
    """A series in the chart's coordinates."""

    name: str
    look: str
    path: str  # of a line; "" of dots
    dots: Sequence[
        tuple[float, float, float, float]
    ]  # x, y, and the whisker's ends; (0, 0) without one


@dataclass(frozen=True)
class Chart:
    """A chart as the template draws it."""

    title: str
    x_name: str
    series: Sequence[Drawn]
    levels: Sequence[tuple[Level, float]]  # with its height
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def chart(
    title: str,
    x_name: str,
    series: Sequence[Series],
    levels: Sequence[Level] = (),
    *,
    show: Callable[[float], str] = lambda value: f"{value:g}",
    bounds: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart of these series and levels; None where no series has a finite point.

    ``show`` writes a value of the vertical axis. The axis has ``bounds``, or begins at 0 unless a value is below it.
    """
    finite = [s._replace(points=_finite(s.points)) if not s.errors else s for s in series]
    finite = [s for s in finite if s.points]
    if not finite:
        return None
    xs = [x for s in finite for x, _ in s.points]
    ys = [y for s in finite for _, y in s.points] + [level.value for level in levels]
    low, high = bounds or (min(0.0, *ys), max(ys))
    across = _scale(min(0.0, *xs), max(xs), _LEFT, WIDTH - _RIGHT)
    up = _scale(low, high + (0 if bounds else 0.04 * (high - low)), HEIGHT - _BOTTOM, _TOP)
    drawn = [_drawn(s, across, up) for s in finite]
    return Chart(
        title,
        x_name,
        drawn,
        [(level, up(level.value)) for level in levels],
        [Tick(across(x), f"{x:g}") for x in ticks(min(0.0, *xs), max(xs))],
        [Tick(up(y), show(y)) for y in ticks(low, high)],
    )


def _finite(points: Sequence[Point]) -> list[Point]:
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    return thinned(kept, _MOST_POINTS)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about ``most`` points, evenly taken, with the first, the last, the highest and the lowest."""
    if len(points) <= most:
        return list(points)
    every = range(len(points))
    extreme = {max(every, key=lambda i: points[i][1]), min(every, key=lambda i: points[i][1])}
    chosen = extreme | {i * (len(points) - 1) // (most - 1) for i in range(most)}
    return [points[i] for i in sorted(chosen)]


def _scale(low: float, high: float, first: float, last: float) -> Callable[[float], float]:
    """From values between ``low`` and ``high`` to coordinates between ``first`` and ``last``."""
    span = high - low or 1.0
    return lambda value: round(first + (last - first) * (value - low) / span, 1)


def _drawn(series: Series, across: Callable[[float], float], up: Callable[[float], float]) -> Drawn:
    if not series.dots:
        places = " ".join(f"{across(x)},{up(y)}" for x, y in series.points)
        return Drawn(series.name, series.look, places, ())
    errors = series.errors or [0.0] * len(series.points)
    pairs = zip(series.points, errors, strict=True)
    dots = [(across(x), up(y), up(y - error), up(y + error)) for (x, y), error in pairs]
    return Drawn(series.name, series.look, "", dots)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two values, about ``_TICKS`` of them."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low] if math.isfinite(low) else []
    raw = span / _TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= 0.999 * raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def smoothed(points: Sequence[Point], share: float = 0.2) -> list[Point]:
    """The mean of each value and those before it, over ``share`` of all points (2 at least)."""
    size = max(2, round(share * len(points)))
    means = []
    running = 0.0
    for i, (x, y) in enumerate(points):
        running += y - (points[i - size][1] if i >= size else 0.0)
        means.append((x, running / min(i + 1, size)))
    return means
