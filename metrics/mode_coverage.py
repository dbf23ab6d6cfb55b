"""Which modes of a known mixture the samples reach, and how evenly."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.metrics.distances import map_rows, squared_distances
from poise.metrics.features import check_array, check_block_size, check_features, check_values


class ModeCoverage(NamedTuple):
    """The result of :func:`mode_coverage`.

    Attributes:
      coverage: the share of the modes that are covered, in [0, 1].
      quality: the share of the samples that belong to a mode, in [0, 1].
      shares: for each mode the share of all samples that belong to it; the sum is `quality`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import ModeCoverage
      >>> ModeCoverage(jnp.array(0.5), jnp.array(1.0), jnp.array([1.0, 0.0])).shares.tolist()
      [1.0, 0.0]
    """

    coverage: Float[Array, ""]
    quality: Float[Array, ""]
    shares: Float[Array, " modes"]


def mode_coverage(
    samples: Float[ArrayLike, "n dim"],
    centers: Float[ArrayLike, "modes dim"],
    radius: float | int | Float[ArrayLike, ""],
    min_share: float | int | Float[ArrayLike, ""],
    block_size: int = 4096,
) -> ModeCoverage:
    r"""Counts the modes that samples reach, where the modes are known.

    A sample belongs to the mode with the nearest center (the first one on a tie) if it lies within `radius` of it, else
    to none. With $s_c$ the share of all samples that belong to mode $c$, the mode is covered if $s_c \ge$ `min_share`.

    Distances are taken in the difference form, in the dtype of the samples (float32 for 16-bit ones), `block_size`
    samples at a time; peak memory beyond the samples is about ``2 * block_size * modes * itemsize`` bytes. A sample
    that is not finite (possible only under ``jit``) belongs to no mode. The result is piecewise constant, so that
    gradients are 0.

    Args:
      samples: one a row.
      centers: the centers of the modes, in the same units.
      radius: how far from its center a mode reaches, in the same units; positive. Three standard deviations is usual.
      min_share: the share of all samples from which a mode counts as covered, in (0, 1].
      block_size: the number of samples whose distances are held at once. Static under ``jit``.

    Returns:
      The shares of covered modes and of samples in modes, and the share of each mode.

    Raises:
      TypeError: if the samples or the centers are not real floating numbers.
      ValueError: if `samples` or `centers` is not a matrix or holds a value that is not finite, if there are fewer than
        2 samples or no center, if the numbers of features differ, or if `radius`, `min_share` or `block_size` is out of
        range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import mode_coverage
      >>> samples = jnp.array([[0.1], [-0.1], [0.2], [4.0]])
      >>> result = mode_coverage(samples, jnp.array([[0.0], [10.0]]), radius=0.5, min_share=0.25)
      >>> float(result.coverage), float(result.quality), result.shares.tolist()
      (0.5, 0.75, [0.75, 0.0])

    References:
      Srivastava, Valkov, Russell, Gutmann, Sutton, "VEEGAN: Reducing Mode Collapse in GANs using Implicit Variational
      Learning", https://arxiv.org/abs/1705.07761 (three standard deviations, at least one sample).
    """
    samples = check_features("samples", samples)
    centers = check_features("centers", centers, min_samples=1)
    if samples.shape[1] != centers.shape[1]:
        raise ValueError(
            f"samples and centers must have the same number of features (columns), got shapes {samples.shape} and "
            f"{centers.shape}"
        )
    check_values("radius", radius, lambda r: (r > 0) & (r < jnp.inf), "positive and finite")
    check_values("min_share", min_share, lambda s: (s > 0) & (s <= 1), "in (0, 1]")
    check_block_size(block_size)
    return _mode_coverage(samples, centers, radius, min_share, block_size)


@partial(jax.jit, static_argnames=("block_size",))
def _mode_coverage(samples: Array, centers: Array, radius: Array, min_share: Array, block_size: int) -> ModeCoverage:
    dtype = jnp.result_type(samples, centers)

    def mode_of(sample: Array) -> tuple[Array, Array]:
        squared = squared_distances(sample, centers)
        nearest = jnp.argmin(squared)
        return nearest, jnp.sqrt(squared[nearest]) <= radius

    mode, inside = map_rows(mode_of, samples, block_size)
    counts = jnp.zeros(len(centers), jnp.int32).at[mode].add(inside)
    shares = counts.astype(dtype) / len(samples)
    return ModeCoverage(jnp.mean(shares >= min_share, dtype=dtype), jnp.mean(inside, dtype=dtype), shares)


def mode_share_kl(
    shares: Float[ArrayLike, " modes"], target: Float[ArrayLike, " modes"] | None = None
) -> Float[Array, ""]:
    r"""Kullback-Leibler divergence of the modes' shares from their target, $\sum_c s_c \log (s_c / t_c)$.

    The shares are divided by their sum first, so that samples outside of all modes don't count. Empty modes add 0, with
    a gradient of 0. If all modes are empty the result is $-\log \min_c t_c$, the largest value that the divergence can
    take.

    Args:
      shares: non-negative shares or counts of the modes, as in :func:`mode_coverage`.
      target: positive target shares, divided by their sum as well; equal ones for None.

    Returns:
      The divergence in nats, in the dtype of the shares (float32 for 16-bit ones); 0 only if shares and target agree.

    Raises:
      TypeError: if an argument does not hold real floating numbers.
      ValueError: if an argument is not a vector or holds a value that is not finite, if `shares` is empty or holds a
        negative value, or if `target` has another length or holds a value that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import mode_share_kl
      >>> round(float(mode_share_kl(jnp.array([0.5, 0.0]))), 5), float(mode_share_kl(jnp.array([0.2, 0.2])))
      (0.69315, 0.0)
    """
    check_values("shares", shares, lambda s: s >= 0, "non-negative")
    shares = check_array("shares", shares, rank=1)
    if target is not None:
        check_values("target", target, lambda t: t > 0, "positive")
    target = jnp.ones_like(shares) if target is None else check_array("target", target, rank=1)
    if len(shares) < 1:
        raise ValueError("shares must hold at least one mode, got none")
    if shares.shape != target.shape:
        raise ValueError(f"target must have the shape of shares {shares.shape}, got {target.shape}")
    return _mode_share_kl(shares, target)


@jax.jit
def _mode_share_kl(shares: Array, target: Array) -> Array:
    target = target / target.sum()
    total = shares.sum()
    shares = shares / jnp.where(total > 0, total, 1)
    occupied = shares > 0
    ratio = jnp.where(occupied, shares, 1) / target
    divergence = jnp.sum(jnp.where(occupied, shares * jnp.log(ratio), 0))
    return jnp.where(total > 0, divergence, -jnp.log(target.min()))
