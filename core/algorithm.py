"""A training procedure as a value: a pair of pure functions."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from jaxtyping import Array, PRNGKeyArray, PyTree

State: TypeAlias = PyTree
"""Everything that changes during training, as a pytree of arrays."""

Batch: TypeAlias = PyTree
"""What one step reads, as a pytree of arrays; ``()`` where there is nothing to read."""

Metrics: TypeAlias = dict[str, Array]
"""Scalars by name (or one number a seed)."""


class Algorithm(NamedTuple):
    """What an optimizer is in optax, for a whole training procedure: two pure functions.

    The state holds everything that changes (parameters, optimizer states, averages, counters), so that restoring it
    restores the run bit for bit. Networks that never change live in the state's field ``frozen``.

    Attributes:
      init: ``(key, batch) -> state``. Takes shapes from one example batch and draws the parameters. An algorithm that
        needs no data gets and ignores ``()``.
      step: ``(state, batch, key) -> (state, metrics)``. One update, or one whole cycle of updates where networks are
        updated at different rates. Metrics are scalars by name.

    Example:
      A counter that sums its batches:

      >>> import jax, jax.numpy as jnp
      >>> from poise.core import Algorithm
      >>> algorithm = Algorithm(
      ...     init=lambda key, batch: jnp.zeros(()),
      ...     step=lambda state, batch, key: (state + batch.sum(), {"sum": state + batch.sum()}),
      ... )
      >>> state = algorithm.init(jax.random.key(0), jnp.ones(3))
      >>> state, metrics = jax.jit(algorithm.step)(state, jnp.ones(3), jax.random.key(1))
      >>> float(metrics["sum"])
      3.0
    """

    init: Callable[[PRNGKeyArray, Batch], State]
    step: Callable[[State, Batch, PRNGKeyArray], tuple[State, Metrics]]
