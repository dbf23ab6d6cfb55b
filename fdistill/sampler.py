"""Samplers that solve a diffusion model's ODE or SDE with one ``lax.scan``."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from poise.core import fold_in_examples
from poise.core.arguments import check_choice, check_range, is_concrete
from poise.fdistill.schedule import NoiseSchedule, noise_schedule

Denoise = Callable[[Array, Array], Array]


class ChurnConfig(NamedTuple):
    r"""How much noise a stochastic sampler adds back before each step.

    Attributes:
      s_churn: overall amount; a step raises its level by $\gamma = \min(S_\mathrm{churn}/n, \sqrt2 - 1)$. 0 is the
        deterministic sampler.
      s_min: lowest level at which noise is added.
      s_max: highest.
      s_noise: standard deviation of the added noise, a little above 1 makes up for lost detail.

    Example:
      EDM's setting for ImageNet-64 with 256 steps:

      >>> from poise.fdistill import ChurnConfig
      >>> ChurnConfig(s_churn=40, s_min=0.05, s_max=50, s_noise=1.003).s_churn
      40
    """

    s_churn: float | int = 0.0
    s_min: float | int = 0.0
    s_max: float | int = math.inf
    s_noise: float | int = 1.0


class _Step(NamedTuple):
    index: Array
    now: Array
    next: Array
    noise: Array | None


def _check(latents: Array, sigmas: Array, key, noise, churn: ChurnConfig) -> None:
    if jnp.ndim(sigmas) != 1 or jnp.shape(sigmas)[0] < 2:
        raise ValueError(f"sigmas must have shape [steps] with at least 2 steps, got {jnp.shape(sigmas)}")
    if is_concrete(sigmas):
        levels = np.asarray(sigmas, np.float64)
        if not (np.all(levels > 0) and np.all(np.diff(levels) < 0) and np.isfinite(levels[0])):
            raise ValueError("sigmas must be positive, finite and strictly descending, without the final 0")
    check_range("churn.s_churn", churn.s_churn, low=0.0)
    check_range("churn.s_noise", churn.s_noise, low=0.0)
    check_range("churn.s_min", churn.s_min, low=0.0)
    check_range("churn.s_max", churn.s_max, low=0.0)
    if is_concrete(churn.s_churn) and churn.s_churn == 0:
        return
    if key is None and noise is None:
        raise ValueError("key (or noise) must be given with churn, got neither")
    if noise is not None and jnp.shape(noise) != (jnp.shape(sigmas)[0], *jnp.shape(latents)):
        raise ValueError(
            f"noise must have shape [steps, *latents.shape] = {(jnp.shape(sigmas)[0], *jnp.shape(latents))}, "
            f"got {jnp.shape(noise)}"
        )


def heun_sampler(
    denoise: Denoise,
    latents: Float[Array, "batch *event"],
    sigmas: Float[Array, " steps"],
    *,
    key: PRNGKeyArray | None = None,
    churn: ChurnConfig = ChurnConfig(),  # noqa: B008
    noise: Float[Array, "steps batch *event"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch *event"]:
    r"""EDM's sampler: Heun's second-order method on $\dot x = (x - D(x;\sigma))/\sigma$, with optional churn.

    Starts from $x = \sigma_0 z$. Each step raises the level to $\hat\sigma = (1+\gamma)\sigma_i$ by fresh noise, takes
    an Euler step to $\sigma_{i+1}$, and averages the slope with the one found there. The last step goes to level 0 by
    Euler alone, so there are $2n - 1$ evaluations of the denoiser.

    Args:
      denoise: $D$, called with ``x`` and levels ``[batch]`` of the latents' type; gives clean images.
      latents: unit normal noise; its type is the type of the computation (float32 or float64).
      sigmas: $n$ descending positive levels, without the final 0, such as :func:`karras_sigmas`.
      key: a random key, needed with churn. Every example has its own stream, see
        :func:`poise.core.fold_in_examples`.
      churn: how much noise is added back; nothing by default.
      noise: standard normal noise of every step instead of the key's.
      axis_name: the mapped device axis over which the batch is spread, or None.

    Returns:
      Samples, of the shape and type of ``latents``.

    Raises:
      ValueError: if ``sigmas`` isn't descending and positive with at least 2 levels, if churn comes without key or
        noise, or a churn setting is negative.

    Example:
      Data that is all at 3:

      >>> import jax, jax.numpy as jnp
      >>> from poise.fdistill import heun_sampler, karras_sigmas
      >>> z = jax.random.normal(jax.random.key(0), (2, 4))
      >>> x = heun_sampler(lambda x, sigma: jnp.full_like(x, 3.0), z, karras_sigmas(18))
      >>> bool(jnp.allclose(x, 3.0, atol=1e-3))
      True

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, Algorithms 1 and 2. NVlabs/edm computes in float64; here the
      latents' type decides.
    """
    return ablation_sampler(denoise, latents, sigmas, key=key, churn=churn, noise=noise, axis_name=axis_name)


def ablation_sampler(
    denoise: Denoise,
    latents: Float[Array, "batch *event"],
    sigmas: Float[Array, " steps"],
    *,
    schedule: NoiseSchedule | None = None,
    solver: str = "heun",
    alpha: float | int = 1.0,
    key: PRNGKeyArray | None = None,
    churn: ChurnConfig = ChurnConfig(),  # noqa: B008
    noise: Float[Array, "steps batch *event"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch *event"]:
    r"""The same over any noise schedule and scaling, with Euler's or any second-order two-stage method.

    The ODE is $\dot x = \frac{\dot s}{s}x + \frac{\dot\sigma}{\sigma}(x - sD(x/s;\sigma))$ in the schedule's time.

    Args:
      denoise: as for :func:`heun_sampler`.
      latents: as for :func:`heun_sampler`.
      sigmas: as for :func:`heun_sampler`; see :func:`sigma_steps`.
      schedule: from :func:`noise_schedule`; by default EDM's, $\sigma = t$ and $s = 1$.
      solver: ``"heun"`` or ``"euler"``.
      alpha: place of the second stage in the step: 1 is Heun's method, 1/2 the midpoint method, 2/3 Ralston's.
      key: as for :func:`heun_sampler`.
      churn: as for :func:`heun_sampler`.
      noise: as for :func:`heun_sampler`.
      axis_name: as for :func:`heun_sampler`.

    Returns:
      Samples, of the shape and type of ``latents``.

    Raises:
      ValueError: as :func:`heun_sampler`, for an unknown solver, or ``alpha`` outside (0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.fdistill import ablation_sampler, noise_schedule, sigma_steps
      >>> z = jax.random.normal(jax.random.key(0), (2, 4))
      >>> ablation_sampler(
      ...     lambda x, sigma: 0 * x, z, sigma_steps("ve", 8), schedule=noise_schedule("ve"), solver="euler"
      ... ).shape
      (2, 4)

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, Algorithm 3 and Table 1
    """
    _check(latents, sigmas, key, noise, churn)
    check_choice("solver", solver, ("heun", "euler"))
    check_range("alpha", alpha, low=0.0, high=1.0, open_low=True)
    curve: NoiseSchedule = noise_schedule() if schedule is None else schedule
    dtype = latents.dtype
    num_steps, batch = sigmas.shape[0], latents.shape[0]
    stochastic = not (is_concrete(churn.s_churn) and churn.s_churn == 0)
    times = curve.sigma_inv(sigmas.astype(dtype))

    def slope(x, t):
        sigma, scale = curve.sigma(t), curve.scale(t)
        denoised = denoise(x / scale, jnp.broadcast_to(sigma, (batch,))).astype(dtype)
        return curve.log_scale_deriv(t) * x + curve.sigma_deriv(t) / sigma * (x - scale * denoised)

    def add_noise(x, step: _Step):
        """To a higher level, if there is churn at this one."""
        if not stochastic:
            return x, step.now
        sigma = curve.sigma(step.now)
        gamma = jnp.minimum(churn.s_churn / num_steps, math.sqrt(2.0) - 1.0)
        gamma = jnp.where((churn.s_min <= sigma) & (sigma <= churn.s_max), gamma, 0.0).astype(dtype)
        raised = sigma + gamma * sigma
        t = jnp.where(gamma > 0, curve.sigma_inv(raised), step.now)
        if step.noise is not None:
            fresh = step.noise.astype(dtype)
        else:
            assert key is not None  # checked above
            keys = fold_in_examples(jax.random.fold_in(key, step.index), batch, axis_name)
            fresh = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:], dtype))(keys)
        # sigma_hat^2 - sigma^2 without the cancellation of the difference
        spread = sigma * jnp.sqrt(gamma * (2.0 + gamma)) * churn.s_noise
        scale = curve.scale(t)
        return scale / curve.scale(step.now) * x + spread * scale * fresh, t

    def advance(x, step: _Step):
        x, t = add_noise(x, step)
        h = step.next - t
        first = slope(x, t)
        if solver == "euler":
            return x + h * first, None
        second = slope(x + alpha * h * first, t + alpha * h)
        return x + h * ((1.0 - 0.5 / alpha) * first + 0.5 / alpha * second), None

    steps = _Step(jnp.arange(num_steps), times, jnp.append(times[1:], jnp.zeros((), dtype)), noise)
    x = latents * (curve.sigma(times[0]) * curve.scale(times[0]))
    x, _ = jax.lax.scan(advance, x, jax.tree.map(lambda a: a[:-1], steps))
    last = jax.tree.map(lambda a: a[-1], steps)
    x, t = add_noise(x, last)
    return x + (last.next - t) * slope(x, t)
