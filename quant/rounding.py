"""Rounding, clamping and scaling with the gradients that quantization-aware training gives them."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Shaped

from poise.core.arguments import concrete
from poise.quant.checks import as_floats


@jax.custom_jvp
def _round(x: Array) -> Array:
    return jnp.round(x)


@_round.defjvp
def _(primals, tangents):
    return _round(*primals), tangents[0]


@jax.custom_jvp
def _clamp(x: Array, lo: Array, hi: Array) -> Array:
    return jnp.clip(x, lo, hi)


@_clamp.defjvp
def _(primals, tangents):
    x, lo, hi = primals
    inside = (x >= lo) & (x <= hi)
    out = _clamp(x, lo, hi)
    return out, jnp.broadcast_to(jnp.where(inside, tangents[0], jnp.zeros_like(tangents[0])), out.shape)


@jax.custom_jvp
def _scale_gradient(x: Array, c: Array) -> Array:
    del c
    return x


@_scale_gradient.defjvp
def _(primals, tangents):
    return _scale_gradient(*primals), tangents[0] * primals[1]


def round_ste(x: Shaped[ArrayLike, "*shape"]) -> Array:
    r"""Rounds half to even; the derivative is that of the identity.

    Args:
      x: floats of any shape.

    Returns:
      $\mathrm{round}(x)$ in the shape and dtype of ``x``.

    Raises:
      ValueError: if ``x`` does not hold finite floats.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import round_ste
      >>> x = jnp.array([-0.5, 0.4, 1.5, 2.5])
      >>> round_ste(x).tolist(), jax.grad(lambda x: round_ste(x).sum())(x).tolist()
      ([-0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0])

    References:
      Bengio, Léonard and Courville, *Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
      Computation*, https://arxiv.org/abs/1308.3432
    """
    return _round(as_floats("x", x))


def clamp_inclusive(x: Shaped[ArrayLike, "*shape"], lo: ArrayLike, hi: ArrayLike) -> Array:
    r"""Clips to an interval; the derivative is 1 in it, its ends included, and 0 outside.

    A code that is rounded first and clipped then stands exactly on an end whenever it is saturated. ``jnp.clip`` gives
    it the derivative 1/2 and ``jax.lax.clamp`` 0, where quantization-aware training was designed for 1.

    Args:
      x: floats of any shape.
      lo: the lower end, a constant: no gradient flows into it. It broadcasts against ``x``.
      hi: the upper end, likewise.

    Returns:
      The clipped array in the dtype of ``x``.

    Raises:
      ValueError: if ``x`` does not hold finite floats, or an end that can be seen now is NaN or below the other one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import clamp_inclusive
      >>> x = jnp.array([-3.0, -2.0, 0.5, 1.0, 1.1])
      >>> clamp_inclusive(x, -2, 1).tolist(), jax.grad(lambda x: clamp_inclusive(x, -2, 1).sum())(x).tolist()
      ([-2.0, -2.0, 0.5, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 0.0])
    """
    x = as_floats("x", x)
    low, high = concrete(lo), concrete(hi)
    if low is not None and high is not None and not (low <= high).all():
        raise ValueError(f"lo must not exceed hi, got lo={lo} and hi={hi}")
    return _clamp(x, jnp.asarray(lo, x.dtype), jnp.asarray(hi, x.dtype))


def grad_scale(x: Shaped[ArrayLike, "*shape"], c: Any) -> Array:
    """Gives back ``x``, and multiplies its derivative by ``c``.

    Args:
      x: floats of any shape.
      c: a number, or an array that broadcasts to the shape of ``x``; a constant, into which no gradient flows.

    Returns:
      ``x``.

    Raises:
      ValueError: if ``x`` does not hold finite floats, or ``c`` would enlarge it.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import grad_scale
      >>> [float(a) for a in jax.value_and_grad(lambda x: grad_scale(x, 0.5))(jnp.array(3.0))]
      [3.0, 0.5]
    """
    x = as_floats("x", x)
    c = jnp.asarray(c, x.dtype)
    if jnp.broadcast_shapes(c.shape, x.shape) != x.shape:
        raise ValueError(f"c must broadcast to the shape {x.shape}, got {c.shape}")
    return _scale_gradient(x, c)
