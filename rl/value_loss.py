"""Reading a value out of logits, and the cross-entropy that trains them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arrays import at_least_float32


def expected_value(
    logits: Float[Array, "*batch bins"], support: Float[Array, " support"], *, probs: bool = False
) -> Float[Array, "*batch"]:
    r"""The mean of a distribution over a grid, $\sum_i \mathrm{softmax}(\ell)_i\, c_i$.

    Args:
      logits: $\ell$, the bins last, or probabilities. A logit of $-\infty$ is a probability of 0.
      support: $c$, bin centers or atoms; one for each bin.
      probs: whether ``logits`` are probabilities already.

    Returns:
      The means, in the dtype of ``logits`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the support has another length than the last axis of ``logits``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import atoms, expected_value
      >>> float(expected_value(jnp.array([0.0, -jnp.inf, 0.0]), atoms(0.0, 4.0, 3)))
      2.0
      >>> float(expected_value(jnp.array([0.0, 0.5, 0.5]), atoms(0.0, 4.0, 3), probs=True))
      3.0
    """
    if support.shape != logits.shape[-1:]:
        raise ValueError(f"support must have shape {logits.shape[-1:]}, one point per bin, got {support.shape}")
    logits = at_least_float32(logits)
    weights = logits if probs else jax.nn.softmax(logits, axis=-1)
    return jnp.sum(weights * jnp.asarray(support, logits.dtype), axis=-1)


def categorical_td_loss(
    logits: Float[Array, "*batch bins"], target_probs: Float[Array, "*batch target_bins"]
) -> Float[Array, "*batch"]:
    r"""The cross-entropy of a categorical target, $-\sum_i p_i\log\mathrm{softmax}(\ell)_i$.

    No gradient flows into the target; the one with respect to the logits is $\mathrm{softmax}(\ell) - p$, whose
    $\ell_1$ norm is at most 2 however far off the target is. The least loss is the entropy of $p$, not 0. A logit of
    $-\infty$ where $p_i = 0$ contributes 0.

    Args:
      logits: $\ell$, the bins last.
      target_probs: $p$, of the same shape.

    Returns:
      The loss of each example, in the dtype of ``logits`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import categorical_td_loss
      >>> logits, probs = jnp.zeros(4), jnp.array([0.0, 0.5, 0.5, 0.0])
      >>> f"{categorical_td_loss(logits, probs):.4f}"  # log 4
      '1.3863'
      >>> jax.grad(categorical_td_loss)(logits, probs).tolist()
      [0.25, -0.25, -0.25, 0.25]

    References:
      Farebrother et al., Stop Regressing, https://arxiv.org/abs/2403.03950.
    """
    if logits.shape != target_probs.shape:
        raise ValueError(f"target_probs must have the shape {logits.shape} of logits, got {target_probs.shape}")
    logits = at_least_float32(logits)
    p = jax.lax.stop_gradient(jnp.asarray(target_probs, logits.dtype))
    absent = p == 0  # and not p > 0, which would hide NaN
    log_probs = jnp.where(absent, 0, jax.nn.log_softmax(logits, axis=-1))
    return -jnp.sum(p * log_probs, axis=-1)
