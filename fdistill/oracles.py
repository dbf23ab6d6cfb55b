"""Exact answers in the place of learned ones."""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, PyTree


class Oracles(NamedTuple):
    """Functions that :func:`poise.fdistill.f_distill` asks instead of its networks.

    On distributions that are known in closed form they give what the networks can only estimate, so that each learned
    part can be judged alone; an exact teacher needs no training. All take noisy images ``x_t`` ``[B, ...]``, noise
    levels ``[B]`` and labels (None without classes). No gradient passes through them.

    Attributes:
      teacher: ``(x_t, sigma, labels) -> [B, ...]``, the teacher's denoised images.
      fake: ``(params, x_t, sigma, labels) -> [B, ...]``, the student's denoised images; ``params`` are the student's
        parameters. The fake score isn't trained then.
      log_ratio: ``(params, x_t, sigma, labels) -> [B]``, the log density ratio of teacher and student. The head is then
        trained only if there is an adversarial loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import GaussianMixture, Oracles
      >>> gm = GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[-2.0], [2.0]]), jnp.array([0.5, 0.5]))
      >>> oracles = Oracles(teacher=lambda x, sigma, labels: gm.denoise(x, sigma))
      >>> oracles.teacher(jnp.array([[2.5]]), jnp.array([0.5]), None).round(3).tolist()
      [[2.25]]
    """

    teacher: Callable[[Array, Array, Array | None], Array] | None = None
    fake: Callable[[PyTree, Array, Array, Array | None], Array] | None = None
    log_ratio: Callable[[PyTree, Array, Array, Array | None], Array] | None = None
