"""A ring buffer of transitions on the device."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from poise.core.arguments import check_count


class ReplayState(NamedTuple):
    """A ring buffer.

    Attributes:
      data: a pytree of arrays ``[capacity, ...]``.
      insert: the place of the next item.
      size: how many places hold an item, at most the capacity.
    """

    data: PyTree
    insert: Int[Array, ""]
    size: Int[Array, ""]


def replay_init(example: PyTree, capacity: int) -> ReplayState:
    """An empty buffer.

    Args:
      example: one item, of the shapes and dtypes of all others.
      capacity: how many items are kept; the oldest go first.

    Returns:
      The buffer, filled with zeros.

    Raises:
      TypeError: if ``capacity`` is no integer.
      ValueError: if it is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import replay_init
      >>> replay_init({"reward": jnp.zeros(())}, 4).data["reward"].shape
      (4,)
    """
    check_count("capacity", capacity)

    def empty(leaf):
        return jnp.zeros((capacity, *jnp.shape(leaf)), jnp.result_type(leaf))

    return ReplayState(jax.tree.map(empty, example), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def replay_add(replay: ReplayState, items: PyTree, valid: bool | Bool[Array, ""] = True) -> ReplayState:
    """Writes a batch of items over the oldest ones.

    Args:
      replay: the buffer.
      items: a pytree like the buffer's with arrays ``[count, ...]``; ``count`` at most the capacity.
      valid: whether to write at all; where False the buffer stays as it is.

    Returns:
      The buffer.

    Raises:
      ValueError: if there are more items than places, or their shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import replay_add, replay_init
      >>> replay = replay_init(jnp.zeros(()), 3)
      >>> for batch in ([1.0, 2.0], [3.0, 4.0]):
      ...     replay = replay_add(replay, jnp.array(batch))
      >>> replay.data.tolist(), int(replay.insert), int(replay.size)
      ([4.0, 2.0, 3.0], 1, 3)
    """
    leaves, stored = jax.tree.leaves(items), jax.tree.leaves(replay.data)
    capacity, count = len(stored[0]), len(leaves[0])
    if count > capacity:
        raise ValueError(f"items must be at most {capacity}, as many as there are places, got {count}")
    for item, place in zip(leaves, stored, strict=True):
        if item.shape != (count, *place.shape[1:]):
            raise ValueError(f"items must have shape {(count, *place.shape[1:])}, got {item.shape}")
    # Out-of-bounds writes are dropped, which costs nothing, while choosing between two buffers copies them.
    index = (replay.insert + jnp.arange(count)) % capacity
    index = jnp.where(valid, index, capacity)

    def write(place, item):
        return place.at[index].set(item.astype(place.dtype), mode="drop")

    added = jnp.where(valid, count, 0)
    return ReplayState(
        jax.tree.map(write, replay.data, items),
        (replay.insert + added) % capacity,
        jnp.minimum(replay.size + added, capacity),
    )


def replay_sample(replay: ReplayState, key: PRNGKeyArray, batch_size: int) -> PyTree:
    """Draws items uniformly, with replacement, from those that were written.

    Args:
      replay: the buffer. From an empty one come zeros.
      key: a random key.
      batch_size: how many.

    Returns:
      A pytree of arrays ``[batch_size, ...]``.

    Raises:
      TypeError: if ``batch_size`` is no integer.
      ValueError: if it is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import replay_add, replay_init, replay_sample
      >>> replay = replay_add(replay_init(jnp.zeros(()), 8), jnp.array([5.0]))
      >>> replay_sample(replay, jax.random.key(0), 3).tolist()
      [5.0, 5.0, 5.0]
    """
    check_count("batch_size", batch_size)
    index = jax.random.randint(key, (batch_size,), 0, jnp.maximum(replay.size, 1))
    return jax.tree.map(lambda leaf: leaf[index], replay.data)
