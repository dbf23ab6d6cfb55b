"""StatsQ: levels without a zero, whose distance is a statistic of the weights and never learned."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int8, Shaped

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.quant.checks import Axis, as_floats, check_bits, check_not_empty, group_axes, safe_scale
from poise.quant.division import divide


@jax.custom_jvp
def _in_place_of(x: Array, value: Array) -> Array:
    """The value, with the derivative of ``x``: nothing is added, so that the value is exact."""
    del x
    return value


@_in_place_of.defjvp
def _(primals, tangents):
    return _in_place_of(*primals), tangents[0]


def _position(w: ArrayLike, bits: int, axis: Axis) -> tuple[Array, Array, Array]:
    r"""The weights, $\alpha$ in their dtype and $u = n\,\mathrm{clip}(w/\alpha, -1, 1) - \frac12$, as constants."""
    check_bits(bits)
    w = as_floats("w", w)
    check_not_empty("w", w)
    wide = jax.lax.stop_gradient(at_least_float32(w))
    alpha = 2 * jnp.mean(jnp.abs(wide), axis=group_axes(axis, w.ndim), keepdims=True)
    alpha = alpha.astype(w.dtype)
    u = jnp.clip(divide(wide, safe_scale(alpha.astype(wide.dtype))), -1, 1) * 2 ** (bits - 1) - 0.5
    return w, alpha, u


def _codes(u: Array, bits: int) -> Array:
    n = 2 ** (bits - 1)
    return jnp.clip(jnp.round(u), -n, n - 1)


def statsq(w: Shaped[ArrayLike, "*shape"], *, bits: int, axis: Axis) -> Shaped[Array, "*shape"]:
    r"""Statistical quantization of weights: $\hat w = \frac\alpha n(c + \frac12)$ with $\alpha = 2\langle|w|\rangle$.

    With $n = 2^{b-1}$,

    $$c = \mathrm{clip}\big(\mathrm{round}(n\,\mathrm{clip}(w/\alpha, -1, 1) - \tfrac12),\ -n,\ n-1\big).$$

    The levels are $\pm\frac12, \pm\frac32, \dots$ times $\alpha/n$; there is no 0, and $w=0$ becomes $\alpha/2n$. One
    bit gives $\mathrm{sign}(w)\,\langle|w|\rangle$. The derivative is that of the identity everywhere, clipped weights
    included, and none flows through $\alpha$. A group of zeros stays 0.

    Since $\alpha$ is a mean over the group, a weight close to a threshold can't carry the threshold along with it, as a
    learned scale does. The levels are not the closest ones: quantize in training with it, not afterwards.

    Args:
      w: weights of any shape.
      bits: $b$, from 1 to 8.
      axis: the axes that share $\alpha$; None for all. ``axis=0`` gives a Flax dense kernel ``(in, out)`` one per
        output.

    Returns:
      Quantized weights in the dtype of ``w``; the computation is in at least float32.

    Raises:
      ValueError: if ``w`` is empty or does not hold finite floats, or ``bits`` or ``axis`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import statsq
      >>> w = jnp.array([[0.0, -0.3, 0.6, -3.1]])  # alpha = 2
      >>> statsq(w, bits=2, axis=1).tolist(), statsq(w, bits=1, axis=1).tolist()
      ([[0.5, -0.5, 0.5, -1.5]], [[1.0, -1.0, 1.0, -1.0]])

    References:
      Liu, Liu and Cheng, *Oscillation-free Quantization for Low-bit Vision Transformers*,
      https://arxiv.org/abs/2302.02210. The official code clips $w/\alpha$ at $1 - 10^{-6}$ rather than the codes, which
      is the same from 2 bits on and gives $-\frac32\alpha$ for the lower level at 1 bit. Rastegari et al., *XNOR-Net*,
      https://arxiv.org/abs/1603.05279
    """
    w, alpha, u = _position(w, bits, axis)
    wide = alpha.astype(u.dtype)
    return _in_place_of(w, (wide * (_codes(u, bits) + 0.5) / 2 ** (bits - 1)).astype(w.dtype))


def statsq_codes(
    w: Shaped[ArrayLike, "*shape"], *, bits: int, axis: Axis
) -> tuple[Int8[Array, "*shape"], Shaped[Array, "..."]]:
    r"""The integers of :func:`statsq` and its $\alpha$: $\hat w = \frac\alpha{2n}(2c + 1)$.

    $2c+1$ are odd integers in $[-(2^b-1), 2^b-1]$, which fit int8 up to 7 bits: a product of integers takes those, with
    the scale $\alpha/2n$ and no zero point.

    Args:
      w: weights of any shape.
      bits: $b$, from 1 to 8.
      axis: the axes that share $\alpha$; None for all.

    Returns:
      Codes $c$ in $[-n, n-1]$, and $\alpha$ in the dtype of ``w``, in its rank with size 1 along ``axis``.

    Raises:
      ValueError: as :func:`statsq`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import statsq_codes
      >>> codes, alpha = statsq_codes(jnp.array([[0.0, -0.3, 0.6, -3.1]]), bits=2, axis=1)
      >>> codes.tolist(), alpha.tolist()
      ([[0, -1, 0, -2]], [[2.0]])

    References:
      Liu, Liu and Cheng, https://arxiv.org/abs/2302.02210
    """
    _, alpha, u = _position(w, bits, axis)
    return _codes(u, bits).astype(jnp.int8), jax.lax.stop_gradient(alpha)


def high_confidence_mask(
    w: Shaped[ArrayLike, "*shape"], *, bits: int, boundary_range: ArrayLike, axis: Axis
) -> Bool[Array, "*shape"]:
    r"""Which weights are far from every threshold of :func:`statsq`, so that annealing freezes them.

    In units of one level, $u = n\,\mathrm{clip}(w/\alpha, -1, 1) - \frac12$ and the thresholds are $k + \frac12$ for
    $k = -n\dots n-2$. A weight is frozen unless it is within the boundary range of one,
    $|u - k - \frac12| \le \mathrm{BR}$. Weights that are clipped always are; with a range of 0.5 all others with
    $-n \le u \le n - 1$ are free.

    Args:
      w: weights of any shape.
      bits: $b$, from 1 to 8.
      boundary_range: BR, from 0 to 0.5.
      axis: the axes that share $\alpha$; None for all.

    Returns:
      True where a weight is frozen.

    Raises:
      ValueError: if the range is outside of [0, 0.5]; and as :func:`statsq`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import high_confidence_mask
      >>> w = jnp.array([[0.001, -0.5, 0.999, -2.5]])  # alpha = 2, thresholds -1, 0 and 1
      >>> high_confidence_mask(w, bits=2, boundary_range=0.005, axis=1).tolist()
      [[False, True, False, True]]

    References:
      Liu, Liu and Cheng, https://arxiv.org/abs/2302.02210. The official code looks only at thresholds between levels
      that occur in the tensor.
    """
    check_range("boundary_range", boundary_range, 0.0, 0.5)
    _, _, u = _position(w, bits, axis)
    n = 2 ** (bits - 1)
    nearest = jnp.clip(jnp.round(u - 0.5), -n, n - 2) + 0.5
    return jnp.abs(u - nearest) > boundary_range
