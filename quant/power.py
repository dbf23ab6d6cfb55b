"""Power quantizers: uniform codes of sign(x)|x|^a, the multiplicative way to spend levels near zero."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int8, Integer, PyTree

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.quant.checks import Axis, as_floats, check_bits, check_not_empty, group_axes, safe_scale
from poise.quant.division import divide

GRID = (0.1, 1.5, 0.02)
GOLDEN_STEPS = 24
_RATIO = (5**0.5 - 1) / 2


def power_levels(bits: int, signed: bool = True) -> int:
    r"""$N$, the largest code: $2^{b-1} - 1$, or $2^b - 1$ for unsigned ones.

    Example:
      >>> from poise.quant.power import power_levels
      >>> power_levels(4), power_levels(4, signed=False)
      (7, 15)
    """
    check_bits(bits, low=2)
    return 2 ** (bits - signed) - 1


def power_quantize(
    w: Float[Array, "..."], a: ArrayLike, *, bits: int, axis: Axis = None, signed: bool = True
) -> tuple[Integer[Array, "..."], Float[Array, "..."]]:
    r"""Codes that are uniform in $\mathrm{sign}(w)|w|^a$.

    With $m = \max|w|$ over a group and $N = 2^{b-1} - 1$,

    $$c = \mathrm{sign}(w)\,\mathrm{round}\big(N (|w|/m)^a\big) \in [-N, N].$$

    $a = 1$ is the symmetric uniform quantizer, $a < 1$ puts more levels near zero. The maps $|x|^a$ are the only
    continuous ones that keep products, so the product of two codes stands for the product of two values. A group of
    zeros gives zeros. At 2 bits there are only the codes -1, 0, 1, so the exponent moves nothing but the threshold.

    Args:
      w: floating weights or activations; finite.
      a: the exponent, positive.
      bits: from 2 to 8.
      axis: the axes that share a scale; None for all.
      signed: False for values that are never negative (after a ReLU): $N = 2^b - 1$, negative ones become 0.

    Returns:
      int8 codes, uint8 if not ``signed``, and the scale $m$ in the dtype of ``w``, in its rank with size 1 along
      ``axis``.

    Raises:
      ValueError: if ``w`` is empty or does not hold finite floats, or ``bits``, ``a`` or an axis is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import power_dequantize, power_quantize
      >>> w = jnp.array([-1.0, -0.3, -0.05, 0.0, 0.02, 0.2, 0.6, 1.0])
      >>> codes, scale = power_quantize(w, 0.5, bits=4)
      >>> codes.tolist(), scale.tolist()
      ([-7, -4, -2, 0, 1, 3, 5, 7], [1.0])
      >>> [round(float(x), 2) for x in power_dequantize(codes, scale, 0.5, bits=4)]
      [-1.0, -0.33, -0.08, 0.0, 0.02, 0.18, 0.51, 1.0]

    References:
      *PowerQuant: Automorphism Search for Non-Uniform Quantization*, https://arxiv.org/abs/2301.09858. There is no
      official code.
    """
    check_exponent(a)
    levels = power_levels(bits, signed)
    scale = largest_magnitude(w, axis)
    codes = jnp.round(power_latent(w, scale, a, levels, signed))
    return codes.astype(jnp.int8 if signed else jnp.uint8), scale


def power_latent(w: ArrayLike, scale: Array, a: ArrayLike, levels: int, signed: bool = True) -> Array:
    r"""Codes before they are rounded, $\mathrm{sign}(w)\,N (|w|/m)^a$, in at least float32; groups of zeros give zeros.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant.power import power_latent
      >>> power_latent(jnp.array([-0.25, 1.0]), jnp.ones(1), 0.5, 7).tolist()
      [-3.5, 7.0]
    """
    wide = at_least_float32(w)
    size = jnp.abs(wide) if signed else jnp.maximum(wide, 0)
    unit = divide(size, safe_scale(scale).astype(wide.dtype))
    return jnp.sign(wide) * levels * unit ** jnp.asarray(a, wide.dtype)


def power_dequantize(
    codes: Integer[Array, "..."], scale: ArrayLike, a: ArrayLike, *, bits: int, signed: bool = True
) -> Float[Array, "..."]:
    r"""The values of power codes, $\hat w = \mathrm{sign}(c)\,m\,(|c|/N)^{1/a}$.

    Args:
      codes: the codes of :func:`power_quantize`.
      scale: its scale $m$.
      a: its exponent.
      bits: its width.
      signed: likewise.

    Returns:
      Values in the scale's dtype.

    Raises:
      ValueError: if ``bits`` or ``a`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import power_dequantize
      >>> power_dequantize(jnp.array([-7, 0, 7], jnp.int8), 2.0, 0.6, bits=4).tolist()
      [-2.0, 0.0, 2.0]
    """
    check_exponent(a)
    scale = as_floats("scale", scale)
    wide = at_least_float32(scale)
    return (power_values(codes.astype(wide.dtype), a, power_levels(bits, signed)) * wide).astype(scale.dtype)


def power_values(codes: Float[Array, "..."], a: ArrayLike, levels: int) -> Float[Array, "..."]:
    r"""$\mathrm{sign}(c)\,(|c|/N)^{1/a}$ of codes that need not be whole, with finite gradients everywhere.

    $\partial_a u^{1/a} = -u^{1/a}\ln u/a^2$ goes to 0 at $u = 0$. For $a > 1$ the slope in $c$ has a pole there, which
    is cut at $|c| = 10^{-6}$.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant.power import power_values
      >>> float(jax.grad(lambda a: power_values(jnp.array([0.0, 7.0]), a, 7).sum())(0.5)) == 0.0
      True
    """
    size = jnp.abs(codes)
    inside = size > 1e-6
    unit = divide(jnp.where(inside, size, 1.0), jnp.asarray(levels, size.dtype))
    inverse = 1 / jnp.asarray(a, unit.dtype)
    values = jnp.sign(codes) * unit**inverse
    # Below the cut the map is the chord from zero.
    chord = (1e-6 / levels) ** (jax.lax.stop_gradient(inverse) - 1) / levels
    return jnp.where(inside, values, codes * chord)


def power_fake_quantize(w: Float[Array, "..."], a: ArrayLike, *, bits: int, axis: Axis = None) -> Float[Array, "..."]:
    """Quantizes and back at once, in the dtype of the weights.

    Args:
      w: weights.
      a: the exponent.
      bits: from 2 to 8.
      axis: the axes that share a scale.

    Returns:
      ``power_dequantize(*power_quantize(w, a), a)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import power_fake_quantize
      >>> power_fake_quantize(jnp.array([1.0, 0.4, -0.9]), 1.0, bits=2).tolist()
      [1.0, 0.0, -1.0]
    """
    codes, scale = power_quantize(w, a, bits=bits, axis=axis)
    return power_dequantize(codes, scale, a, bits=bits)


def power_decode_table(a: ArrayLike, bits: int) -> Int8[Array, "codes"]:
    r"""Power codes as integers for an int8 product: entry $c + 2^{b-1}$ is the decoded value of the code $c$.

    For $a = 1/2$ and at most 4 bits the entries are $\mathrm{sign}(c)\,c^2$, which is exact: the value is the entry
    times $m/N^2$. Else they are rounded to int8 with the largest at 127. The value is the entry times
    $m$ over the largest.

    Args:
      a: the exponent, one number.
      bits: from 2 to 8.

    Returns:
      int8 ``[2**bits]``. The code $-2^{b-1}$, which is never used, repeats its neighbour.

    Raises:
      ValueError: if ``a`` or ``bits`` is out of range.

    Example:
      >>> from poise.quant import power_decode_table
      >>> power_decode_table(0.5, 3).tolist()
      [-9, -9, -4, -1, 0, 1, 4, 9]
    """
    check_exponent(a)
    levels = power_levels(bits)
    a = at_least_float32(a)
    code = jnp.maximum(jnp.arange(-levels - 1, levels + 1), -levels)
    top = jnp.where((a == 0.5) & (levels**2 <= 127), levels**2, 127).astype(a.dtype)
    return (jnp.sign(code) * jnp.round(top * (jnp.abs(code) / a.dtype.type(levels)) ** (1 / a))).astype(jnp.int8)


def power_bennett_mse(u: Float[Array, "..."], a: ArrayLike) -> Float[Array, ""]:
    r"""The mean squared error for many levels, in units of $m^2/(12 N^2)$: $\mathbb E[u^{2-2a}]/a^2$.

    Its logarithm is convex in $a$, so there is one minimum, at $a = -\mathbb E[u^{2-2a}]/\mathbb E[u^{2-2a}\ln u]$; for
    uniform $u$ it is $a = 1$. It needs $a < 3/2$ where the density at zero is positive.

    Args:
      u: magnitudes $|w|/m$ in [0, 1].
      a: the exponent.

    Returns:
      A scalar; zeros among ``u`` are left out, since they are met exactly.

    Raises:
      ValueError: if ``a`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import power_bennett_mse
      >>> round(float(power_bennett_mse(jnp.linspace(0.001, 1, 1000), 0.5)), 2)
      2.0
    """
    check_exponent(a)
    u = at_least_float32(u)
    inside = u > 0
    exponent = jnp.asarray(a, u.dtype)
    return jnp.mean(jnp.where(inside, jnp.where(inside, u, 1.0) ** (2 - 2 * exponent), 0.0)) / exponent**2


def power_search(
    tree: PyTree, *, bits: int, axis: Axis = None, p: float | int = 2.0, shared: bool = True
) -> Float[Array, ""] | PyTree:
    r"""The exponent that loses least, from the weights alone: $\arg\min_a \sum_l \|W_l - \hat W_{l,a}\|_p$.

    The curve is smooth in pieces and has small ripples, so the best of a grid over [0.1, 1.5] is refined by golden
    section within its bracket. Everything runs under ``jit``.

    Args:
      tree: an array, or a tree of them.
      bits: from 2 to 8. At 2 bits a warning says that the exponent moves nothing but a threshold.
      axis: the axes that share a scale, the same for all leaves.
      p: the norm.
      shared: one exponent for the whole tree, as in the paper, or one for each leaf.

    Returns:
      A scalar, or a tree of scalars if not ``shared``; at least float32.

    Raises:
      ValueError: if the tree or a leaf is empty, a leaf does not hold finite floats, or ``bits`` or ``p`` is out of
        range.

    Example:
      >>> import jax
      >>> from poise.quant import power_search
      >>> w = jax.random.laplace(jax.random.key(0), (2000,))
      >>> 0.3 < float(power_search(w, bits=4)) < 0.7
      True

    References:
      *PowerQuant*, https://arxiv.org/abs/2301.09858: found there by Nelder-Mead, one exponent for a whole network.
    """
    check_range("p", p, 0.0, open_low=True, open_high=True)
    power_levels(bits)
    leaves = jax.tree.leaves(tree)
    if not leaves:
        raise ValueError("tree must have at least one array, got none")
    for leaf in leaves:
        check_not_empty("tree", as_floats("tree", leaf))
    if bits == 2:
        warnings.warn("at bits=2 the codes are -1, 0 and 1, so the exponent moves only a threshold", stacklevel=2)
    if not shared:
        return jax.tree.map(lambda leaf: _search([leaf], bits, axis, float(p)), tree)
    return _search(leaves, bits, axis, float(p))


@functools.partial(jax.jit, static_argnames=("bits", "axis", "p"))
def _search(leaves: list[Array], bits: int, axis: Axis, p: float) -> Array:
    dtype = jnp.result_type(jnp.float32, *leaves)
    leaves = [leaf.astype(dtype) for leaf in leaves]

    def loss(a: Array) -> Array:
        errors = [jnp.abs(w - power_fake_quantize(w, a, bits=bits, axis=axis)) for w in leaves]
        return sum((jnp.sum(error**p) ** (1 / p) for error in errors), start=jnp.zeros((), dtype))

    low, high, step = GRID
    grid = jnp.arange(low, high + step / 2, step, dtype)
    best = grid[jnp.argmin(jax.lax.map(loss, grid))]

    def narrow(_: Any, bracket: tuple[Array, ...]) -> tuple[Array, ...]:
        left, right, inner, outer, at_inner, at_outer = bracket
        go_left = at_inner < at_outer
        left, right = jnp.where(go_left, left, inner), jnp.where(go_left, outer, right)
        fresh = jnp.where(go_left, right - _RATIO * (right - left), left + _RATIO * (right - left))
        at_fresh = loss(fresh)
        return (
            left,
            right,
            jnp.where(go_left, fresh, outer),
            jnp.where(go_left, inner, fresh),
            jnp.where(go_left, at_fresh, at_outer),
            jnp.where(go_left, at_inner, at_fresh),
        )

    left, right = best - step, best + step
    inner, outer = right - _RATIO * (right - left), left + _RATIO * (right - left)
    bracket = jax.lax.fori_loop(0, GOLDEN_STEPS, narrow, (left, right, inner, outer, loss(inner), loss(outer)))
    found = (bracket[0] + bracket[1]) / 2
    return jnp.where(loss(found) < loss(best), found, best)


def largest_magnitude(w: ArrayLike, axis: Axis) -> Array:
    """The largest magnitude of each group, in the array's rank with size 1 along ``axis``.

    Raises:
      ValueError: if the array is empty or does not hold finite floats, or an axis is out of range.
    """
    w = as_floats("w", w)
    check_not_empty("w", w)
    return jnp.max(jnp.abs(w), group_axes(axis, w.ndim), keepdims=True)


def check_exponent(a: Any) -> None:
    """Raises a ValueError unless concrete exponents are positive and finite."""
    check_range("a", a, 0.0, open_low=True, open_high=True)
