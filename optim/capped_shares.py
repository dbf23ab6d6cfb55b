"""Shares of a whole number among many, each capped at one: the root behind the group sparse envelope."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def capped_shares(strength: Float[Array, "*m"], offset: Float[Array, "*m"], total: ArrayLike) -> Float[Array, "*m"]:
    r"""Shares $u_j = \mathrm{clip}(\alpha s_j - c_j, 0, 1)$ with $\alpha$ such that $\sum_ju_j = k$.

    If at most $k$ strengths are above zero, all of those get 1. The sum is piecewise linear and nondecreasing in
    $\alpha$. A bracket around the root is narrowed by Newton's method, in turn with halving the representation of the
    floating-point number, so that it takes a bounded number of passes over the entries and no sort; once the linear
    piece is found, $\alpha$ has a closed form on it, through which the result is differentiated.

    Args:
      strength: $s_j \ge 0$, in any shape.
      offset: $c_j \ge 0$, in the same shape.
      total: $k$, a whole number of at least 1; may be traced.

    Returns:
      $u_j$ in [0, 1], in the shape and dtype of ``strength``. Strengths below the largest by a factor of about 1e-29
      (float32) or 1e-231 (float64) count as zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim.capped_shares import capped_shares
      >>> capped_shares(jnp.array([4.0, 1.0, 1.0, 0.0]), jnp.zeros(4), 2).tolist()
      [1.0, 0.5, 0.5, 0.0]
    """
    dtype = strength.dtype
    limits = jnp.finfo(dtype)
    bits = jnp.int64 if dtype == jnp.float64 else jnp.int32
    strongest = jax.lax.stop_gradient(jnp.max(strength))
    s = strength / jnp.where(strongest > 0, strongest, 1)
    present = s > float(limits.tiny) ** 0.75  # weaker groups by so much are zero in effect, and would overflow 1/s
    k = jnp.asarray(total, dtype)
    fits = jnp.sum(present) <= total

    fixed_s, fixed_c = jax.lax.stop_gradient((s, offset))
    inverse = 1 / jnp.where(present, fixed_s, 1)

    def shares(alpha: Array) -> Array:
        return jnp.where(present, jnp.clip(alpha * fixed_s - fixed_c, 0, 1), 0)

    def on_slope(alpha: Array) -> Array:
        reach = alpha * fixed_s - fixed_c
        return present & (reach > 0) & (reach < 1)

    def middle(low: Array, high: Array) -> Array:
        a, b = (jax.lax.bitcast_convert_type(x, bits) for x in (low, high))
        return jax.lax.bitcast_convert_type(a + (b - a) // 2, dtype)

    def narrow(carry: Any) -> Any:
        low, high, alpha, step, _ = carry
        gap = k - jnp.sum(shares(alpha))
        low, high = jnp.where(gap >= 0, alpha, low), jnp.where(gap <= 0, alpha, high)
        slope = jnp.sum(jnp.where(on_slope(alpha), fixed_s, 0))
        newton = alpha + gap / jnp.where(slope > 0, slope, 1)
        inside = (slope > 0) & (newton > low) & (newton < high) & (step % 3 < 2)
        following = jnp.where(inside, newton, middle(low, high))
        done = (jnp.abs(gap) <= 4 * limits.eps * k) | (following == low) | (following == high)
        return low, high, jnp.where(done, alpha, following), step + 1, done

    low = jnp.min(jnp.where(present, fixed_c * inverse, jnp.inf))
    high = jnp.max(jnp.where(present, (1 + fixed_c) * inverse, 0))
    low, high = jnp.minimum(low, limits.max), jnp.minimum(high, limits.max)
    start = (low, high, middle(low, high), jnp.zeros((), jnp.int32), fits)
    most = 3 * limits.bits
    alpha = jax.lax.while_loop(lambda c: jnp.logical_not(c[4]) & (c[3] < most), narrow, start)[2]

    # At a breakpoint up to rounding, a group counts as on the slope above and as gone below, so that zeros are exact.
    reach = alpha * fixed_s - fixed_c
    rounding = 8 * limits.eps
    part = present & (reach > rounding * fixed_c) & (reach <= 1 + rounding * (1 + fixed_c))
    full = present & (reach > 1) & jnp.logical_not(part)
    slope = jnp.sum(jnp.where(part, s, 0))
    exact = (k - jnp.sum(full) + jnp.sum(jnp.where(part, offset, 0))) / jnp.where(slope > 0, slope, 1)
    shares_found = jnp.where(part, jnp.clip(exact * s - offset, 0, 1), full.astype(dtype))
    return jnp.where(fits, present.astype(dtype), shares_found)
