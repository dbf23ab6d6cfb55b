"""Reductions over the batch that are right on one device, under jit with sharding, and inside pmap or shard_map."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree


def mean_over(axis_name: str | None, tree: PyTree) -> PyTree:
    r"""Averages every leaf over a mapped device axis: $\bar x = \frac1P\sum_p x_p$.

    Args:
      axis_name: the axis of the enclosing ``pmap`` or ``shard_map``, or None outside of one. Under ``jit`` with sharded
        inputs no name is needed: a mean over the batch already is the mean over the global batch.
      tree: a pytree of arrays, the same shapes on every device.

    Returns:
      The tree itself for None, else its mean over the axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.core import mean_over
      >>> jax.vmap(lambda x: mean_over("data", x), axis_name="data")(jnp.array([1.0, 3.0])).tolist()
      [2.0, 2.0]
    """
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)


def sum_over(axis_name: str | None, tree: PyTree) -> PyTree:
    """Sums every leaf over a mapped device axis; the tree itself for None. See :func:`mean_over`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.core import sum_over
      >>> jax.vmap(lambda x: sum_over("data", x), axis_name="data")(jnp.array([1.0, 3.0])).tolist()
      [4.0, 4.0]
    """
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def axis_index(axis_name: str | None) -> Int[Array, ""]:
    """This device's place on the mapped axis; 0 for None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.core import axis_index
      >>> jax.vmap(lambda x: axis_index("data"), axis_name="data")(jnp.zeros(3)).tolist()
      [0, 1, 2]
    """
    return jnp.zeros((), jnp.int32) if axis_name is None else jax.lax.axis_index(axis_name)
