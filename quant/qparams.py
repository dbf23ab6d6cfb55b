"""Scales and zero points from data: largest magnitude, range, and a search for the least error."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from poise.core.arguments import check_count, check_range
from poise.core.arrays import at_least_float32
from poise.quant.checks import Axis, as_floats, check_bits, check_not_empty, group_axes
from poise.quant.division import divide

_LEAST_SCALE = 1e-8


def _prepare(x: ArrayLike, bits: int, axis: Axis) -> tuple[Array, tuple[int, ...]]:
    check_bits(bits)
    x = as_floats("x", x)
    check_not_empty("x", x)
    return x, group_axes(axis, x.ndim)


def absmax_scale(x: Shaped[ArrayLike, "*shape"], bits: int, axis: Axis) -> Array:
    r"""The scale of symmetric quantization whose range is the largest magnitude: $s = 2\max|x|\,/\,(2^b-1)$.

    Used with :func:`quantize` and ``signed=True``. The greatest of $2^{b-1}-\frac12$ levels stands for the largest
    magnitude, so a positive one is rounded down by half a level.

    Args:
      x: floats of any shape.
      bits: $b$, from 1 to 8.
      axis: the axes that share one scale; None for all. ``axis=0`` gives a Flax dense kernel ``(in, out)`` one scale
        per output, ``axis=(0, 1, 2)`` does so for a convolution.

    Returns:
      Scales in the dtype of ``x``, in its rank with size 1 along ``axis``. A group of zeros has the scale 0.

    Raises:
      ValueError: if ``x`` is empty or does not hold finite floats, or ``bits`` or ``axis`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import absmax_scale
      >>> absmax_scale(jnp.array([[1.5, -7.5], [0.0, 0.0]]), bits=4, axis=1).tolist()
      [[1.0], [0.0]]
    """
    x, axes = _prepare(x, bits, axis)
    largest = at_least_float32(jnp.max(jnp.abs(x), axis=axes, keepdims=True))
    return divide(2 * largest, jnp.asarray(2**bits - 1, largest.dtype)).astype(x.dtype)


def minmax_qparams(x: Shaped[ArrayLike, "*shape"], bits: int, axis: Axis) -> tuple[Array, Array]:
    r"""Scale and zero point of asymmetric quantization over the range of the data, 0 included.

    With $m = \min(\min x, 0)$ and $M = \max(\max x, 0)$,

    $$s = \max\Big(\frac{M-m}{2^b-1}, 10^{-8}\Big),\qquad z = \mathrm{clip}(\mathrm{round}(-m/s), 0, 2^b-1).$$

    Used with :func:`quantize` and ``signed=False``.

    Args:
      x: floats of any shape.
      bits: $b$, from 1 to 8.
      axis: the axes that share one scale; None for all.

    Returns:
      Scales in the dtype of ``x`` and zero points in int32, both in its rank with size 1 along ``axis``.

    Raises:
      ValueError: if ``x`` is empty or does not hold finite floats, or ``bits`` or ``axis`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import minmax_qparams
      >>> scale, zero_point = minmax_qparams(jnp.array([-1.0, 0.5, 2.0]), bits=2, axis=None)
      >>> scale.tolist(), zero_point.tolist()
      ([1.0], [1])

    References:
      Lee et al., *FlexRound*, https://arxiv.org/abs/2306.00317
    """
    x, axes = _prepare(x, bits, axis)
    wide = at_least_float32(x)
    least = jnp.minimum(jnp.min(wide, axis=axes, keepdims=True), 0)
    greatest = jnp.maximum(jnp.max(wide, axis=axes, keepdims=True), 0)
    scale = jnp.maximum(divide(greatest - least, jnp.asarray(2**bits - 1, wide.dtype)), _LEAST_SCALE)
    zero_point = jnp.clip(jnp.round(divide(-least, scale)), 0, 2**bits - 1)
    return scale.astype(x.dtype), zero_point.astype(jnp.int32)


def mse_qparams(
    x: Shaped[ArrayLike, "*shape"],
    bits: int,
    axis: Axis,
    *,
    norm: float | int = 2.4,
    grid: int = 100,
    symmetric: bool = False,
) -> tuple[Array, Array]:
    r"""Scale and zero point of the least error $\langle|x-\hat x|^p\rangle$ in each group, over a grid of windows.

    The windows are $[-z\delta, w-z\delta]$ with $w = (M-m)\,i/k$ for $i = 1\dots k$, $\delta = w/(2^b-1)$ and
    $z = 0\dots2^b-1$, where $m = \min(\min x, 0)$ and $M = \max(\max x, 0)$. If no entry of the array is negative,
    only $z = 0$ is tried, if none is positive only $z = 2^b-1$. Symmetric: $\delta = 2w/(2^b-1)$ with
    $w = \max|x|\,i/k$, codes in $[-2^{b-1}, 2^{b-1}-1]$. Of equal errors the first window wins.

    This reads the array $k2^b$ times, 25600 for 8 bits.

    Args:
      x: floats of any shape.
      bits: $b$, from 1 to 8.
      axis: the axes that share one scale; None for all.
      norm: $p > 0$.
      grid: $k$, the number of widths.
      symmetric: whether the zero point stays 0, for :func:`quantize` with ``signed=True``.

    Returns:
      Scales in the dtype of ``x``, at least $10^{-8}$, and zero points in int32, both in its rank with size 1 along
      ``axis``; for :func:`quantize` with ``signed=False`` unless symmetric.

    Raises:
      ValueError: if ``x`` is empty or does not hold finite floats, or another argument is out of range.

    Example:
      An outlier is cut off where that pays:

      >>> import jax.numpy as jnp
      >>> from poise.quant import mse_qparams
      >>> x = jnp.append(jnp.tile(jnp.array([-1.0, 0.0, 1.0, 2.0]), 100), 2.5)
      >>> scale, zero_point = mse_qparams(x, bits=2, axis=None)
      >>> round(float(scale[0]), 2), int(zero_point[0])
      (1.0, 1)

    References:
      Lee et al., *FlexRound*, https://arxiv.org/abs/2306.00317
    """
    check_range("norm", norm, 0.0, open_low=True, open_high=True)
    check_count("grid", grid)
    x, axes = _prepare(x, bits, axis)
    wide, levels = at_least_float32(x), 2**bits
    least = jnp.minimum(jnp.min(wide, axis=axes, keepdims=True), 0)
    greatest = jnp.maximum(jnp.max(wide, axis=axes, keepdims=True), 0)
    width = 2 * jnp.maximum(greatest, -least) if symmetric else greatest - least
    zeros = jnp.array([levels // 2]) if symmetric else jnp.arange(levels)
    allowed = jnp.ones(zeros.shape, bool)
    if not symmetric:
        one_side = jnp.where(jnp.min(wide) >= 0, zeros == 0, zeros == levels - 1)
        allowed = jnp.where((jnp.min(wide) >= 0) | (jnp.max(wide) <= 0), one_side, allowed)

    def window(index: Array) -> tuple[Array, Array]:
        scale = jnp.maximum(width / grid * (index // zeros.size + 1) / (levels - 1), _LEAST_SCALE)
        return scale, zeros[index % zeros.size].astype(wide.dtype)

    def visit(best: tuple[Array, Array], index: Array):
        scale, zero = window(index)
        codes = jnp.clip(jnp.round(divide(wide, scale)), -zero, levels - 1 - zero)
        error = jnp.mean(jnp.abs(wide - scale * codes) ** norm, axis=axes, keepdims=True)
        better = (error < best[0]) & allowed[index % zeros.size]
        return (jnp.where(better, error, best[0]), jnp.where(better, index, best[1])), None

    # The widest window without an offset stands where no error is finite.
    start = (jnp.full(width.shape, jnp.inf, wide.dtype), jnp.full(width.shape, (grid - 1) * zeros.size, jnp.int32))
    (_, chosen), _ = jax.lax.scan(visit, start, jnp.arange(grid * zeros.size, dtype=jnp.int32))
    scale, zero = window(chosen)
    zero = jnp.zeros_like(zero) if symmetric else zero
    return scale.astype(x.dtype), zero.astype(jnp.int32)
