"""Uniform quantization: integers, the floats that they stand for, and both at once with a straight-through gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from poise.core.arguments import check_range, concrete
from poise.core.arrays import at_least_float32
from poise.quant.checks import as_floats, check_bits, check_broadcasts, code_range, safe_scale
from poise.quant.division import divide
from poise.quant.rounding import clamp_inclusive, round_ste


def _check_scale(scale: ArrayLike) -> Array:
    scale = as_floats("scale", scale)
    check_range("scale", scale, 0.0)
    return scale


def _zero(zero_point: ArrayLike | None, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """The zero point as a float of the computation's dtype; 0 for None."""
    if zero_point is None:
        return jnp.zeros((), dtype)
    check_broadcasts("zero_point", zero_point, shape)
    value = concrete(zero_point)
    if value is not None and not (value.astype(float) == value.astype(float).round()).all():
        raise ValueError(f"zero_point must hold whole numbers, got {zero_point}")
    return jax.lax.stop_gradient(jnp.asarray(zero_point).astype(dtype))


def _codes(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike | None, bits: int, signed: bool
) -> tuple[Array, Array, Array]:
    """The codes as floats with a straight-through gradient, and scale and zero point in their dtype.

    Everything is computed in at least float32, so that the codes don't depend on how much precision a compiler keeps
    between two operations in bfloat16.
    """
    check_bits(bits)
    x, scale = as_floats("x", x), _check_scale(scale)
    check_broadcasts("scale", scale, x.shape)
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, scale.dtype), jnp.float32)
    scale, zero = scale.astype(dtype), _zero(zero_point, x.shape, dtype)
    lo, hi = code_range(bits, signed)
    return clamp_inclusive(round_ste(divide(x.astype(dtype), safe_scale(scale))) + zero, lo, hi), scale, zero


def quantize(
    x: Shaped[ArrayLike, "*shape"],
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    bits: int,
    signed: bool = True,
) -> Shaped[Array, "*shape"]:
    r"""Integers for floats: $c = \mathrm{clip}(\mathrm{round}(x/s) + z,\ l,\ u)$, rounded half to even.

    $[l, u]$ is $[-2^{b-1}, 2^{b-1}-1]$, or $[0, 2^b-1]$ without a sign. A group with scale 0 has codes $z$.

    Args:
      x: floats of any shape.
      scale: $s \ge 0$, broadcasts to the shape of ``x``.
      zero_point: $z$, whole numbers, broadcasts likewise; None for 0.
      bits: $b$, from 1 to 8.
      signed: which range.

    Returns:
      int8 codes, uint8 without a sign.

    Raises:
      ValueError: if ``x`` or ``scale`` does not hold finite floats, ``scale`` is negative, the zero point is no whole
        number, one of them does not broadcast to ``x``, or ``bits`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import quantize
      >>> quantize(jnp.array([-3.0, -0.25, 0.3, 9.0]), 0.5, bits=3).tolist()
      [-4, 0, 1, 3]
    """
    codes, scale, zero = _codes(x, scale, zero_point, bits, signed)
    codes = jnp.where(scale > 0, codes, jnp.clip(zero, *code_range(bits, signed)))
    return codes.astype(jnp.int8 if signed else jnp.uint8)


def dequantize(
    codes: Shaped[ArrayLike, "*shape"],
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
) -> Shaped[Array, "*shape"]:
    r"""The floats that codes stand for: $\hat x = s\,(c - z)$.

    Args:
      codes: integers of any shape.
      scale: $s \ge 0$, broadcasts to the shape of ``codes``.
      zero_point: $z$, whole numbers, broadcasts likewise; None for 0.

    Returns:
      Floats in the dtype of ``scale``; the product is taken in at least float32.

    Raises:
      ValueError: if ``codes`` holds no integers, ``scale`` is negative or not finite, or shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import dequantize
      >>> dequantize(jnp.array([0, 3, 7], jnp.uint8), 0.5, 3).tolist()
      [-1.5, 0.0, 2.0]
    """
    codes, scale = jnp.asarray(codes), _check_scale(scale)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must hold integers, got {codes.dtype}")
    check_broadcasts("scale", scale, codes.shape)
    wide = at_least_float32(scale)
    return (wide * (codes.astype(wide.dtype) - _zero(zero_point, codes.shape, wide.dtype))).astype(scale.dtype)


def fake_quantize(
    x: Shaped[ArrayLike, "*shape"],
    scale: ArrayLike,
    zero_point: ArrayLike | None = None,
    *,
    bits: int,
    signed: bool = True,
) -> Shaped[Array, "*shape"]:
    r"""Quantizes and dequantizes, with a straight-through gradient.

    $\hat x = s\,(\mathrm{clip}(\mathrm{round}(x/s) + z, l, u) - z)$, bit for bit :func:`dequantize` of
    :func:`quantize` where ``x`` and ``scale`` have one dtype. With $\mathrm{round}' = 1$ and a clip whose derivative is
    1 up to and including its ends,

    $$\frac{\partial\hat x}{\partial x} = 1[l \le c \le u],\qquad
    \frac{\partial\hat x}{\partial s} = c - z - 1[l \le c \le u]\,\frac xs,\qquad c = \mathrm{round}(x/s) + z,$$

    $c$ clipped in the second formula's first term. A group with scale 0 gives 0, with gradient 0.

    Args:
      x: floats of any shape.
      scale: $s \ge 0$, broadcasts to the shape of ``x``.
      zero_point: $z$, whole numbers, broadcasts likewise; None for 0. No gradient flows into it.
      bits: $b$, from 1 to 8.
      signed: whether codes are in $[-2^{b-1}, 2^{b-1}-1]$ or in $[0, 2^b-1]$.

    Returns:
      Floats in the dtype of ``x``; the computation is in at least float32.

    Raises:
      ValueError: as :func:`quantize`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import fake_quantize
      >>> x = jnp.array([-3.0, -0.25, 0.3, 9.0])
      >>> f = lambda x: fake_quantize(x, 0.5, bits=3)
      >>> f(x).tolist(), jax.grad(lambda x: f(x).sum())(x).tolist()
      ([-2.0, 0.0, 0.5, 1.5], [0.0, 1.0, 1.0, 0.0])
    """
    codes, scale, zero = _codes(x, scale, zero_point, bits, signed)
    return (scale * (codes - zero)).astype(jnp.asarray(x).dtype)
