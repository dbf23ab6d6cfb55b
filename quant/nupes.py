"""NUPES: codes and exponent of a power quantizer, learned by gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.quant.checks import Axis
from poise.quant.power import (
    check_exponent,
    largest_magnitude,
    power_latent,
    power_levels,
    power_search,
    power_values,
)
from poise.quant.rounding import clamp_inclusive, round_ste

LEAST, GREATEST = 0.2, 1.2


class NupesParams(NamedTuple):
    r"""What NUPES learns.

    Attributes:
      codes: the latent codes $\omega$, of the weights' shape, not rounded.
      rho: $\rho$, of the exponent $a = 0.2 + \sigma(\rho)$; a scalar.
      log_gain: the logarithm of a factor on the scale, shaped like it; 0 unless it is learned too.
      scale: $m$, fixed.
    """

    codes: Array
    rho: Array
    log_gain: Array
    scale: Array


def soft_round(x: Float[Array, "..."], beta: ArrayLike) -> Float[Array, "..."]:
    r"""A staircase from the identity ($\beta \to 0$) to rounding ($\beta \to \infty$).

    $$\lfloor x\rfloor + \tfrac12 + \tfrac12\,\frac{\tanh(\beta(x - \lfloor x\rfloor - \frac12))}{\tanh(\beta/2)}.$$

    It is continuous and rises everywhere, and leaves integers where they are.

    Args:
      x: numbers.
      beta: the sharpness, not negative; below 0.001 the identity is returned.

    Returns:
      Numbers of the same shape and dtype.

    Raises:
      ValueError: if ``beta`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import soft_round
      >>> x = jnp.array([0.0, 0.4, 1.75])
      >>> soft_round(x, 0.0).tolist() == x.tolist(), soft_round(x, 200.0).round(6).tolist()
      (True, [0.0, 0.0, 2.0])
    """
    check_range("beta", beta, 0.0)
    beta = jnp.asarray(beta, x.dtype)
    sharp = beta > 1e-3
    safe = jnp.where(sharp, beta, 1.0)
    whole = jax.lax.stop_gradient(jnp.floor(x))
    stairs = whole + 0.5 + 0.5 * jnp.tanh(safe * (x - whole - 0.5)) / jnp.tanh(safe / 2)
    return jnp.where(sharp, stairs, x)


def nupes_init(w: Float[Array, "..."], *, bits: int, axis: Axis, exponent: ArrayLike | None = None) -> NupesParams:
    r"""Latent codes that stand for the weights themselves, $\omega_0 = \mathrm{sign}(w)\,N(|w|/m)^a$.

    Args:
      w: weights.
      bits: from 2 to 8.
      axis: the axes that share a scale; None for all.
      exponent: $a$, moved into [0.201, 1.199] if it lies outside; None for that of :func:`power_search`.

    Returns:
      Parameters in at least float32.

    Raises:
      ValueError: if ``w`` is empty or holds no finite floats, or ``bits``, an axis or ``exponent`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import nupes_init, nupes_soft
      >>> w = jnp.array([0.3, -1.0, 0.05])
      >>> params = nupes_init(w, bits=4, axis=None, exponent=0.5)
      >>> [round(float(x), 5) for x in nupes_soft(params, 0.0, bits=4)]
      [0.3, -1.0, 0.05]

    References:
      *NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search*, https://arxiv.org/abs/2308.05600. There
      is no official code; the schedules here are this library's.
    """
    scale = at_least_float32(largest_magnitude(w, axis))
    wide = at_least_float32(w)
    a = power_search(wide, bits=bits, axis=axis) if exponent is None else exponent
    check_exponent(a)
    part = jnp.clip((jnp.asarray(a, wide.dtype) - LEAST) / (GREATEST - LEAST), 1e-3, 1 - 1e-3)
    rho = jnp.log(part) - jnp.log1p(-part)
    codes = power_latent(wide, scale, _exponent(rho), power_levels(bits))
    return NupesParams(codes, rho, jnp.zeros_like(scale), scale)


def nupes_exponent(params: NupesParams) -> Float[Array, ""]:
    r"""The exponent $a = 0.2 + \sigma(\rho)$.

    Args:
      params: of :func:`nupes_init`, or trained from there.

    Returns:
      A scalar in [0.2, 1.2].

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import nupes_exponent, nupes_init
      >>> round(float(nupes_exponent(nupes_init(jnp.ones(3), bits=4, axis=None, exponent=0.5))), 5)
      0.5
    """
    return _exponent(params.rho)


def nupes_soft(params: NupesParams, beta: ArrayLike, *, bits: int) -> Float[Array, "..."]:
    r"""Weights on the way to being rounded.

    $\hat w = \mathrm{sign}(\tilde c)\,m\,(|\tilde c|/N)^{1/a}$ with
    $\tilde c = \mathrm{softround}_\beta(\mathrm{clip}(\omega, -N, N))$. Codes may cross any number of levels.
    $|w|^a$, with its infinite slope at zero, is never differentiated.

    Args:
      params: the parameters.
      beta: the sharpness of :func:`soft_round`; 0 for no rounding at all.
      bits: from 2 to 8.

    Returns:
      Weights.

    Raises:
      ValueError: if ``bits`` is out of range or ``beta`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import nupes_hard, nupes_init, nupes_soft
      >>> params = nupes_init(jnp.array([0.3, -1.0, 0.05]), bits=4, axis=None, exponent=0.5)
      >>> bool(jnp.allclose(nupes_soft(params, 500.0, bits=4), nupes_hard(params, bits=4)))
      True
    """
    levels = power_levels(bits)
    codes = soft_round(clamp_inclusive(params.codes, -levels, levels), beta)
    return power_values(codes, nupes_exponent(params), levels) * _scale(params)


def nupes_hard(params: NupesParams, *, bits: int) -> Float[Array, "..."]:
    """Rounded weights; the gradient passes the rounding straight through.

    Args:
      params: the parameters.
      bits: from 2 to 8.

    Returns:
      Weights.

    Raises:
      ValueError: if ``bits`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import nupes_hard, nupes_init
      >>> params = nupes_init(jnp.array([1.0, -1.0, 0.0]), bits=4, axis=None)
      >>> nupes_hard(params, bits=4).tolist()
      [1.0, -1.0, 0.0]
    """
    levels = power_levels(bits)
    codes = round_ste(clamp_inclusive(params.codes, -levels, levels))
    return power_values(codes, nupes_exponent(params), levels) * _scale(params)


def nupes_codes(params: NupesParams, *, bits: int) -> tuple[Array, Array, Array]:
    """What :func:`power_dequantize` makes the weights of :func:`nupes_hard` from.

    Args:
      params: the trained parameters.
      bits: from 2 to 8.

    Returns:
      int8 codes, the scale and the exponent.

    Raises:
      ValueError: if ``bits`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import nupes_codes, nupes_init
      >>> nupes_codes(nupes_init(jnp.array([1.0, -0.25]), bits=4, axis=None, exponent=0.5), bits=4)[0].tolist()
      [7, -4]
    """
    levels = power_levels(bits)
    codes = jnp.round(jnp.clip(params.codes, -levels, levels)).astype(jnp.int8)
    return codes, _scale(params), nupes_exponent(params)


def nupes_beta(step: ArrayLike, total: int, start: float | int = 1.0, end: float | int = 40.0) -> Float[Array, ""]:
    """The sharpness at step 1 to ``total``, rising geometrically.

    Args:
      step: the step.
      total: the number of steps.
      start: the sharpness at step 0.
      end: the sharpness at the last step.

    Returns:
      A float32 scalar.

    Example:
      >>> from poise.quant import nupes_beta
      >>> float(nupes_beta(100, 100, 1.0, 64.0)), float(nupes_beta(50, 100, 1.0, 64.0))
      (64.0, 8.0)
    """
    check_range("start", start, 0.0, open_low=True)
    check_range("end", end, 0.0, open_low=True)
    return start * jnp.asarray(end / start, jnp.float32) ** (jnp.asarray(step, jnp.float32) / total)


def _exponent(rho: Array) -> Array:
    return LEAST + (GREATEST - LEAST) * jax.nn.sigmoid(rho)


def _scale(params: NupesParams) -> Array:
    return params.scale * jnp.exp(params.log_gain)
