"""f-divergences of the user's own: the weight by automatic differentiation of the generator."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poise.core.arguments import check_range
from poise.fdistill.divergence_type import FDivergence

_TABLE_REACH = 12
_TABLE_DENSITY = 64


def _interpolate(table: np.ndarray, l: Array) -> Array:
    """Cubic interpolation of a table over log-ratios in steps of 1/64, linear outside."""
    values = jnp.asarray(table, l.dtype)
    # The slope over a whole unit: rounding in single nodes would show far out.
    slope_low = float(table[_TABLE_DENSITY] - table[0])
    slope_high = float(table[-1] - table[-1 - _TABLE_DENSITY])
    clipped = jnp.clip(l, -_TABLE_REACH, _TABLE_REACH)
    place = (clipped + _TABLE_REACH) * _TABLE_DENSITY
    left = jnp.clip(jnp.floor(place).astype(jnp.int32), 1, len(table) - 3)
    t = place - left
    inside = (
        -t * (t - 1) * (t - 2) / 6 * values[left - 1]
        + (t + 1) * (t - 1) * (t - 2) / 2 * values[left]
        - (t + 1) * t * (t - 2) / 2 * values[left + 1]
        + (t + 1) * t * (t - 1) / 6 * values[left + 2]
    )
    above, below = jnp.maximum(l - _TABLE_REACH, 0.0), jnp.minimum(l + _TABLE_REACH, 0.0)
    return inside + slope_high * above + slope_low * below


def from_function(
    f: Callable[[Array], Array],
    name: str = "custom",
    *,
    bounded: bool = False,
    grid: tuple[float, ...] | None = None,
) -> FDivergence:
    r"""A divergence from its generator alone; $f'$, $f''$ and the weight come from automatic differentiation.

    The second derivative of most generators cancels at large ratios, the more so in float32. So the log weight is
    differentiated once, in float64 on a grid of log-ratios from -12 to 12, and interpolated (to about 1e-9, in the
    input's type); beyond the grid it is continued with its last slope, which is exact for power-law tails.

    Args:
      f: a twice differentiable convex function of a scalar with $f(1)=0$, written in ``jax.numpy``.
      name: the divergence's name.
      bounded: whether the divergence is bounded.
      grid: ratios at which convexity is checked; by default 97 of them from $e^{-6}$ to $e^6$.

    Returns:
      The divergence.

    Raises:
      ValueError: if $f(1) \ne 0$, or on the grid $f$ is not finite or not convex, or if $f''(1)$ is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import f_weight, from_function
      >>> div = from_function(lambda r: r * jnp.log(r), "my_kl")
      >>> f_weight(div, jnp.log(jnp.array([0.5, 2.0]))).round(4).tolist()
      [0.5, 2.0]
    """

    def pointwise(function):
        def apply(r):
            r = jnp.asarray(r)
            return jax.vmap(function)(r.reshape(-1)).reshape(r.shape)

        return apply

    first, second = pointwise(jax.grad(f)), pointwise(jax.grad(jax.grad(f)))
    points = np.exp(np.linspace(-6.0, 6.0, 97)) if grid is None else np.sort(np.asarray(grid, np.float64))
    check_range("grid", points, low=0.0, open_low=True)
    table_logs = np.arange(-_TABLE_REACH * _TABLE_DENSITY, _TABLE_REACH * _TABLE_DENSITY + 1) / _TABLE_DENSITY
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        wide = jnp.asarray(points, jnp.float64)
        one = jnp.ones((), jnp.float64)
        at_one, curvature_at_one = float(f(one)), float(jax.grad(jax.grad(f))(one))
        values, curvature = np.asarray(pointwise(f)(wide)), np.asarray(second(wide))
        middle = np.asarray(pointwise(f)((wide[2:] + wide[:-2]) / 2))
        table = np.asarray(second(jnp.asarray(np.exp(table_logs), jnp.float64)))
    if not abs(at_one) <= 1e-6:
        raise ValueError(f"f must vanish at 1, got f(1) = {at_one}")
    if not (np.all(np.isfinite(values)) and np.all(np.isfinite(curvature))):
        bad = np.asarray(points)[~(np.isfinite(values) & np.isfinite(curvature))][0]
        raise ValueError(f"f and its second derivative must be finite for r > 0, but one is not at r = {bad}")
    chord = (values[2:] + values[:-2]) / 2 - middle
    rounding = 1e-6 * (1.0 + np.abs(values))
    if np.any(curvature < -rounding) or np.any(chord < -rounding[1:-1]):
        raise ValueError(f"f must be convex on (0, inf); {name!r} is not on the grid")
    if not curvature_at_one > 0:
        raise ValueError(
            f"f must be twice differentiable with f''(1) > 0, got f''(1) = {curvature_at_one}; a generator with a "
            "kink, such as total variation's |r - 1|/2, has no weight"
        )

    # Rounding may leave a curvature at or below zero far out, where the smallest normal number stands in for it.
    table = 2.0 * table_logs + np.log(np.maximum(np.nan_to_num(table), np.finfo(np.float64).tiny))
    return FDivergence(
        name=name,
        f=pointwise(f),
        f_prime=first,
        f_second=second,
        log_weight=partial(_interpolate, table),
        weight_at_one=curvature_at_one,
        bounded=bounded,
    )
