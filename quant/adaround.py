"""AdaRound: learns for each weight whether it is rounded up or down."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_count, check_range
from poise.core.arrays import at_least_float32
from poise.quant.checks import as_floats, check_bits, check_broadcasts, safe_scale
from poise.quant.division import divide
from poise.quant.rounding import clamp_inclusive

ZETA, GAMMA = 1.1, -0.1


def adaround_init(w: Float[Array, "..."], scale: ArrayLike) -> Float[Array, "..."]:
    r"""Rounding variables with which the soft weights are the weights themselves.

    $V_0 = -\log\big((\zeta-\gamma)/(f-\gamma) - 1\big)$ with the fraction $f = w/s - \lfloor w/s\rfloor$,
    $\zeta = 1.1$, $\gamma = -0.1$.

    Args:
      w: weights.
      scale: their scale, from a search; it broadcasts against them and stays as it is.

    Returns:
      Variables of the weights' shape, in at least float32.

    Raises:
      ValueError: if an argument holds no finite floats or the scale doesn't broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import adaround_init, adaround_soft
      >>> w = jnp.array([0.3, -0.6])
      >>> [round(float(x), 5) for x in adaround_soft(w, adaround_init(w, 0.5), 0.5, bits=4)]
      [0.3, -0.6]

    References:
      *Up or Down? Adaptive Rounding for Post-Training Quantization*, https://arxiv.org/abs/2004.10568.
    """
    position = _position(w, scale)
    fraction = position - jnp.floor(position)
    return -jnp.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def adaround_rounding(v: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""How far each weight is rounded up: $h(V) = \mathrm{clip}(\sigma(V)(\zeta-\gamma)+\gamma, 0, 1)$.

    Args:
      v: rounding variables.

    Returns:
      Numbers in [0, 1]; both ends are reached.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import adaround_rounding
      >>> adaround_rounding(jnp.array([-9.0, 0.0, 9.0])).tolist()
      [0.0, 0.5, 1.0]
    """
    return clamp_inclusive(jax.nn.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def adaround_soft(
    w: Float[Array, "..."],
    v: Float[Array, "..."],
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    bits: int,
) -> Float[Array, "..."]:
    r"""Weights on the way to being rounded, $s\,(\mathrm{clip}(\lfloor w/s\rfloor + h(V) + z, 0, 2^b - 1) - z)$.

    Gradients flow to ``v`` only; both clips pass them at their ends.

    Args:
      w: weights.
      v: rounding variables, of their shape.
      scale: their scale.
      zero_point: in $[0, 2^b - 1]$; None for the symmetric $2^{b-1}$.
      bits: from 2 to 8.

    Returns:
      Weights in the dtype of ``w``.

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import adaround_soft
      >>> adaround_soft(jnp.array([0.3, 0.3]), jnp.array([-9.0, 9.0]), 0.5, bits=4).tolist()
      [0.0, 0.5]
    """
    return _weights(w, adaround_rounding(v), scale, zero_point, bits)


def adaround_hard(
    w: Float[Array, "..."],
    v: Float[Array, "..."],
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    bits: int,
) -> Float[Array, "..."]:
    r"""Rounded weights: up where $V \ge 0$, else down.

    Args:
      w: weights.
      v: rounding variables, of their shape.
      scale: their scale.
      zero_point: in $[0, 2^b - 1]$; None for the symmetric $2^{b-1}$.
      bits: from 2 to 8.

    Returns:
      Weights on the grid, in the dtype of ``w``.

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import adaround_hard
      >>> adaround_hard(jnp.array([0.3, 0.3]), jnp.array([-0.1, 0.1]), 0.5, bits=4).tolist()
      [0.0, 0.5]
    """
    return _weights(w, (v >= 0).astype(at_least_float32(w).dtype), scale, zero_point, bits)


def adaround_codes(
    w: Float[Array, "..."],
    v: Float[Array, "..."],
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    bits: int,
) -> tuple[Array, Array | None]:
    r"""The integers of :func:`adaround_hard`, in $[-2^{b-1}, 2^{b-1}-1]$, and the zero point that goes with them.

    Args:
      w: weights.
      v: rounding variables, of their shape.
      scale: their scale.
      zero_point: in $[0, 2^b - 1]$; None for the symmetric $2^{b-1}$.
      bits: from 2 to 8.

    Returns:
      int8 codes and the int8 zero point (None where there was none), both lowered by $2^{b-1}$.

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import adaround_codes
      >>> codes, _ = adaround_codes(jnp.array([0.3, 0.3]), jnp.array([-0.1, 0.1]), 0.5, bits=4)
      >>> codes.tolist()
      [0, 1]
    """
    codes = _codes(w, (v >= 0).astype(at_least_float32(w).dtype), scale, zero_point, bits) - 2 ** (bits - 1)
    shifted = None if zero_point is None else (jnp.asarray(zero_point, jnp.int32) - 2 ** (bits - 1)).astype(jnp.int8)
    return codes.astype(jnp.int8), shifted


def adaround_regularizer(v: Float[Array, "..."], beta: ArrayLike) -> Float[Array, ""]:
    r"""What drives every weight to one side: $\sum (1 - |2h(V) - 1|^\beta)$, zero only where all $h$ are 0 or 1.

    Args:
      v: rounding variables.
      beta: large at first, which leaves all but the undecided alone, then small; see :func:`adaround_beta`.

    Returns:
      A scalar.

    Raises:
      ValueError: if ``beta`` isn't positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import adaround_regularizer
      >>> float(adaround_regularizer(jnp.array([-9.0, 0.0]), 2.0))
      1.0
    """
    check_range("beta", beta, 0.0, open_low=True)
    return jnp.sum(1 - jnp.abs(2 * adaround_rounding(v) - 1) ** jnp.asarray(beta, v.dtype))


def adaround_beta(
    step: ArrayLike,
    total: int,
    warmup: float | int = 0.2,
    start: float | int = 20.0,
    end: float | int = 2.0,
) -> Float[Array, ""]:
    r"""$\beta$ at step $t = 1, \dots, T$: constant for the first part, then linear down to ``end``.

    Args:
      step: t.
      total: T.
      warmup: the part of the steps without regularizer.
      start: $\beta$ until then.
      end: $\beta$ at the last step.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: if ``total`` is below 1 or ``warmup`` outside of [0, 1).

    Example:
      >>> from poise.quant import adaround_beta
      >>> [round(float(adaround_beta(step, 100)), 4) for step in (1, 60, 100)]
      [20.0, 11.0, 2.0]
    """
    check_count("total", total)
    check_range("warmup", warmup, 0.0, 1.0, open_high=True)
    part = (jnp.asarray(step, jnp.float32) / total - warmup) / (1 - warmup)
    return end + (start - end) * (1 - jnp.clip(part, 0, 1))


def _position(w: Array, scale: ArrayLike) -> Array:
    """The weights in units of the scale, in at least float32."""
    w, scale = as_floats("w", w), as_floats("scale", scale)
    check_broadcasts("scale", scale, w.shape)
    wide = at_least_float32(w)
    return divide(wide, safe_scale(scale.astype(wide.dtype)))


def _codes(w: Array, up: Array, scale: ArrayLike, zero_point: ArrayLike | None, bits: int) -> Array:
    check_bits(bits, low=2)
    if up.shape != w.shape:
        raise ValueError(f"v must have the shape of w, {w.shape}, got {up.shape}")
    zero = 2 ** (bits - 1) if zero_point is None else zero_point
    check_broadcasts("zero_point", zero, w.shape)
    below = jax.lax.stop_gradient(jnp.floor(_position(w, scale)))
    return clamp_inclusive(below + up + jnp.asarray(zero, below.dtype), 0, 2**bits - 1)


def _weights(w: Array, up: Array, scale: ArrayLike, zero_point: ArrayLike | None, bits: int) -> Array:
    codes = _codes(w, up, scale, zero_point, bits)
    zero = 2 ** (bits - 1) if zero_point is None else zero_point
    return (jnp.asarray(scale, codes.dtype) * (codes - jnp.asarray(zero, codes.dtype))).astype(w.dtype)
