"""Two idioms of every method on batches of arrays."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


def at_least_float32(x: ArrayLike) -> Array:
    """The array in float32 if it is narrower (bfloat16, float16, integers), else unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.core.arrays import at_least_float32
      >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def expand_like(x: Array, like: Array) -> Array:
    """Per-example values ``[batch]`` with trailing axes of length 1, so that they broadcast against ``[batch, ...]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.core.arrays import expand_like
      >>> expand_like(jnp.ones(3), jnp.ones((3, 8, 8))).shape
      (3, 1, 1)
    """
    return jnp.reshape(x, jnp.shape(x) + (1,) * (jnp.ndim(like) - jnp.ndim(x)))
