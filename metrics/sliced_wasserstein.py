"""Sliced Wasserstein distance: exact one-dimensional transport, averaged over directions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from poise.metrics.distances import map_rows
from poise.metrics.features import check_block_size, check_features, check_pair


def sliced_wasserstein(
    x: Float[ArrayLike, "n dim"],
    y: Float[ArrayLike, "m dim"],
    projections: Float[ArrayLike, "projections dim"],
    p: float | int,
    block_size: int = 32,
) -> Float[Array, ""]:
    r"""The `p`-th power of the sliced Wasserstein-`p` distance.

    $$SW_p^p = \tfrac1L \textstyle\sum_l W_p^p(\theta_l^\top x, \theta_l^\top y)$$

    for directions $\theta_l$. In one dimension the optimal transport is known: with both quantile functions,
    $W_p^p = \int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p du$. Both are step functions, so that the integral is a finite sum,
    exact for unequal numbers of samples too; for equal numbers it is the mean over the sorted pairs. A shift of one set
    by $\delta$ gives $\frac1L \sum_l |\theta_l^\top \delta|^p$.

    Computed in the dtype of the samples (float32 for 16-bit ones), `block_size` directions at a time; peak memory
    beyond the samples is about ``6 * block_size * (n + m) * itemsize`` bytes, gradients included: 80 MB for 50k against
    50k samples in float32. Gradients are 0 where two projected samples meet. Values that are not finite spread under
    ``jit``.

    Args:
      x: samples of one distribution, one a row.
      y: samples of the other, in the same units.
      projections: directions $\theta_l$, one a row, taken as they are; unit vectors give the usual distance.
      p: the order, at least 1; 1 gives the mean $W_1$, 2 the mean $W_2^2$. Static under ``jit``.
      block_size: the number of directions worked on at once. Static under ``jit``.

    Returns:
      The mean of $W_p^p$ over the directions, in the dtype of the samples and in their units to the power `p`.

    Raises:
      TypeError: if the samples or the projections are not real floating numbers.
      ValueError: if a sample set is not a matrix, holds fewer than 2 samples or a value that is not finite, if the
        numbers of features differ, if `projections` is not a matrix with at least one row and as many columns, if `p`
        is below 1 or not finite, or if `block_size` is below 1.

    Example:
      Unit directions all around the plane, along which the square of a shift by 1 is 1/2 on average:

      >>> import jax.numpy as jnp
      >>> from poise.metrics import sliced_wasserstein
      >>> angles = jnp.arange(8) * jnp.pi / 8
      >>> directions = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
      >>> x = jnp.array([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
      >>> round(float(sliced_wasserstein(x, x + jnp.array([1.0, 0.0]), directions, p=2)), 5)
      0.5

    References:
      Bonneel, Rabin, Peyré, Pfister, "Sliced and Radon Wasserstein Barycenters of Measures", Journal of Mathematical
      Imaging and Vision 2015, https://doi.org/10.1007/s10851-014-0506-3.
    """
    x, y = check_pair(("x", x), ("y", y))
    projections = check_features("projections", projections, min_samples=1)
    if projections.shape[1] != x.shape[1]:
        raise ValueError(
            f"projections must have as many columns as the samples have features, got shapes {projections.shape} "
            f"and {x.shape}"
        )
    if not 1 <= p < float("inf"):
        raise ValueError(f"p must be finite and at least 1, got {p}")
    check_block_size(block_size)
    return _sliced_wasserstein(x, y, projections, p, block_size)


def _quantile_steps(n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Widths of the steps that two empirical quantile functions share, and the order statistic of each set there."""
    # The levels i/n and j/m in units of 1/(nm), so that they can be merged without rounding.
    ends = np.union1d(np.arange(1, n + 1, dtype=np.int64) * m, np.arange(1, m + 1, dtype=np.int64) * n)
    return np.diff(ends, prepend=0) / (n * m), (ends - 1) // m, (ends - 1) // n


@partial(jax.jit, static_argnames=("p", "block_size"))
def _sliced_wasserstein(x: Array, y: Array, projections: Array, p: float | int, block_size: int) -> Array:
    widths, rank_x, rank_y = _quantile_steps(len(x), len(y))

    def transport(direction: Array) -> Array:
        sorted_x, sorted_y = (jnp.sort(jnp.matmul(z, direction, precision="highest")) for z in (x, y))
        gap = jnp.abs(sorted_x[rank_x] - sorted_y[rank_y])
        return jnp.sum(jnp.asarray(widths, gap.dtype) * (gap if p == 1 else gap**p))

    return map_rows(transport, projections, block_size).mean()
