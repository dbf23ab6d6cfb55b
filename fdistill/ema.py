"""Moving averages of parameters: by half-life, by a power of the step, and EDM2's reconstruction after the run."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from poise.core.arguments import check_range, is_concrete
from poise.core.arrays import at_least_float32

Numbers = np.ndarray | Array | list | tuple | float | int
Count = int | float | Int[Array, "*shape"] | Float[Array, "*shape"]


def _float(x) -> Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.result_type(float)))


def ema_decay(
    images_seen: Count,
    batch_size: int | float | Array,
    halflife: float | int | Array,
    rampup: float | int | None = 0.05,
    count_current: bool = False,
) -> Float[Array, "..."]:
    r"""The decay of a moving average with a half-life in images and a ramp-up.

    $$\beta = 2^{-B / \max(\min(H, \rho N), 10^{-8})}$$

    where $N$ counts the images before this step, so the first update copies the parameters.

    Args:
      images_seen: $N$, images that training has seen before this step.
      batch_size: $B$, images of one step.
      halflife: $H$, the half-life in images.
      rampup: $\rho$, so that early averages forget faster; None for no ramp-up.
      count_current: whether this step's images count too, as in FastGen.

    Returns:
      $\beta$ in [0, 1).

    Raises:
      ValueError: if ``batch_size``, ``halflife`` or ``rampup`` isn't positive, or ``images_seen`` is negative.

    Example:
      >>> from poise.fdistill import ema_decay
      >>> float(ema_decay(0, 512, 500_000)), float(ema_decay(10_240, 512, 500_000))
      (0.0, 0.5)

    References:
      Karras et al., https://arxiv.org/abs/2206.00364; NVlabs/edm, whose count is the default here
    """
    check_range("images_seen", images_seen, low=0.0)
    check_range("batch_size", batch_size, low=0.0, open_low=True)
    check_range("halflife", halflife, low=0.0, open_low=True)
    seen, batch = _float(images_seen), _float(batch_size)
    if count_current:
        seen = seen + batch
    span = _float(halflife)
    if rampup is not None:
        check_range("rampup", rampup, low=0.0, open_low=True)
        span = jnp.minimum(span, seen * rampup)
    return jnp.exp2(-batch / jnp.maximum(span, 1e-8))


def power_ema_decay(step: Count, gamma: float | int | Array) -> Float[Array, "..."]:
    r"""The decay $\beta_t = (1 - 1/t)^{\gamma+1}$ of an average whose weights grow as $t^\gamma$.

    Args:
      step: $t$, the step's number from 1; the first update copies the parameters.
      gamma: the exponent; :func:`std_to_exp` finds it from the width of the average.

    Returns:
      $\beta_t$ in [0, 1).

    Raises:
      ValueError: if ``step`` is below 1 or ``gamma`` isn't above -1.

    Example:
      >>> from poise.fdistill import power_ema_decay
      >>> float(power_ema_decay(1, 6.94)), float(power_ema_decay(2, 1.0))
      (0.0, 0.25)

    References:
      Karras et al., https://arxiv.org/abs/2312.02696, equation 127
    """
    check_range("step", step, low=1.0)
    check_range("gamma", gamma, low=-1.0, open_low=True)
    return _power(1.0 / _float(step), _float(gamma))


def _power(share: Array, exponent: Array) -> Array:
    """``(1 - share)^(exponent + 1)``, exact for small shares too; 0 at share 1."""
    whole = share >= 1
    return jnp.where(whole, 0.0, jnp.exp((exponent + 1.0) * jnp.log1p(-jnp.where(whole, 0.0, share))))


def update_ema(ema: PyTree, params: PyTree, decay: float | int | Float[Array, ""]) -> PyTree:
    r"""One step of a moving average, $\bar\theta \leftarrow \theta + \beta(\bar\theta - \theta)$.

    Computed in float32 at least and rounded to the average's own types, so averages of bfloat16 parameters should be
    kept in float32. Leaves of integers are copied from ``params``.

    Args:
      ema: the average.
      params: the parameters, a tree of the same structure.
      decay: $\beta$; 0 copies the parameters exactly.

    Returns:
      The new average.

    Raises:
      ValueError: if the structures differ or a concrete decay is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import update_ema
      >>> update_ema({"w": jnp.array(1.0)}, {"w": jnp.array(3.0)}, 0.75)["w"].item()
      1.5
    """
    check_range("decay", decay, low=0.0, high=1.0)

    def leaf(average, value):
        average, value = jnp.asarray(average), jnp.asarray(value)
        if not jnp.issubdtype(average.dtype, jnp.inexact):
            return value.astype(average.dtype)
        new = at_least_float32(value)
        return (new + jnp.asarray(decay, new.dtype) * (at_least_float32(average) - new)).astype(average.dtype)

    return jax.tree.map(leaf, ema, params)


def std_to_exp(std: Numbers) -> np.ndarray:
    r"""The exponent $\gamma$ of a power-function average whose profile has the relative standard deviation ``std``.

    The profile $(\gamma+1) t^\gamma / T^{\gamma+1}$ on $[0, T]$ has standard deviation $\sigma T$ with
    $\sigma^2 = \frac{\gamma+1}{(\gamma+2)^2(\gamma+3)}$; $\gamma$ is the largest real root of
    $\gamma^3 + 7\gamma^2 + (16 - \sigma^{-2})\gamma + 12 - \sigma^{-2} = 0$.

    Args:
      std: relative standard deviations, any shape, in (0, 0.2886], concrete.

    Returns:
      The exponents in float64, of the same shape. It is host arithmetic: these numbers are settled before a run.

    Raises:
      ValueError: if a value is outside the range, whose upper end $\sqrt{1/12}$ is the plain mean ($\gamma=0$).

    Example:
      >>> from poise.fdistill import std_to_exp
      >>> round(float(std_to_exp(0.10)), 4)
      6.9372

    References:
      Karras et al., https://arxiv.org/abs/2312.02696, equations 123 and 126
    """
    check_range("std", std, low=0.0, high=math.sqrt(1.0 / 12.0) * (1 + 1e-12), open_low=True)
    std = np.asarray(std, np.float64)
    inverse = std.reshape(-1) ** -2.0
    roots = [np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]) for t in inverse]
    return np.array([root.real.max() for root in roots]).reshape(std.shape)


def power_function_beta(std: Numbers, t_next: Count | np.ndarray, t_delta: int | float | Array) -> Float[Array, "..."]:
    r"""The decay of a power-function average of given width, $\beta = (1 - \Delta t/t)^{\gamma+1}$.

    Args:
      std: relative standard deviation of the average's profile, concrete.
      t_next: $t$, images seen after this step.
      t_delta: $\Delta t$, images of this step.

    Returns:
      $\beta$, broadcast over the arguments.

    Raises:
      ValueError: if ``std`` is out of range, ``t_delta`` isn't positive, or ``t_next`` is below it.

    Example:
      >>> from poise.fdistill import power_function_beta
      >>> float(power_function_beta(0.05, 512, 512))
      0.0

    References:
      Karras et al., https://arxiv.org/abs/2312.02696, equation 127
    """
    check_range("t_delta", t_delta, low=0.0, open_low=True)
    if is_concrete(t_next) and is_concrete(t_delta):
        check_range("t_next", t_next, low=float(t_delta))
    return _power(_float(t_delta) / _float(t_next), _float(std_to_exp(std)))


def _correlation(a_time, a_exp, b_time, b_exp) -> np.ndarray:
    """Inner products of the profiles of power-function averages."""
    late = np.where(a_time < b_time, b_exp, -a_exp)
    return (a_exp + 1) * (b_exp + 1) * (a_time / b_time) ** late / ((a_exp + b_exp + 1) * np.maximum(a_time, b_time))


def solve_posthoc_coefficients(
    in_ofs: Numbers,
    in_std: Numbers,
    out_ofs: Numbers,
    out_std: Numbers,
) -> np.ndarray:
    r"""Coefficients that combine stored averages into averages of other widths, after the run.

    The profile wanted is projected on the profiles of the snapshots: $X = A^{-1}B$ with the inner products $A$ among
    the snapshots and $B$ with the target, each column then scaled to sum 1. The reconstruction is
    $\sum_i X_{ij}\bar\theta_i$.

    Args:
      in_ofs: times (images or steps) of the snapshots ``[n]``.
      in_std: relative standard deviations of the snapshots' averages, ``[n]`` or one for all.
      out_ofs: times of the averages wanted ``[m]``, or one.
      out_std: their relative standard deviations.

    Returns:
      $X$ of shape ``[n, m]`` in float64; host arithmetic.

    Raises:
      ValueError: if a time isn't positive or a standard deviation is out of range.

    Example:
      A stored average is its own reconstruction:

      >>> from poise.fdistill import solve_posthoc_coefficients
      >>> abs(solve_posthoc_coefficients([500, 1000], 0.1, 1000, 0.1)).round(6).tolist()
      [[0.0], [1.0]]

    References:
      Karras et al., https://arxiv.org/abs/2312.02696, Algorithm 3
    """
    check_range("in_ofs", in_ofs, low=0.0, open_low=True)
    check_range("out_ofs", out_ofs, low=0.0, open_low=True)
    in_time, in_exp = np.broadcast_arrays(np.asarray(in_ofs, np.float64), std_to_exp(np.asarray(in_std)))
    out_time, out_exp = np.broadcast_arrays(np.asarray(out_ofs, np.float64), std_to_exp(np.asarray(out_std)))
    rows = in_time.reshape(-1, 1), in_exp.reshape(-1, 1)
    gram = _correlation(*rows, in_time.reshape(1, -1), in_exp.reshape(1, -1))
    target = _correlation(*rows, out_time.reshape(1, -1), out_exp.reshape(1, -1))
    solution = np.linalg.solve(gram, target)
    return solution / solution.sum(axis=0)


def inverse_sqrt_learning_rate(
    images_seen: Count,
    batch_size: int | float | Array,
    ref_lr: float | int = 1e-2,
    ref_batches: float | int = 70e3,
    rampup_images: float | int = 10e6,
) -> Float[Array, "..."]:
    r"""EDM2's learning rate: a linear ramp, a plateau, then decay as the inverse square root of the step.

    $$\alpha = \alpha_\mathrm{ref}\,\min(N/N_\mathrm{ramp}, 1) / \sqrt{\max(N/(B\,t_\mathrm{ref}), 1)}$$

    Args:
      images_seen: $N$.
      batch_size: $B$.
      ref_lr: $\alpha_\mathrm{ref}$.
      ref_batches: $t_\mathrm{ref}$, steps before the decay; 0 for no decay.
      rampup_images: $N_\mathrm{ramp}$; 0 for no ramp.

    Returns:
      The learning rate.

    Raises:
      ValueError: if an argument is negative or ``batch_size`` isn't positive.

    Example:
      >>> from poise.fdistill import inverse_sqrt_learning_rate
      >>> round(float(inverse_sqrt_learning_rate(5e6, 2048)), 6)
      0.005

    References:
      Karras et al., https://arxiv.org/abs/2312.02696, equation 67
    """
    check_range("images_seen", images_seen, low=0.0)
    check_range("batch_size", batch_size, low=0.0, open_low=True)
    check_range("ref_lr", ref_lr, low=0.0)
    check_range("ref_batches", ref_batches, low=0.0)
    check_range("rampup_images", rampup_images, low=0.0)
    seen = _float(images_seen)
    rate = jnp.full_like(seen, ref_lr)
    if ref_batches > 0:
        rate = rate / jnp.sqrt(jnp.maximum(seen / (batch_size * ref_batches), 1.0))
    if rampup_images > 0:
        rate = rate * jnp.minimum(seen / rampup_images, 1.0)
    return rate
