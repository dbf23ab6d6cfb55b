"""LSQ: uniform quantization whose step size is learned."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int8, Shaped

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.quant import rounding
from poise.quant.checks import Axis, as_floats, check_bits, check_not_empty, group_axes
from poise.quant.division import divide

LEAST_STEP = 1e-5


@jax.custom_jvp
def _at_least(step: Array) -> Array:
    return jnp.maximum(step, LEAST_STEP)


@_at_least.defjvp
def _(primals, tangents):
    return _at_least(*primals), tangents[0]


def _bounds(bits: int, signed: bool, symmetric: bool) -> tuple[int, int]:
    """The least code, negated, and the greatest one."""
    check_bits(bits, 2 if signed else 1)
    if not signed:
        if symmetric:
            raise ValueError("symmetric must be False without a sign, got True")
        return 0, 2**bits - 1
    return 2 ** (bits - 1) - symmetric, 2 ** (bits - 1) - 1


def lsq(
    x: Shaped[ArrayLike, "*shape"],
    step: ArrayLike,
    *,
    bits: int,
    signed: bool = True,
    axis: Axis,
    grad_scale: ArrayLike | None = None,
    symmetric: bool = False,
) -> Shaped[Array, "*shape"]:
    r"""Learned step size quantization: $\hat x = s\,\mathrm{round}(\mathrm{clip}(x/s, -Q_N, Q_P))$.

    $(Q_N, Q_P)$ is $(2^{b-1}, 2^{b-1}-1)$, or $(0, 2^b-1)$ without a sign. With $v = x/s$,

    $$\frac{\partial\hat x}{\partial x} = 1[-Q_N \le v \le Q_P],\qquad
    \frac{\partial\hat x}{\partial s} = g\cdot\begin{cases}\mathrm{round}(v) - v & -Q_N \le v \le Q_P\\
    -Q_N & v < -Q_N\\ Q_P & v > Q_P\end{cases},\qquad g = \frac1{\sqrt{NQ_P}},$$

    $N$ the number of entries that share a step. A step below $10^{-5}$ inside ``jit`` counts as $10^{-5}$ and keeps its
    gradient, since steps do drift below zero in training.

    Args:
      x: weights or activations of any shape.
      step: $s > 0$, one for each group, in a shape that broadcasts to that of :func:`lsq_init`.
      bits: $b$, from 2 to 8; from 1 without a sign.
      signed: whether codes may be negative.
      axis: the axes that share one step; None for all. ``axis=0`` gives a Flax dense kernel one step per output,
        ``axis=(0, 2)`` gives activations ``(batch, tokens, width)`` one per token position.
      grad_scale: $g$; None for the formula above. It is where the batch of a device counts into $N$ that one may want
        to give a number.
      symmetric: whether $Q_N = Q_P = 2^{b-1}-1$.

    Returns:
      Floats in the dtype of ``x``; the computation is in at least float32.

    Raises:
      ValueError: if ``x`` does not hold finite floats, there is not one positive step for each group, or another
        argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import lsq
      >>> x, step = jnp.array([-3.0, 0.3, 0.9, 5.0]), jnp.array([0.5])
      >>> lsq(x, step, bits=3, axis=None).tolist()
      [-2.0, 0.5, 1.0, 1.5]
      >>> f"{jax.grad(lambda s: lsq(x, s, bits=3, axis=None).sum())(step)[0]:.3f}"  # (-4 + 0.4 + 0.2 + 3) / sqrt(4 * 3)
      '-0.115'

    References:
      Esser et al., *Learned Step Size Quantization*, https://arxiv.org/abs/1902.08153. For a convolution with one step
      per channel some implementations count all entries in $N$; here only those of the group, as in the official code
      of the oscillation-free method.
    """
    q_n, q_p = _bounds(bits, signed, symmetric)
    x, step = as_floats("x", x), as_floats("step", step)
    check_not_empty("x", x)
    check_range("step", step, 0.0, open_low=True)
    check_range("grad_scale", grad_scale, 0.0, open_high=True)
    axes = group_axes(axis, x.ndim)
    groups = tuple(1 if a in axes else size for a, size in enumerate(x.shape))
    if step.size != math.prod(groups) or step.ndim > x.ndim or jnp.broadcast_shapes(step.shape, groups) != groups:
        raise ValueError(f"step must have the shape {groups}, one for each group of axis={axis}, got {step.shape}")
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, step.dtype), jnp.float32)
    g = (x.size // step.size * q_p) ** -0.5 if grad_scale is None else grad_scale
    s = rounding.grad_scale(_at_least(step.astype(dtype)), g)
    codes = rounding.round_ste(rounding.clamp_inclusive(divide(x.astype(dtype), s), -q_n, q_p))
    return (codes * s).astype(x.dtype)


def lsq_codes(
    x: Shaped[ArrayLike, "*shape"], step: ArrayLike, *, bits: int
) -> tuple[Int8[Array, "*shape"], Shaped[Array, "..."]]:
    r"""The integers of :func:`lsq` with a sign, and the step that they are multiplied by: $\hat x = s\,c$.

    Args:
      x: weights.
      step: of a shape that broadcasts against ``x``; below $10^{-5}$ it counts as $10^{-5}$.
      bits: from 2 to 8.

    Returns:
      int8 codes in $[-2^{b-1}, 2^{b-1} - 1]$, and the step in at least float32.

    Raises:
      ValueError: if ``bits`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant.lsq import lsq_codes
      >>> lsq_codes(jnp.array([-3.0, 0.3, 0.9, 5.0]), jnp.array([0.5]), bits=3)[0].tolist()
      [-4, 1, 2, 3]
    """
    q_n, q_p = _bounds(bits, True, False)
    x, step = jnp.asarray(x), jnp.asarray(step)
    dtype = jnp.promote_types(jnp.promote_types(x.dtype, step.dtype), jnp.float32)
    step = jnp.maximum(step.astype(dtype), LEAST_STEP)
    return jnp.round(jnp.clip(divide(x.astype(dtype), step), -q_n, q_p)).astype(jnp.int8), step


def lsq_init(
    x: Shaped[ArrayLike, "*shape"],
    *,
    bits: int,
    signed: bool = True,
    axis: Axis,
    multiplier: ArrayLike = 2.0,
) -> Array:
    r"""Step sizes from data: $s = k\,\langle|x|\rangle\,/\sqrt{Q_P}$ in each group.

    Args:
      x: weights, or the activations of one batch.
      bits: from 2 to 8; from 1 without a sign.
      signed: whether codes may be negative.
      axis: the axes that share one step; None for all.
      multiplier: $k > 0$. The oscillation-free method takes 4 for unsigned activations.

    Returns:
      Steps in the dtype of ``x``, in its rank with size 1 along ``axis``, at least $10^{-5}$, so that a group of zeros
      has one too.

    Raises:
      ValueError: if ``x`` is empty or does not hold finite floats, or another argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import lsq_init
      >>> lsq_init(jnp.array([[1.0, -2.0], [3.0, 0.0]]), bits=1, signed=False, axis=1).tolist()
      [[3.0], [3.0]]

    References:
      Esser et al., *Learned Step Size Quantization*, https://arxiv.org/abs/1902.08153
    """
    _, q_p = _bounds(bits, signed, False)
    check_range("multiplier", multiplier, 0.0, open_low=True, open_high=True)
    x = as_floats("x", x)
    check_not_empty("x", x)
    mean = jnp.mean(jnp.abs(at_least_float32(x)), axis=group_axes(axis, x.ndim), keepdims=True)
    return jnp.maximum(multiplier * q_p**-0.5 * mean, LEAST_STEP).astype(x.dtype)
