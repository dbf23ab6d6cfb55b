"""Numbers with an exponent of their own: the exponential of anything, without overflow, as a commutative monoid."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from poise.core.arrays import at_least_float32

ZERO_EXPONENT = -3e38  # the exponent of zero; finite, so that the difference of two is not NaN

# The logarithm of 2 in two parts, of which the first has so few bits that its multiples by exponents are exact.
LOG_2_PARTS = {
    "float32": (np.float32(0.693359375), np.float32(-2.12194440e-4)),
    "float64": (6.93147180369123816490e-01, 1.90821492927058770002e-10),
}
# exp on [-log(2)/2, log(2)/2], by ascending powers from the linear term on; minimax, for a constant term of 1.
EXP_POLYNOMIAL = tuple(
    float.fromhex(c) for c in ("0x1.FFFFF6p-1", "0x1.FFFDC6p-2", "0x1.555A80p-3", "0x1.573A1Ap-5", "0x1.0F9F9Cp-7")
)


class ExtFloat(NamedTuple):
    r"""The numbers $m\cdot 2^n$ with a floating mantissa and a whole exponent, which is stored as a floating number.

    Attributes:
      mantissa: $m$; sums don't normalize it, so it may be of any moderate size.
      exponent: $n$, integer valued; about $-3\cdot10^{38}$ for zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_exp, ext_log, ext_mul
      >>> huge = ext_mul(ext_exp(jnp.float32(5000.0)), ext_exp(jnp.float32(-4999.0)))
      >>> round(float(ext_log(huge)), 4)
      1.0

    References:
      Dukhan and Ablavatski, *The Two-Pass Softmax Algorithm*, https://arxiv.org/abs/2001.04438
    """

    mantissa: Float[Array, "..."]
    exponent: Float[Array, "..."]


def split_exponent(x: Array) -> tuple[Array, Array]:
    """The whole n and the t with ``x = n log 2 + t``, at most log(2)/2 in magnitude, or 1/2 where x is enormous."""
    n = jnp.round(jnp.clip(x * jnp.asarray(np.log2(np.e), x.dtype), ZERO_EXPONENT, -ZERO_EXPONENT))
    t = jnp.clip(subtract_log2_multiple(x, n), -0.5, 0.5)
    return n, jnp.where(jnp.isinf(x), jnp.nan, t)


def subtract_log2_multiple(x: Array, n: Array) -> Array:
    """``x - n log 2``, with the multiple in two parts so that it cancels well against x."""
    high, low = LOG_2_PARTS[x.dtype.name]
    return (x - n * high) - n * low


def power_of_two(exponent: Array) -> Array:
    """``2**exponent`` for whole exponents that are at most 0; 0 below the normal numbers. No gradient."""
    info = jnp.finfo(exponent.dtype)
    whole = jnp.int32 if info.bits == 32 else jnp.int64
    low = float(info.minexp - 1)
    biased = jnp.clip(exponent, low, 0.0).astype(whole) - whole(info.minexp - 1)
    return jax.lax.bitcast_convert_type(biased << info.nmant, exponent.dtype)


@jax.custom_jvp
def _mantissa(t: Array) -> Array:
    if t.dtype == jnp.float64:
        return jnp.exp(t)
    value = jnp.full_like(t, EXP_POLYNOMIAL[-1])
    for coefficient in (*EXP_POLYNOMIAL[-2::-1], 1.0):
        value = value * t + jnp.asarray(coefficient, t.dtype)
    return value


@_mantissa.defjvp
def _mantissa_jvp(primals, tangents):
    value = _mantissa(*primals)
    return value, value * tangents[0]


def ext_exp(x: ArrayLike) -> ExtFloat:
    r"""The exponential $e^x = m\,2^n$: $n = \mathrm{round}(x/\log 2)$ and $m = e^{x - n\log 2}$, about 0.7 to 1.42.

    Args:
      x: floating numbers; minus infinity gives zero, plus infinity and NaN give NaN. Below 22,700 in magnitude the
        mantissa has a relative error of 5e-7 in float32; beyond, that of rounding x itself.

    Returns:
      Mantissas and exponents in the shape of x, at least float32.

    Raises:
      TypeError: if x is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_exp
      >>> ext_exp(jnp.array([0.0, 1000.0, -jnp.inf])).exponent[:2].tolist()
      [0.0, 1443.0]

    References:
      Dukhan and Ablavatski, *The Two-Pass Softmax Algorithm*, https://arxiv.org/abs/2001.04438. The official kernels
      need a fused multiply-add; here log 2 is cut so that none is needed.
    """
    x = floating("x", x)
    vanishes = x == -jnp.inf
    n, t = split_exponent(jnp.where(vanishes, 0, x))
    return ExtFloat(jnp.where(vanishes, 0, _mantissa(t)), jax.lax.stop_gradient(jnp.where(vanishes, ZERO_EXPONENT, n)))


def floating(name: str, x: ArrayLike) -> Array:
    """The array, at least float32.

    Raises:
      TypeError: if it is not floating.
    """
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"{name} must have a floating dtype, got {jnp.result_type(x)}")
    return at_least_float32(x)


def ext_from_float(x: ArrayLike) -> ExtFloat:
    """Numbers as they are, of either sign, with mantissas in [1/2, 1).

    Raises:
      TypeError: if x is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_from_float
      >>> [part.tolist() for part in ext_from_float(jnp.array([6.0, -0.5]))]
      [[0.75, -0.5], [3.0, 0.0]]
    """
    x = floating("x", x)
    _, n = jnp.frexp(jax.lax.stop_gradient(x))
    n = n.astype(x.dtype)
    half = jnp.round(-n / 2)  # in two steps, since 2**-n may not be a number
    mantissa = x * power_of_two_any(half) * power_of_two_any(-n - half)
    return ExtFloat(mantissa, jnp.where(x == 0, ZERO_EXPONENT, n))


def ext_add(a: ExtFloat, b: ExtFloat) -> ExtFloat:
    r"""The sum $(m_1 2^{n_1-N} + m_2 2^{n_2-N})\,2^N$ with $N = \max(n_1, n_2)$; commutative, with zero as identity.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_add, ext_exp, ext_log
      >>> x = ext_exp(jnp.float32(10_000.0))
      >>> round(float(ext_log(ext_add(x, x))) - 10_000, 3)
      0.693
    """
    n = jnp.maximum(a.exponent, b.exponent)
    return ExtFloat(a.mantissa * power_of_two(a.exponent - n) + b.mantissa * power_of_two(b.exponent - n), n)


def ext_mul(a: ExtFloat, b: ExtFloat) -> ExtFloat:
    r"""The product $m_1 m_2\,2^{n_1+n_2}$.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_div_to_float, ext_exp, ext_mul
      >>> x = ext_exp(jnp.float32(3000.0))
      >>> round(float(ext_div_to_float(ext_mul(x, x), ext_exp(jnp.float32(6000.0)))), 5)
      1.0
    """
    mantissa = a.mantissa * b.mantissa
    return ExtFloat(mantissa, jnp.where(mantissa == 0, ZERO_EXPONENT, a.exponent + b.exponent))


def ext_sum(x: ExtFloat, axis: int | tuple[int, ...] = -1, *, keepdims: bool = False) -> ExtFloat:
    r"""The sum $\Big(\sum_i m_i 2^{n_i-N}\Big)2^N$ with $N = \max_i n_i$ over axes.

    Mantissas grow by up to the number of terms, which is fine below $2^{100}$ of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_exp, ext_log, ext_sum
      >>> round(float(ext_log(ext_sum(ext_exp(jnp.array([1000.0, 1001.0, -1000.0]))))), 3)
      1001.313
    """
    n = jnp.max(x.exponent, axis, keepdims=True)
    total = jnp.sum(x.mantissa * power_of_two(x.exponent - n), axis, keepdims=keepdims)
    return ExtFloat(total, n if keepdims else jnp.squeeze(n, axis))


def ext_cumsum(x: ExtFloat, axis: int = -1) -> ExtFloat:
    """The running sums along an axis, by an associative scan.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_cumsum, ext_exp, ext_log
      >>> [round(float(x), 2) for x in ext_log(ext_cumsum(ext_exp(jnp.full(4, 500.0))))]
      [500.0, 500.69, 501.1, 501.39]
    """
    return jax.lax.associative_scan(ext_add, x, axis=axis % x.mantissa.ndim)


def ext_psum(x: ExtFloat, axis_name: str) -> ExtFloat:
    """The sum over a mapped device axis: a maximum of exponents and one sum.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.attention import ext_exp, ext_log, ext_psum
      >>> total = jax.vmap(lambda x: ext_log(ext_psum(ext_exp(x), "data")), axis_name="data")(jnp.full(4, 900.0))
      >>> [round(float(x), 2) for x in total]
      [901.39, 901.39, 901.39, 901.39]
    """
    n = jax.lax.pmax(jax.lax.stop_gradient(x.exponent), axis_name)
    return ExtFloat(jax.lax.psum(x.mantissa * power_of_two(x.exponent - n), axis_name), n)


def ext_log(x: ExtFloat) -> Float[Array, "..."]:
    r"""The logarithm $\log m + n\log 2$; minus infinity for zero, NaN below.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_exp, ext_log
      >>> float(ext_log(ext_exp(jnp.float32(-20_000.0))))
      -20000.0
    """
    zero = x.mantissa == 0
    high, low = LOG_2_PARTS[x.exponent.dtype.name]
    n = jnp.where(zero, 0, x.exponent)
    value = (jnp.log(jnp.where(zero, 1, x.mantissa)) + n * low) + n * high
    return jnp.where(zero, -jnp.inf, value)


def ext_div_to_float(a: ExtFloat, b: ExtFloat) -> Float[Array, "..."]:
    r"""The quotient $(m_1/m_2)\,2^{n_1-n_2}$ as a plain number: infinite or zero where it is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention import ext_div_to_float, ext_exp
      >>> round(float(ext_div_to_float(ext_exp(jnp.float32(2001.0)), ext_exp(jnp.float32(2000.0)))), 4)
      2.7183
    """
    mantissa = a.mantissa / b.mantissa
    info = jnp.finfo(mantissa.dtype)
    n = jnp.clip(a.exponent - b.exponent, 2.0 * info.minexp, 2.0 * info.maxexp - 2)
    half = jnp.trunc(n / 2)
    return mantissa * power_of_two_any(half) * power_of_two_any(n - half)


def power_of_two_any(exponent: Array) -> Array:
    """``2**exponent`` for whole exponents of either sign within the normal numbers, exactly. No gradient."""
    up = power_of_two(-jnp.abs(exponent))
    return jnp.where(exponent > 0, 1 / jnp.where(exponent > 0, up, 1), up)
