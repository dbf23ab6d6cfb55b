"""Energy distance."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.metrics.distances import mean_over_pairs
from poise.metrics.features import check_block_size, check_pair


def energy_distance(
    x: Float[ArrayLike, "n dim"], y: Float[ArrayLike, "m dim"], block_size: int = 128
) -> Float[Array, ""]:
    r"""Energy distance between two sample sets, the kernel-free relative of the maximum mean discrepancy.

    $$D = 2\, \mathrm E |x - y| - \mathrm E |x - x'| - \mathrm E |y - y'|,$$

    over all pairs (the V-statistic, never negative), with Euclidean norms. In one dimension
    $D = 2 \int (F_x - F_y)^2$, the square of what `scipy.stats.energy_distance` returns. Two copies of one set give 0,
    up to rounding. Gradients are finite where samples coincide: such a pair adds 0.

    Distances are taken in the difference form, in the dtype of the samples (float32 for 16-bit ones), `block_size` rows
    at a time. Peak memory beyond the samples is about ``block_size * max(n, m) * itemsize`` bytes: 25 MB for 50k
    against 50k samples in float32, 50 MB in float64. Gradients take about `dim` times as much; lower
    `block_size` for them. Values that are not finite spread under ``jit``.

    Args:
      x: samples of one distribution, one a row.
      y: samples of the other, in the same units.
      block_size: the number of rows whose distances are held at once. Static under ``jit``.

    Returns:
      The distance, in the dtype and units of the samples.

    Raises:
      TypeError: if the samples are not real floating numbers.
      ValueError: if a sample set is not a matrix, holds fewer than 2 samples or a value that is not finite, if the
        numbers of features differ, or if `block_size` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import energy_distance
      >>> x = jnp.array([[0.0, 0.0], [0.0, 0.0]])
      >>> float(energy_distance(x, x + jnp.array([3.0, 4.0])))
      10.0

    References:
      Székely, Rizzo, "Energy statistics: A class of statistics based on distances", Journal of Statistical Planning
      and Inference 2013, https://doi.org/10.1016/j.jspi.2013.03.018.
    """
    x, y = check_pair(("x", x), ("y", y))
    check_block_size(block_size)
    return _energy_distance(x, y, block_size)


def _norm(squared: Array) -> Array:
    """Square root with gradient 0 at 0."""
    positive = squared > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1)), squared)


@partial(jax.jit, static_argnames=("block_size",))
def _energy_distance(x: Array, y: Array, block_size: int) -> Array:
    within = mean_over_pairs(_norm, x, x, block_size) + mean_over_pairs(_norm, y, y, block_size)
    return jnp.maximum(2 * mean_over_pairs(_norm, x, y, block_size) - within, 0)
