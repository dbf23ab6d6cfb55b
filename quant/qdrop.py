"""QDrop: quantized activations at random."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from poise.core.arguments import check_range


def qdrop(
    key: PRNGKeyArray, x: Float[Array, "..."], x_quant: Float[Array, "..."], p: ArrayLike = 0.5
) -> Float[Array, "..."]:
    """Mixes activations with quantized ones, entry by entry.

    During reconstruction this makes the loss flat in more directions than those of the quantized activations alone.

    Args:
      key: a random key.
      x: float activations.
      x_quant: quantized ones, of the same shape.
      p: the probability of a quantized entry.

    Returns:
      The mixture, in the dtype of ``x``.

    Raises:
      ValueError: if ``p`` is outside of [0, 1] or the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import qdrop
      >>> mixed = qdrop(jax.random.key(0), jnp.zeros(1000), jnp.ones(1000))
      >>> 0.4 < float(mixed.mean()) < 0.6
      True

    References:
      *QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization*,
      https://arxiv.org/abs/2203.05740.
    """
    check_range("p", p, 0.0, 1.0)
    if x.shape != x_quant.shape:
        raise ValueError(f"x_quant must have the shape of x, {x.shape}, got {x_quant.shape}")
    return jnp.where(jax.random.bernoulli(key, p, x.shape), x_quant.astype(x.dtype), x)
