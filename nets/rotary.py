"""Rotary position embedding."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from poise.core.arguments import check_range


def rotary_embedding(
    x: Float[Array, "*batch length heads width"], positions: Int[Array, "*batch length"], base: float = 10_000.0
) -> Float[Array, "*batch length heads width"]:
    r"""Turns pairs of a query's or key's entries by angles that grow with the position.

    The entries $i$ and $i + d/2$ are turned by $t\,b^{-2i/d}$ at position $t$, so that an inner product of a query
    and a key depends on their distance alone, and lengths stay as they are.

    Args:
      x: queries or keys; the width is even.
      positions: $t$, one per entry of the length.
      base: $b > 0$; the larger, the longer the distances that the slowest pair can tell apart.

    Returns:
      An array like x; angles are computed in at least float32.

    Raises:
      ValueError: if the width is odd or ``base`` not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import rotary_embedding
      >>> x = jnp.ones((4, 1, 2))
      >>> turned = rotary_embedding(x, jnp.arange(4))
      >>> bool(jnp.allclose(turned[1, 0] @ turned[3, 0], turned[0, 0] @ turned[2, 0]))
      True

    References:
      Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, https://arxiv.org/abs/2104.09864.
      Pairs are halves of the width, as in most later code, where the paper takes neighbours.
    """
    check_range("base", base, 0.0, open_low=True)
    width = x.shape[-1]
    if width % 2:
        raise ValueError(f"the width of x must be even, got {width}")
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    frequencies = jnp.asarray(base, dtype) ** (-jnp.arange(0, width, 2, dtype=dtype) / width)
    angles = positions[..., None, None].astype(dtype) * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, first * sine + second * cosine], -1)
    return turned.astype(x.dtype)
