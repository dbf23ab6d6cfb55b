"""A metric over its steps in few points, however long the run: bucket by bucket its mean and its extremes."""

import math
from typing import Any, NamedTuple

import numpy as np

MAX_POINTS = 500
_SMALLEST, _LARGEST = 1e-300, 1e300  # sums and differences of what is between are finite, and so are logarithms


class Points(NamedTuple):
    """A curve as it is drawn, all ``[points]``.

    Attributes:
      steps: mean step of each bucket.
      means: mean of the metric.
      lows: its smallest value.
      highs: its largest value.
    """

    steps: np.ndarray
    means: np.ndarray
    lows: np.ndarray
    highs: np.ndarray


class Curve:
    """A metric by step, kept in at most :data:`MAX_POINTS` buckets of equally many rows.

    As long as there are few rows each is a bucket. Whenever the buckets are full, neighbours are joined, so that memory
    stays the same for any number of rows; no extreme gets lost.

    Example:
      >>> from poise.launch.report_curves import Curve
      >>> curve = Curve()
      >>> for step in range(1, 2001):
      ...     curve.add(step, 100.0 if step == 700 else 1.0)
      >>> points = curve.points()
      >>> len(points.steps), points.highs.max().item(), curve.rows, curve.last
      (500, 100.0, 2000, 1.0)
    """

    def __init__(self):
        self._buckets: list[tuple[int, float, float, float, float]] = []
        self._rows_per_bucket = 1
        self.rows = 0
        self.unusable = 0
        self.seeds = 1
        self.last = math.nan

    @property
    def rows_per_point(self) -> int:
        """How many rows a point stands for."""
        return self._rows_per_bucket

    def add(self, step: int, value: Any) -> None:
        """Takes the next row: a number, or a list of one number a seed, of which the mean and the extremes are kept.

        Args:
          step: of the row.
          value: as it stands in the row; None where the metric doesn't apply.
        """
        entries = [entry for entry in (value if isinstance(value, list) else [value]) if entry is not None]
        numbers = [number for number in map(_number, entries) if number is not None]
        self.unusable += len(numbers) < len(entries)
        if not numbers:
            return
        mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
        bucket = (1, float(step), mean, low, high)
        full = not self._buckets or self._buckets[-1][0] >= self._rows_per_bucket
        if full and len(self._buckets) == MAX_POINTS:
            self._buckets = [_join(*pair) for pair in zip(self._buckets[::2], self._buckets[1::2], strict=True)]
            self._rows_per_bucket *= 2
        if full:
            self._buckets.append(bucket)
        else:
            self._buckets[-1] = _join(self._buckets[-1], bucket)
        self.rows += 1
        self.seeds = max(self.seeds, len(numbers))
        self.last = mean

    def points(self) -> Points:
        """The buckets, in the order of the rows."""
        counts, steps, means, lows, highs = np.array(self._buckets, float).reshape(-1, 5).T
        return Points(steps / counts, means / counts, lows, highs)


def smoothed(values: np.ndarray, share: float | int) -> np.ndarray:
    """The centred moving mean; at the ends of what there is of the window.

    Args:
      values: ``[points]``.
      share: of the points that a window spans.

    Example:
      >>> import numpy as np
      >>> from poise.launch.report_curves import smoothed
      >>> smoothed(np.array([0.0, 3.0, 0.0, 3.0]), 0.75).tolist()
      [1.5, 1.0, 2.0, 1.5]
    """
    window = np.ones(max(1, 2 * (round(share * len(values)) // 2) + 1))
    scale = np.abs(values).max(initial=0.0) or 1.0  # lest a sum of the largest values be infinite
    inner = np.convolve(values / scale, window)[len(window) // 2 :][: len(values)]
    return inner / np.convolve(np.ones(len(values)), window)[len(window) // 2 :][: len(values)] * scale


def _number(value: Any) -> float | None:
    if not isinstance(value, bool | int | float) or not abs(value) <= _LARGEST:  # NaN isn't
        return None
    return float(value) if abs(value) >= _SMALLEST else 0.0


def _join(a: tuple[int, float, float, float, float], b: tuple[int, float, float, float, float]):
    """Two buckets in one; counts, steps and values are sums."""
    return a[0] + b[0], a[1] + b[1], a[2] + b[2], min(a[3], b[3]), max(a[4], b[4])
