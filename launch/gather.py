"""Leaves that lie on several processes, put together in the memory of process 0."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from poise.launch.agreement import is_main
from poise.launch.leaves import to_data


def gathered(leaves: Sequence[Array]) -> list[np.ndarray]:
    """Leaves as plain numbers in process 0's own memory; the other processes take part, and get nothing.

    What is split is put together leaf by leaf, each on all devices for as long as it is copied from one of them.

    Args:
      leaves: of all processes' devices; typed keys become their bits.

    Returns:
      One array a leaf in process 0, none elsewhere.

    Example:
      >>> import jax
      >>> from poise.launch.gather import gathered
      >>> [(leaf.shape, leaf.dtype.name) for leaf in gathered([jax.random.key(0), jax.numpy.ones(3)])]
      [((2,), 'uint32'), ((3,), 'float32')]
    """
    whole, main = [], is_main()
    for leaf in leaves:
        data = to_data(leaf)
        if not data.is_fully_replicated:
            # waited for: a program that still waits for other processes may keep those after it from starting
            data = jax.block_until_ready(_together(data.sharding.mesh)(data))
        if main:
            whole.append(np.asarray(data.addressable_data(0)))
    return whole


@functools.lru_cache(maxsize=8)
def _together(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, PartitionSpec()))
