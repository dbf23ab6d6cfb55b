"""Maximum mean discrepancy with Gaussian kernels."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.metrics.distances import mean_over_pairs
from poise.metrics.features import check_array, check_block_size, check_pair, check_values


def mmd2(
    x: Float[ArrayLike, "n dim"],
    y: Float[ArrayLike, "m dim"],
    bandwidths: Float[ArrayLike, " bandwidths"] | Sequence[float],
    unbiased: bool = False,
    block_size: int = 128,
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy between two sample sets, averaged over Gaussian kernels.

    With $k(x, y) = \frac1S \sum_s e^{-|x-y|^2 / 2 h_s^2}$ for the bandwidths $h_1, \dots, h_S$,

    $$\text{MMD}^2 = \mathrm E\, k(x, x') + \mathrm E\, k(y, y') - 2\, \mathrm E\, k(x, y).$$

    The biased estimate (V-statistic) takes all pairs within a set, a sample with itself included, and is never
    negative; the unbiased one (U-statistic) leaves those out and may be. Two copies of one set give 0 in the biased
    one, up to rounding.

    Distances are taken in the difference form, in the dtype of the samples (float32 for 16-bit ones), `block_size` rows
    at a time. Peak memory beyond the samples is about ``block_size * max(n, m) * itemsize`` bytes: 25 MB for 50k
    against 50k samples in float32, 50 MB in float64. Gradients take about `dim` times as much; lower
    `block_size` for them. The estimate is a difference of means near 1, so that float32 does not resolve values below
    about 1e-5; call it on float64 samples under ``jax.enable_x64()`` there. Values that are not finite spread under
    ``jit``.

    Args:
      x: samples of one distribution, one a row.
      y: samples of the other.
      bandwidths: the standard deviations $h_s$ of the kernels, in the units of the samples, all positive.
      unbiased: take the U-statistic. Static under ``jit``.
      block_size: the number of rows whose distances are held at once. Static under ``jit``.

    Returns:
      The estimate, in the dtype of the samples.

    Raises:
      TypeError: if the samples are not real floating numbers.
      ValueError: if a sample set is not a matrix, holds fewer than 2 samples or a value that is not finite, if the
        numbers of features differ, if there is no bandwidth or one that is not positive, or if `block_size` is below 1.

    Example:
      Two pairs of points so far apart that the sets share nothing:

      >>> import jax.numpy as jnp
      >>> from poise.metrics import mmd2
      >>> x, y = jnp.array([[0.0], [0.0]]), jnp.array([[100.0], [100.0]])
      >>> float(mmd2(x, y, [1.0])), float(mmd2(x, x, [1.0]))
      (2.0, 0.0)

    References:
      Gretton, Borgwardt, Rasch, Schölkopf, Smola, "A Kernel Two-Sample Test", JMLR 2012,
      https://arxiv.org/abs/0805.2368 (an earlier version).
    """
    x, y = check_pair(("x", x), ("y", y))
    widths = check_array("bandwidths", jnp.asarray(bandwidths, jnp.result_type(x, y)), rank=1)
    if len(widths) < 1:
        raise ValueError("bandwidths must hold at least one value, got none")
    check_values("bandwidths", bandwidths, lambda h: h > 0, "positive")
    check_block_size(block_size)
    return _mmd2(x, y, widths, unbiased, block_size)


@partial(jax.jit, static_argnames=("unbiased", "block_size"))
def _mmd2(x: Array, y: Array, bandwidths: Array, unbiased: bool, block_size: int) -> Array:
    # The square of a small bandwidth underflows; a sample is then alike to its equals alone.
    variances = jnp.maximum(bandwidths**2, jnp.finfo(bandwidths.dtype).tiny)

    def kernel(squared: Array) -> Array:
        total = jnp.zeros_like(squared)
        for variance in variances:
            total += jnp.exp(-0.5 * squared / variance)
        return total / len(variances)

    within = mean_over_pairs(kernel, x, x, block_size, unbiased) + mean_over_pairs(kernel, y, y, block_size, unbiased)
    estimate = within - 2 * mean_over_pairs(kernel, x, y, block_size)
    return estimate if unbiased else jnp.maximum(estimate, 0)
