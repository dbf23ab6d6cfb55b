"""From a language model's logits to log-probabilities and divergences of single tokens and of sequences."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from poise.core.arrays import at_least_float32


def as_mask(name: str, mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask of 0 and 1 as booleans; raises unless it has the shape."""
    if mask.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {mask.shape}")
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise TypeError(f"{name} must be boolean or integer, got {mask.dtype}")
    return mask.astype(bool)


def _visible(logits: Array, mask: Array | None) -> Array:
    """The logits, wide enough for sums; those of masked positions become 0, so that no gradient meets a NaN there."""
    logits = at_least_float32(logits)
    if mask is None:
        return logits
    return jnp.where(as_mask("mask", mask, logits.shape[:-1])[..., None], logits, 0)


def token_logprobs(
    logits: Float[Array, "*batch tokens vocab"],
    labels: Shaped[Array, "*labels"],
    mask: Shaped[Array, "*mask"] | None = None,
) -> Float[Array, "*batch tokens"]:
    r"""The log-probability of each token, $\log\mathrm{softmax}(\ell_t)_{y_t}$.

    The logits of position ``t`` must be those that predict ``labels[t]``: for a decoder that sees ``tokens``, its
    outputs ``[:, :-1]`` and ``tokens[:, 1:]``.

    Args:
      logits: $\ell$, the vocabulary last.
      labels: $y$, integers below the size of the vocabulary.
      mask: 1 for the tokens that count; None for all. Others give 0, whatever their logits and labels are.

    Returns:
      Log-probabilities, in the dtype of ``logits`` (float32 for bfloat16 and float16).

    Raises:
      TypeError: if the labels are no integers or the mask is floating.
      ValueError: if the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import token_logprobs
      >>> logits = jnp.log(jnp.array([[0.5, 0.5], [0.25, 0.75]]))
      >>> [f"{p:.2f}" for p in jnp.exp(token_logprobs(logits, jnp.array([0, 1])))]
      ['0.50', '0.75']
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels must have shape {logits.shape[:-1]}, got {labels.shape}")
    log_probs = jax.nn.log_softmax(_visible(logits, mask), axis=-1)
    labels = labels if mask is None else jnp.where(mask.astype(bool), labels, 0)  # -100 is a common padding
    chosen = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
    return chosen if mask is None else jnp.where(mask.astype(bool), chosen, 0)


def token_forward_kl(
    policy_logits: Float[Array, "*batch tokens vocab"],
    ref_logits: Float[Array, "*ref_batch ref_tokens ref_vocab"],
    mask: Shaped[Array, "*mask"] | None = None,
) -> Float[Array, "*batch tokens"]:
    r"""How far the policy is from the reference at each position, $\sum_v\rho_v(\log\rho_v-\log\pi_v) \ge 0$.

    This is the forward divergence $KL(\rho\|\pi)$ over the whole vocabulary. A token that the reference excludes
    contributes 0; one that only the policy excludes makes it infinite.

    Args:
      policy_logits: those of $\pi$, the vocabulary last.
      ref_logits: those of $\rho$, of the same shape.
      mask: 1 for the positions that count; None for all. Others give 0.

    Returns:
      Divergences, in the wider dtype of the logits, at least float32. Gradients flow into both.

    Raises:
      TypeError: if the mask is floating.
      ValueError: if the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import token_forward_kl
      >>> kl = token_forward_kl(jnp.log(jnp.array([[0.25, 0.75]])), jnp.log(jnp.array([[0.5, 0.5]])))
      >>> f"{kl[0]:.4f}"  # log 2 - log(3) / 2
      '0.1438'
    """
    if ref_logits.shape != policy_logits.shape:
        raise ValueError(f"ref_logits must have the shape {policy_logits.shape}, got {ref_logits.shape}")
    log_pi = jax.nn.log_softmax(_visible(policy_logits, mask), axis=-1)
    log_rho = jax.nn.log_softmax(_visible(ref_logits, mask), axis=-1)
    present = log_rho > -jnp.inf
    gap = jnp.where(present, log_rho, 0) - jnp.where(present, log_pi, 0)
    kl = jnp.sum(jnp.exp(log_rho) * gap, axis=-1)
    return kl if mask is None else jnp.where(mask.astype(bool), kl, 0)


def sequence_logprob(
    logps: Float[Array, "*batch tokens"], mask: Shaped[Array, "*mask"], *, length_normalize: bool = False
) -> Float[Array, "*batch"]:
    r"""The log-likelihood of a sequence, $\sum_t l_t\log\pi(y_t)$, or that divided by the number of tokens.

    Args:
      logps: of each token, from :func:`token_logprobs`.
      mask: $l$, 1 for the tokens that count.
      length_normalize: whether to divide by $\sum_tl_t$.

    Returns:
      One number per sequence, in the dtype of ``logps`` (float32 for bfloat16 and float16); 0 if no token counts.

    Raises:
      TypeError: if the mask is floating.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import sequence_logprob
      >>> logps, mask = jnp.array([[-1.0, -3.0, -9.0]]), jnp.array([[1, 1, 0]])
      >>> float(sequence_logprob(logps, mask)[0]), float(sequence_logprob(logps, mask, length_normalize=True)[0])
      (-4.0, -2.0)
    """
    mask = as_mask("mask", mask, logps.shape)
    logps = at_least_float32(logps)
    total = jnp.sum(jnp.where(mask, logps, 0), axis=-1)
    return total / token_count(mask, total.dtype) if length_normalize else total


def token_count(mask: Bool[Array, "*batch tokens"], dtype: jnp.dtype) -> Array:
    """How many tokens count, at least 1, so that it can be divided by."""
    return jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(dtype)
