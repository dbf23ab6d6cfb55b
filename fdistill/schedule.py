"""Noise schedules of diffusion ODEs, and the discretizations that the classical formulations sample with."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from poise.core.arguments import check_choice, check_range
from poise.fdistill.edm import karras_sigmas
from poise.nets import iddpm_levels

DISCRETIZATIONS = ("edm", "vp", "ve", "iddpm")


class NoiseSchedule(NamedTuple):
    r"""A noise level $\sigma(t)$ and a scale $s(t)$ for $x_t = s(t)(x_0 + \sigma(t) n)$.

    The probability-flow ODE is $\dot x = \frac{\dot s}{s} x + \frac{\dot\sigma}{\sigma}(x - s D(x/s; \sigma))$. Like a
    divergence, the value holds functions and is static under ``jit``.

    Attributes:
      sigma: $\sigma(t)$.
      sigma_deriv: $\dot\sigma(t)$.
      sigma_inv: $t(\sigma)$.
      scale: $s(t)$.
      log_scale_deriv: $\dot s(t)/s(t)$.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import noise_schedule
      >>> ve = noise_schedule("ve")
      >>> float(ve.sigma(jnp.array(4.0))), float(ve.sigma_inv(jnp.array(2.0)))
      (2.0, 4.0)
    """

    sigma: Callable[[Array], Array]
    sigma_deriv: Callable[[Array], Array]
    sigma_inv: Callable[[Array], Array]
    scale: Callable[[Array], Array]
    log_scale_deriv: Callable[[Array], Array]


def vp_betas(sigma_min: float | int, sigma_max: float | int, epsilon_s: float = 1e-3) -> tuple[float, float]:
    r"""The VP schedule's $(\beta_d, \beta_\min)$ for which $\sigma(\epsilon_s)$ and $\sigma(1)$ are the given levels.

    Args:
      sigma_min: level at time ``epsilon_s``.
      sigma_max: level at time 1.
      epsilon_s: the earliest time.

    Returns:
      $\beta_d$ and $\beta_\min$.

    Raises:
      ValueError: if the ends aren't ``0 < sigma_min < sigma_max`` or ``epsilon_s`` isn't in (0, 1).

    Example:
      >>> import math
      >>> from poise.fdistill import vp_betas
      >>> beta_d, beta_min = vp_betas(math.sqrt(math.exp(1e-4 + 0.5 * 19.9e-6) - 1), math.sqrt(math.exp(10.05) - 1))
      >>> round(beta_d, 6), round(beta_min, 6)
      (19.9, 0.1)

    References:
      Karras et al., https://arxiv.org/abs/2206.00364; NVlabs/edm
    """
    check_range("sigma_min", sigma_min, low=0.0, open_low=True)
    check_range("sigma_max", sigma_max, low=float(sigma_min), high=math.inf, open_low=True, open_high=True)
    check_range("epsilon_s", epsilon_s, low=0.0, high=1.0, open_low=True, open_high=True)
    first, last = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2.0 * (first / epsilon_s - last) / (epsilon_s - 1.0)
    return beta_d, last - 0.5 * beta_d


def noise_schedule(
    schedule: str = "linear", scaling: str = "none", beta_d: float | int = 19.9, beta_min: float | int = 0.1
) -> NoiseSchedule:
    r"""The schedules of the EDM paper's table.

    ``linear``: $\sigma = t$ (EDM, DDIM); ``ve``: $\sigma = \sqrt t$; ``vp``:
    $\sigma = \sqrt{e^{\beta_d t^2/2 + \beta_\min t} - 1}$. Scaling ``vp``: $s = 1/\sqrt{1+\sigma^2}$.

    Args:
      schedule: ``"linear"``, ``"vp"`` or ``"ve"``.
      scaling: ``"none"`` or ``"vp"``.
      beta_d: of the VP schedule, see :func:`vp_betas`.
      beta_min: of the VP schedule.

    Returns:
      The schedule.

    Raises:
      ValueError: for unknown names.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import noise_schedule
      >>> vp = noise_schedule("vp", "vp")
      >>> bool(jnp.allclose(vp.sigma_inv(vp.sigma(jnp.array(0.3))), 0.3))
      True

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    check_choice("schedule", schedule, ("linear", "vp", "ve"))
    check_choice("scaling", scaling, ("none", "vp"))

    def vp_sigma(t):
        return jnp.sqrt(jnp.expm1(0.5 * beta_d * t**2 + beta_min * t))

    def vp_sigma_deriv(t):
        return 0.5 * (beta_min + beta_d * t) * (vp_sigma(t) + 1.0 / vp_sigma(t))

    def vp_sigma_inv(level):
        return (jnp.sqrt(beta_min**2 + 2.0 * beta_d * jnp.log1p(level**2)) - beta_min) / beta_d

    sigma, sigma_deriv, sigma_inv = {
        "linear": (jnp.asarray, jnp.ones_like, jnp.asarray),
        "ve": (jnp.sqrt, lambda t: 0.5 / jnp.sqrt(t), jnp.square),
        "vp": (vp_sigma, vp_sigma_deriv, vp_sigma_inv),
    }[schedule]
    if scaling == "none":
        return NoiseSchedule(sigma, sigma_deriv, sigma_inv, jnp.ones_like, jnp.zeros_like)
    return NoiseSchedule(
        sigma,
        sigma_deriv,
        sigma_inv,
        lambda t: jax.lax.rsqrt(1.0 + sigma(t) ** 2),
        lambda t: -sigma(t) * sigma_deriv(t) / (1.0 + sigma(t) ** 2),
    )


def sigma_steps(
    discretization: str,
    num: int,
    sigma_min: float | int | None = None,
    sigma_max: float | int | None = None,
    rho: float | int = 7.0,
    epsilon_s: float = 1e-3,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, " {num}"]:
    r"""Descending noise levels of the four formulations, without the final 0.

    ``edm``: :func:`karras_sigmas`; ``vp``: evenly spaced times from 1 to $\epsilon_s$; ``ve``: geometric; ``iddpm``:
    evenly spaced places among improved DDPM's levels.

    Args:
      discretization: ``"edm"``, ``"vp"``, ``"ve"`` or ``"iddpm"``.
      num: how many levels, at least 2.
      sigma_min: the lowest level; by default .002 (edm, iddpm), .02 (ve), or $\sigma(\epsilon_s)$ for
        $\beta_d = 19.9$ (vp).
      sigma_max: the highest; by default 80 (edm), 81 (iddpm), 100 (ve), or $\sigma(1)$ (vp).
      rho: the curvature, for ``edm``.
      epsilon_s: the earliest time, for ``vp``.
      dtype: the type wanted; by default jax's default float.

    Returns:
      The levels, evaluated in float64 and then rounded.

    Raises:
      ValueError: for an unknown name, ``num`` below 2 or above improved DDPM's number of levels in the range, or ends
        that aren't ``0 < sigma_min < sigma_max``.

    Example:
      >>> from poise.fdistill import sigma_steps
      >>> [round(x, 3) for x in sigma_steps("ve", 3).tolist()]
      [100.0, 1.414, 0.02]

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, Table 1; NVlabs/edm
    """
    check_choice("discretization", discretization, DISCRETIZATIONS)
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    vp_default = [math.sqrt(math.expm1(0.5 * 19.9 * t**2 + 0.1 * t)) for t in (epsilon_s, 1.0)]
    low, high = {"edm": (0.002, 80.0), "vp": vp_default, "ve": (0.02, 100.0), "iddpm": (0.002, 81.0)}[discretization]
    low = low if sigma_min is None else float(sigma_min)
    high = high if sigma_max is None else float(sigma_max)
    dtype = jnp.result_type(float) if dtype is None else dtype
    if discretization == "edm":
        return karras_sigmas(num, low, high, rho, dtype)
    beta_d, beta_min = vp_betas(low, high, epsilon_s)
    place = np.arange(num) / (num - 1)
    if discretization == "vp":
        t = 1.0 + place * (epsilon_s - 1.0)
        levels = np.sqrt(np.expm1(0.5 * beta_d * t**2 + beta_min * t))
    elif discretization == "ve":
        levels = high * (low / high) ** place
    else:
        levels = iddpm_levels()
        levels = levels[(levels >= low) & (levels <= high)]
        if num > len(levels):
            raise ValueError(f"num must be at most {len(levels)}, the levels from {low} to {high}, got {num}")
        levels = levels[np.round((len(levels) - 1) * place).astype(int)]
    return jnp.asarray(levels, dtype)
