"""Grids of returns: bins with edges and centers for HL-Gauss, atoms for two-hot and C51."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_count, check_range, concrete


def _check_bounds(v_min: ArrayLike, v_max: ArrayLike) -> None:
    check_range("v_min", v_min, open_low=True, open_high=True)
    check_range("v_max", v_max, open_low=True, open_high=True)
    low, high = concrete(v_min), concrete(v_max)
    if low is not None and high is not None and not np.all(low < high):
        raise ValueError(f"v_min must be below v_max, got {v_min!r} and {v_max!r}")


def _linspace(v_min: ArrayLike, v_max: ArrayLike, num: int, gaps_inside: int | None, dtype: Any) -> Array:
    """Equally spaced points, rounded once where the bounds are known; the range may be widened by half a gap."""
    dtype = jnp.result_type(float) if dtype is None else dtype
    low, high = concrete(v_min), concrete(v_max)
    if low is not None and high is not None and low.ndim == high.ndim == 0:
        xp, low, high = np, low.astype(np.float64), high.astype(np.float64)
    else:
        xp, low, high = jnp, jnp.asarray(v_min, dtype), jnp.asarray(v_max, dtype)
    if gaps_inside is not None:
        margin = (high - low) / (2 * gaps_inside)
        low, high = low - margin, high + margin
    return jnp.asarray(xp.linspace(low, high, num), dtype)


def check_increasing(name: str, grid: Array) -> None:
    """Raises unless a grid has two or more points and, where it can be looked at, they increase."""
    if jnp.ndim(grid) != 1 or len(grid) < 2:
        raise ValueError(f"{name} must be a vector of 2 or more points, got shape {jnp.shape(grid)}")
    points = concrete(grid)
    if points is not None and not np.all(np.diff(points.astype(np.float64)) > 0):
        raise ValueError(f"{name} must increase strictly, got {points}")


def bin_edges(
    v_min: ArrayLike, v_max: ArrayLike, num_bins: int, centred: bool = False, dtype: Any = None
) -> Float[Array, " edges"]:
    r"""The edges of equal bins, $e_j = v_\min + j\,w$ with $w = (v_\max-v_\min)/m$ and $j = 0, \dots, m$.

    The outermost centers lie half a bin inside of the range. With ``centred`` the range is first widened by
    $(v_\max-v_\min)/(2(m-1))$ on both sides, so that the centers are :func:`atoms` of the range that was asked for.

    Args:
      v_min: the least return; finite.
      v_max: the greatest return, above ``v_min``; finite.
      num_bins: $m \ge 2$.
      centred: whether the outermost centers, in place of the outermost edges, lie on the bounds.
      dtype: a floating dtype; None is JAX's default one.

    Returns:
      $m+1$ increasing edges.

    Raises:
      TypeError: if a bound is no number or ``num_bins`` no integer.
      ValueError: if ``num_bins`` is below 2, or ``v_min`` not below ``v_max``.

    Example:
      >>> from poise.rl import bin_edges
      >>> bin_edges(0.0, 1.0, 4).tolist()
      [0.0, 0.25, 0.5, 0.75, 1.0]
      >>> bin_edges(0.0, 2.0, 3, centred=True).tolist()
      [-0.5, 0.5, 1.5, 2.5]

    References:
      Farebrother et al., Stop Regressing: Training Value Functions via Classification for Scalable Deep RL,
      https://arxiv.org/abs/2403.03950. Uncentred bins are the paper's and are the default.
    """
    check_count("num_bins", num_bins, 2)
    _check_bounds(v_min, v_max)
    return _linspace(v_min, v_max, num_bins + 1, (num_bins - 1) if centred else None, dtype)


def bin_centers(edges: Float[Array, " edges"]) -> Float[Array, " bins"]:
    r"""The centers of bins, $c_i = (e_i + e_{i+1})/2$.

    Args:
      edges: $m+1$ increasing edges.

    Returns:
      $m$ centers, in the dtype of the edges.

    Raises:
      ValueError: if the edges don't increase or are fewer than 2.

    Example:
      >>> from poise.rl import bin_centers, bin_edges
      >>> bin_centers(bin_edges(0.0, 1.0, 4)).tolist()
      [0.125, 0.375, 0.625, 0.875]
    """
    check_increasing("edges", edges)
    return edges[:-1] + (edges[1:] - edges[:-1]) / 2


def atoms(v_min: ArrayLike, v_max: ArrayLike, num_atoms: int, dtype: Any = None) -> Float[Array, " atoms"]:
    r"""Equally spaced atoms, $z_i = v_\min + i\,d$ with $d = (v_\max-v_\min)/(m-1)$: the ends are atoms themselves.

    Args:
      v_min: the least return; finite.
      v_max: the greatest return, above ``v_min``; finite.
      num_atoms: $m \ge 2$.
      dtype: a floating dtype; None is JAX's default one.

    Returns:
      $m$ increasing atoms.

    Raises:
      TypeError: if a bound is no number or ``num_atoms`` no integer.
      ValueError: if ``num_atoms`` is below 2, or ``v_min`` not below ``v_max``.

    Example:
      >>> from poise.rl import atoms
      >>> atoms(-1.0, 1.0, 5).tolist()
      [-1.0, -0.5, 0.0, 0.5, 1.0]

    References:
      Bellemare, Dabney, Munos, A Distributional Perspective on Reinforcement Learning,
      https://arxiv.org/abs/1707.06887.
    """
    check_count("num_atoms", num_atoms, 2)
    _check_bounds(v_min, v_max)
    return _linspace(v_min, v_max, num_atoms, None, dtype)
