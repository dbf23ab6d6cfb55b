"""The interquartile mean over runs, and how sure a handful of runs makes one of it."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.stats import trim_mean

_DRAWS = 2_000


class Interval(NamedTuple):
    """An interquartile mean with the ends of its bootstrap interval of 95%, each of the shape of the leading axes."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interquartile_mean(values: Float[np.ndarray, "*batch runs"]) -> Interval:
    """The mean over runs without the best and the worst quarter, and its interval.

    The interval is the percentile bootstrap over runs, drawn from a fixed seed. A quarter of fewer than four runs is
    none, so that the mean is over all of them; of a single run the interval is empty, its ends are the mean.

    Args:
      values: one number a run, runs last.

    Raises:
      ValueError: if there is no run.

    Example:
      >>> import numpy as np
      >>> from poise.launch.intervals import interquartile_mean
      >>> found = interquartile_mean(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))
      >>> float(found.mean), float(found.low) <= 3.0 <= float(found.high)
      (3.0, True)

    References:
      Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice,
      https://arxiv.org/abs/2108.13264.
    """
    values = np.asarray(values, float)
    if values.ndim == 0 or values.shape[-1] == 0:
        raise ValueError(f"values must hold one or more runs along their last axis, got shape {values.shape}")
    runs = values.shape[-1]
    drawn = np.random.default_rng(0).integers(runs, size=(_DRAWS, runs))
    means = trim_mean(values[..., drawn], 0.25, axis=-1)
    low, high = np.quantile(means, [0.025, 0.975], axis=-1)
    return Interval(np.asarray(trim_mean(values, 0.25, axis=-1)), low, high)
