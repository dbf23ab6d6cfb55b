"""Division that is rounded once, under jit as without it."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_jvp
def divide(x: Array, scale: Array) -> Array:
    r"""Computes $x/s$ for positive scales that broadcast against ``x``, correctly rounded.

    XLA turns a division by something that it broadcasts or knows into a product with $1/s$, which is rounded twice. Of
    values midway between two levels (the largest magnitude of a group often is one) some then change their level. A
    denominator that depends on the value, here by its NaNs, is left alone and still fuses.
    """
    return x / jnp.where(jnp.isnan(x), x, scale)


@divide.defjvp
def _(primals, tangents):
    x, scale = primals
    ratio = divide(x, scale)
    return ratio, (tangents[0] - ratio * tangents[1]) / scale
