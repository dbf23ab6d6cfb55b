"""Precision, recall, density and coverage from nearest neighbours."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.metrics.distances import map_rows, squared_distances
from poise.metrics.features import check_block_size, check_pair


class PRDC(NamedTuple):
    """The four scores of :func:`prdc`.

    Attributes:
      precision: the share of fakes inside the ball of some real sample, in [0, 1]; low when samples are bad.
      recall: the share of reals inside the ball of some fake sample, in [0, 1]; low when modes are missing.
      density: the mean number of real balls around a fake, over `k`; not bounded by 1.
      coverage: the share of reals with a fake inside their own ball, in [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import PRDC
      >>> PRDC(*jnp.array([0.9, 0.8, 1.1, 0.7]))._fields
      ('precision', 'recall', 'density', 'coverage')
    """

    precision: Float[Array, ""]
    recall: Float[Array, ""]
    density: Float[Array, ""]
    coverage: Float[Array, ""]


def prdc(real: Float[ArrayLike, "n dim"], fake: Float[ArrayLike, "m dim"], k: int = 5, block_size: int = 128) -> PRDC:
    r"""Precision, recall, density and coverage of generated samples.

    Each sample $z_i$ of a set carries a ball whose radius $r_i$ is the distance to its `k`-th nearest neighbour in the
    same set, itself excluded. With the real samples $x_i$ (radii $r_i$) and the fake ones $y_j$ (radii $s_j$),

    $$\text{precision} = \tfrac1m \textstyle\sum_j 1[\exists i: |x_i-y_j| < r_i], \quad
      \text{recall} = \tfrac1n \sum_i 1[\exists j: |x_i-y_j| < s_j],$$
    $$\text{density} = \tfrac1{km} \textstyle\sum_{ij} 1[|x_i-y_j| < r_i], \quad
      \text{coverage} = \tfrac1n \sum_i 1[\exists j: |x_i-y_j| < r_i].$$

    All four are exactly 1 for two copies of one set in which every sample has `k` neighbours at distinct distances.
    Duplicates within a set shrink their own balls, down to empty ones where a sample occurs more than `k` times. A
    sample that is not finite (possible only under ``jit``, where values can't be checked) is infinitely far from
    everything: it lies in no ball. The scores are piecewise constant, so that gradients are 0.

    Distances are taken in the difference form, in the dtype of the samples (float32 for 16-bit ones), `block_size` rows
    at a time. Peak memory beyond the samples is about ``2 * block_size * max(n, m) * itemsize`` bytes: 50 MB for 50k
    against 50k samples in float32, 100 MB in float64. The time grows with `k`.

    Args:
      real: real samples (or their features), one a row.
      fake: generated samples, in the same units.
      k: which nearest neighbour makes the radius, from 1 to the smaller number of samples less one. Static under
        ``jit``.
      block_size: the number of rows whose distances are held at once. Static under ``jit``.

    Returns:
      The four scores, in the dtype of the samples.

    Raises:
      TypeError: if the samples are not real floating numbers.
      ValueError: if a sample set is not a matrix, holds fewer than 2 samples or a value that is not finite, if the
        numbers of features differ, or if `k` or `block_size` is out of range.

    Example:
      Only 12 of 16 real points on a line are copied; the ball of the last copy reaches one point further:

      >>> import jax.numpy as jnp
      >>> from poise.metrics import prdc
      >>> real = jnp.arange(16.0)[:, None] ** 1.5
      >>> scores = prdc(real, real[:12], k=2)
      >>> float(scores.precision), float(scores.recall), float(scores.coverage)
      (1.0, 0.8125, 0.8125)

    References:
      Naeem, Oh, Uh, Choi, Yoo, "Reliable Fidelity and Diversity Metrics for Generative Models",
      https://arxiv.org/abs/2002.09797 (density and coverage, k = 5), and Kynkäänniemi, Karras, Laine, Lehtinen, Aila,
      "Improved Precision and Recall Metric for Assessing Generative Models", https://arxiv.org/abs/1904.06991
      (precision and recall, k = 3). The second paper counts the edge of a ball as inside; the first one's official
      code, followed here, does not.
    """
    real, fake = check_pair(("real", real), ("fake", fake))
    largest = min(len(real), len(fake)) - 1
    if not 1 <= k <= largest:
        raise ValueError(
            f"k must be between 1 and the smaller number of samples less one ({largest} for shapes "
            f"{real.shape} and {fake.shape}), got {k}"
        )
    check_block_size(block_size)
    return _prdc(real, fake, k, block_size)


def _distances(point: Array, points: Array) -> Array:
    """Squared distances; infinite to and from what is not finite."""
    distances = squared_distances(point, points)
    return jnp.where(jnp.isnan(distances), jnp.inf, distances)


def _squared_radii(points: Array, k: int, block_size: int) -> Array:
    """Squared distance of every point to its k-th nearest other point."""

    # Each turn climbs to the next larger distance and counts how often it occurs, until k + 1 neighbours are found: the
    # point itself, at distance 0, and k others. In float64 XLA's top_k sorts whole rows, which is many times slower.
    def radius(point: Array) -> Array:
        distances = _distances(point, points)

        def climb(_: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            reached, missing = state
            above = jnp.min(distances, initial=jnp.inf, where=distances > reached)
            return jnp.where(missing > 0, above, reached), missing - jnp.sum(distances == above)

        return jax.lax.fori_loop(0, k + 1, climb, (jnp.array(-1, distances.dtype), jnp.array(k + 1)))[0]

    return map_rows(radius, points, block_size)


@partial(jax.jit, static_argnames=("k", "block_size"))
def _prdc(real: Array, fake: Array, k: int, block_size: int) -> PRDC:
    real_radii = _squared_radii(real, k, block_size)
    fake_radii = _squared_radii(fake, k, block_size)

    def balls_around(fake_point: Array) -> Array:
        return jnp.sum(_distances(fake_point, real) < real_radii)

    def recalled_and_covered(row: tuple[Array, Array]) -> tuple[Array, Array]:
        real_point, real_radius = row
        distances = _distances(real_point, fake)
        return jnp.any(distances < fake_radii), jnp.any(distances < real_radius)

    balls = map_rows(balls_around, fake, block_size)
    recalled, covered = map_rows(recalled_and_covered, (real, real_radii), block_size)
    dtype = jnp.result_type(real, fake)
    return PRDC(
        precision=jnp.mean(balls > 0, dtype=dtype),
        recall=jnp.mean(recalled, dtype=dtype),
        density=jnp.mean(balls, dtype=dtype) / k,
        coverage=jnp.mean(covered, dtype=dtype),
    )
