"""Random keys as pure functions of what they are for."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from poise.core.collectives import axis_index


def fold_in_examples(key: PRNGKeyArray, batch_size: int, axis_name: str | None = None) -> Array:
    """One key per example, the same however the batch is spread over devices.

    Example ``i`` of the global batch gets ``fold_in(key, i)``. Device ``p`` of a mapped axis holds the contiguous block
    ``[p*batch_size, (p+1)*batch_size)``, so one device, several under ``jit`` and several under ``pmap`` draw the same
    noise.

    Args:
      key: the step's key, equal on all devices.
      batch_size: the number of examples on *this* device (under jit: of the global batch).
      axis_name: the axis of the enclosing ``pmap`` or ``shard_map``, or None.

    Returns:
      Keys of shape ``[batch_size]``, to be used under ``vmap``.

    Raises:
      ValueError: if ``batch_size`` is below 1.

    Example:
      >>> import jax
      >>> from poise.core import fold_in_examples
      >>> noise = jax.vmap(lambda k: jax.random.normal(k, (8, 8)))(fold_in_examples(jax.random.key(0), 4))
      >>> noise.shape
      (4, 8, 8)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    index = axis_index(axis_name) * batch_size + jnp.arange(batch_size)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)


def step_key(seed: int, phase: int, step: int | Array) -> PRNGKeyArray:
    """The key of one training step: seed, phase and step folded in this order.

    Args:
      seed: the run's seed.
      phase: the phase's place in the run, from 0.
      step: the step within the phase, from 0; may be traced.

    Returns:
      A typed key that depends on nothing else, so that a resumed run continues the very same stream.

    Example:
      >>> from poise.core import step_key
      >>> bool((step_key(0, 1, 2) == step_key(0, 1, 2)).all()), bool((step_key(0, 1, 2) == step_key(0, 2, 1)).all())
      (True, False)
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), phase), step)
