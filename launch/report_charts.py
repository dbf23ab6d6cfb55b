"""Curves of several runs as one drawing in SVG, whose scale and smoothing are chosen by style alone."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from poise.launch.report_curves import Curve, Points, smoothed
from poise.launch.report_markup import Markup, element
from poise.launch.report_tables import column_texts

# Distinct for people with any kind of colour vision (Okabe and Ito); later runs get them again, with dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DARK_COLOURS = ("#4ea8de", "#ff8a3d", "#2fc495", "#e29cc5", "#f0b73a", "#8fd0f5")
DASHES = (None, "7 3", "2 3", "8 3 2 3")
MAX_RUNS = len(COLOURS) * len(DASHES)

_WIDTH, _HEIGHT = 420, 232
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 24
_SMOOTH_FROM, _MARKED_UP_TO = 20, 60  # points: fewer are not smoothed; so few are marked


class Line(NamedTuple):
    """One run's curve.

    Attributes:
      run: number of the run, which decides its colour.
      name: of the run.
      curve: with one row at least.
    """

    run: int
    name: str
    curve: Curve


class _Scale(NamedTuple):
    """From values, or their logarithms, between two bounds to places in the drawing, with the ticks of the axis."""

    low: float
    high: float
    start: int
    end: int
    ticks: dict[float, str]
    logarithmic: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        if self.logarithmic:
            values = np.log10(np.maximum(values, 10.0**self.low))
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)

    def labels(self) -> list[tuple[float, str]]:
        places = self.place(np.array(list(self.ticks), float))
        return [(float(place), label) for place, label in zip(places, self.ticks.values(), strict=True)]


def run_class(run: int) -> str:
    """The style of everything that belongs to a run."""
    return f"r{run} c{run % len(COLOURS)}"


def swatch(run: int) -> Markup:
    """A short line as a run's curves are drawn."""
    dash = DASHES[run // len(COLOURS)]
    stroke = element("path", d="M1 5H21", stroke="currentColor", stroke_width=3, stroke_dasharray=dash)
    return element("svg", stroke, cls=f"swatch c{run % len(COLOURS)}", view_box="0 0 22 10", aria_hidden="true")


def chart(title: str, lines: Sequence[Line], smoothing: float | int) -> Markup:
    """A figure with the curves of one metric, their last values beside the runs' names.

    Args:
      title: the metric.
      lines: a curve each.
      smoothing: share of a curve's points that its moving mean spans; 0 for none.
    """
    drawn = [(line, line.curve.points()) for line in lines]
    positive = all((points.means > 0).all() for _, points in drawn)
    lasts = column_texts([line.curve.last for line in lines])
    description = "; ".join(f"{line.name} ends at {last}" for line, last in zip(lines, lasts, strict=True))
    x = _linear([points.steps for _, points in drawn], _LEFT, _WIDTH - _RIGHT, wanted=4, whole=True)
    values = [entry for _, points in drawn for entry in (points.lows, points.highs)]
    y = _linear(values, _HEIGHT - _BOTTOM, _TOP, wanted=4)
    layers = [_layer(drawn, x, y, smoothing, "linear" if positive else None)]
    if positive:
        layers.append(_layer(drawn, x, _logarithmic(drawn), smoothing, "log"))
    drawing = element(
        "svg",
        *layers,
        *[_text(text, place, _HEIGHT - 6, "middle") for place, text in x.labels()],
        view_box=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title} by step: {description}",
    )
    aside = None if positive else element("span", "linear, not all above 0", cls="only-log")
    head = element("figcaption", element("span", title, cls="metric"), aside)
    return element("figure", head, drawing, element("ul", *map(_legend, lines, lasts), cls="legend"), cls="chart")


def _legend(line: Line, last: str) -> Markup:
    facts = [f"{line.curve.rows:,} rows"]
    if line.curve.seeds > 1:
        facts.append(f"mean and range of {line.curve.seeds}")
    if line.curve.rows_per_point > 1:
        facts.append(f"{line.curve.rows_per_point:,} rows a point")
    if line.curve.unusable:
        facts.append(f"{line.curve.unusable:,} rows without a finite number")
    seeds = element("span", f"mean of {line.curve.seeds}", cls="seeds") if line.curve.seeds > 1 else None
    return element(
        "li",
        swatch(line.run),
        element("span", line.name, cls="name"),
        seeds,
        element("span", last, cls="last"),
        cls=run_class(line.run),
        title=f"{line.name}: {', '.join(facts)}",
    )


def _layer(drawn: list[tuple[Line, Points]], x: _Scale, y: _Scale, smoothing: float | int, kind: str | None) -> Markup:
    """Everything that depends on the scale of the values."""
    right = _WIDTH - _RIGHT
    grid = "".join(f"M{_LEFT} {_short(place)}H{right}" for place, _ in y.labels())
    parts = [element("path", d=grid, cls="grid")]
    parts += [_text(text, _LEFT - 6, place + 3.5, "end") for place, text in y.labels()]
    parts += [_curve(line, points, x, y, smoothing) for line, points in drawn]
    return element("g", *parts, cls=kind)


def _curve(line: Line, points: Points, x: _Scale, y: _Scale, smoothing: float | int) -> Markup:
    places, number = x.place(points.steps), len(points.steps)
    dash = DASHES[line.run // len(COLOURS)]
    mean = _path(places, y.place(points.means))
    smooth = smoothing and number >= _SMOOTH_FROM
    parts = []
    if (points.highs > points.lows).any():
        there, back = y.place(points.highs), y.place(points.lows)[::-1]
        band = _path(np.concatenate([places, places[::-1]]), np.concatenate([there, back])) + "Z"
        parts.append(element("path", d=band, cls="band"))
    parts.append(element("path", d=mean, cls="raw beside" if smooth else "raw", stroke_dasharray=dash))
    if smooth:
        every = max(1, int(smoothing * number / 8))  # corners that can't be seen
        mild = y.place(smoothed(points.means, smoothing))
        path = _path(np.append(places[:-1:every], places[-1]), np.append(mild[:-1:every], mild[-1]))
        parts.append(element("path", d=path, cls="smooth", stroke_dasharray=dash))
    if number <= _MARKED_UP_TO and line.curve.rows_per_point == 1:
        # A line without length and with round ends is a dot.
        dots = "".join(f"M{_short(a)} {_short(b)}h0" for a, b in zip(places, y.place(points.means), strict=True))
        parts.append(element("path", d=dots, cls="dots"))
    return element("g", *parts, cls=run_class(line.run))


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A line through points, in tenths of a unit and relative to the point before, which is shortest."""
    corners = np.rint(10 * np.stack([x, y], 1)).astype(int)
    words = [f"M{_tenths(corners[0, 0])} {_tenths(corners[0, 1])}"]
    for right, down in np.diff(corners, axis=0):
        words.append(f"l{_tenths(right)}{'' if down < 0 else ' '}{_tenths(down)}")
    return "".join(words)


def _tenths(value: Any) -> str:
    return f"{value / 10:g}"


def _short(value: float | int) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(text: str, x: float | int, y: float | int, anchor: str) -> Markup:
    return element("text", text, x=_short(x), y=_short(y), text_anchor=anchor)


def _linear(arrays: list[np.ndarray], start: int, end: int, wanted: int, whole: bool = False) -> _Scale:
    """An axis that holds all values, with about as many ticks as wanted, at whole numbers where asked for."""
    low, high = (float(f([f(array) for array in arrays])) for f in (np.min, np.max))
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # one value
        room = 0.05 * max(abs(low), abs(high)) or 1.0
        low, high = low - room, high + room
    step = _round_step((high - low) / wanted)
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return _Scale(low, high, start, end, {i * step: _label(i * step, step) for i in range(first, last + 1)})


def _round_step(step: float | int) -> float:
    """The nearest of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return power * min((1, 2, 5, 10), key=lambda factor: abs(math.log(factor * power / step)))


def _label(value: float | int, step: float | int) -> str:
    largest = max(abs(value), step)
    if largest >= 1e13 or step < 1e-4:
        return f"{value:.2g}" if value else "0"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and largest >= size:
            return f"{value / size:.4g}{letter}" if value else "0"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _logarithmic(drawn: list[tuple[Line, Points]]) -> _Scale:
    """An axis by powers of ten for means that are above 0; what of the bands isn't lies at its end."""
    least = min(float(points.means.min()) for _, points in drawn)
    lows = np.concatenate([points.lows for _, points in drawn])
    low = float(min(least, lows[lows > 0].min(initial=least)))
    high = max(float(points.highs.max()) for _, points in drawn)
    bottom, top = math.log10(low), math.log10(high)
    if top - bottom < 0.01:
        bottom, top = bottom - 0.05, top + 0.05
    every = max(1, math.ceil((top - bottom) / 5))
    factors = (1,) if top - bottom > 2.5 else (1, 2, 5)
    powers = [power for power in range(math.floor(bottom), math.ceil(top) + 1) if power % every == 0]
    values = [factor * 10.0**power for power in powers for factor in factors]
    ticks = {value: _label(value, value) for value in values if bottom - 1e-9 <= math.log10(value) <= top + 1e-9}
    if len(ticks) < 3:  # far less than a decade: as on a linear axis
        least, most = 10.0**bottom, 10.0**top
        step = _round_step((most - least) / 4)
        ticks = {i * step: _label(i * step, step) for i in range(math.ceil(least / step), math.floor(most / step) + 1)}
    return _Scale(bottom, top, _HEIGHT - _BOTTOM, _TOP, ticks, logarithmic=True)
