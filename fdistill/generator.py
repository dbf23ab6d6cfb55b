"""Images from a diffusion network: one network evaluation, or the probability-flow ODE."""

from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core import Microbatched
from poise.fdistill.edm import karras_sigmas
from poise.fdistill.sampler import heun_sampler


def one_step(
    net: nn.Module | Microbatched,
    variables: Any,
    latents: Float[Array, "batch *event"],
    labels: Array | None = None,
    *,
    sigma_init: float = 80.0,
    train: bool = False,
    rngs: Any = None,
) -> Float[Array, "batch *event"]:
    r"""Draws images with one evaluation: $x = D(\sigma_\mathrm{init} z, \sigma_\mathrm{init})$.

    Args:
      net: a denoiser, called as ``net.apply(variables, x, sigma, labels)``.
      variables: its variables; those of a distilled student, or of a teacher "cut to one step".
      latents: unit normal noise $z$.
      labels: ``[batch]`` integers or ``[batch, classes]``, for a conditional network.
      sigma_init: the noise level at which the network is called.
      train: whether dropout is on.
      rngs: Flax's random streams, for dropout.

    Returns:
      Images, of the shape of ``latents``.

    Example:
      >>> import functools, jax
      >>> from poise.fdistill import one_step
      >>> from poise.nets import EDMPrecond, SongUNet
      >>> net = EDMPrecond(SongUNet(8, 1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()))
      >>> z = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> variables = jax.eval_shape(net.init, jax.random.key(1), z, jax.numpy.ones(2))
      >>> jax.eval_shape(functools.partial(one_step, net), variables, z).shape  # traced only
      (2, 8, 8, 1)
    """
    sigma = jnp.full((latents.shape[0],), sigma_init, latents.dtype)
    return cast(Any, net).apply(variables, sigma_init * latents, sigma, labels, train=train, rngs=rngs)


def many_steps(
    net: nn.Module | Microbatched,
    variables: Any,
    latents: Float[Array, "batch *event"],
    labels: Array | None = None,
    *,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Float[Array, "batch *event"]:
    """Draws images by Heun's method on the probability-flow ODE: ``2 * num_steps - 1`` network evaluations.

    Args:
      net: a denoiser, called as ``net.apply(variables, x, sigma, labels)``.
      variables: its variables.
      latents: unit normal noise.
      labels: ``[batch]`` integers or ``[batch, classes]``, for a conditional network.
      num_steps: steps of the sampler, at least 2.
      sigma_min: the last noise level before 0.
      sigma_max: the first noise level.
      rho: the curvature of the grid, see :func:`poise.fdistill.karras_sigmas`.

    Returns:
      Images, of the shape of ``latents``.

    Example:
      >>> import functools, jax
      >>> from poise.fdistill import many_steps
      >>> from poise.nets import EDMPrecond, SongUNet
      >>> net = EDMPrecond(SongUNet(8, 1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()))
      >>> z = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> variables = jax.eval_shape(net.init, jax.random.key(1), z, jax.numpy.ones(2))
      >>> jax.eval_shape(functools.partial(many_steps, net, num_steps=4), variables, z).shape  # traced only
      (2, 8, 8, 1)
    """
    sigmas = karras_sigmas(num_steps, sigma_min, sigma_max, rho)
    return heun_sampler(lambda x, sigma: cast(Any, net).apply(variables, x, sigma, labels), latents, sigmas)
