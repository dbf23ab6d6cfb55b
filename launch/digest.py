"""Checksums of arrays, computed where the arrays are: the same on any device and for any sharding."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

from poise.launch.leaves import to_data

# XLA's CPU client has one thread a core and takes 32 programs a device: more that wait for other devices may stop it.
_AT_ONCE = 16


def _mix(word: Array) -> Array:
    """MurmurHash3's finalizer: a bijection of 32 bits in which every input bit reaches every output bit."""
    word = (word ^ (word >> 16)) * jnp.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _words(array: Array) -> Array:
    """The array's bits as 32-bit words; 64-bit numbers become two along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return _words(jnp.stack([array.real, array.imag], axis=-1))
    info = jnp.finfo if jnp.issubdtype(array.dtype, jnp.floating) else jnp.iinfo
    bits = info(array.dtype).bits
    if bits == 64:
        return lax.bitcast_convert_type(array, jnp.uint32)
    return lax.bitcast_convert_type(array, jnp.dtype(f"uint{bits}")).astype(jnp.uint32)


@jax.jit
def checksum(array: Array) -> UInt32[Array, "2"]:
    r"""64 bits that change whenever one element changes: $\sum_i h(w_i \oplus h(i + s)) \bmod 2^{32}$ for two $s$.

    ``w_i`` are the array's bits, ``h`` a bijection, so that a change of any one word always changes both sums; several
    changes go unnoticed with probability $2^{-64}$. Sums of integers don't depend on their order: the checksum is the
    same for every device, sharding and number of hosts. It guards against accidents, not against an adversary.

    Args:
      array: of any shape and any type: numbers, booleans or typed random keys.

    Returns:
      Two 32-bit words.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.launch.digest import checksum
      >>> bool((checksum(jnp.array([1.0, 2.0])) == checksum(jnp.array([2.0, 1.0]))).any())
      False
    """
    words = _words(to_data(array))
    position, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        position += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    salts = (jnp.uint32(0x9E3779B9), jnp.uint32(0x7F4A7C15))
    sums = [_mix(words ^ _mix(position + salt)).sum(dtype=jnp.uint32) for salt in salts]
    return jnp.stack(sums)


def digests(leaves: Sequence[Array]) -> list[str]:
    """The checksums of arrays as 16 hexadecimal digits each; waits for the arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.launch.digest import digests
      >>> digests([jnp.zeros(3), jnp.zeros(3, bool)]) == digests([jnp.zeros(3), jnp.zeros(3, bool)])
      True
    """
    alone = all(leaf.is_fully_addressable and leaf.is_fully_replicated for leaf in leaves)
    at_once, sums = max(len(leaves), 1) if alone else _AT_ONCE, []
    for first in range(0, len(leaves), at_once):
        sums += jax.device_get([_replicated(leaf) for leaf in leaves[first : first + at_once]])
    return ["".join(f"{int(word):08x}" for word in pair) for pair in sums]


def _replicated(leaf: Array) -> Array:
    """The checksum where each process finds it; of an array over several processes, all of them take part."""
    if leaf.is_fully_addressable:
        return checksum(leaf)
    return _checksum_over(leaf.sharding.mesh)(leaf)


@functools.lru_cache(maxsize=8)
def _checksum_over(mesh: Mesh) -> Callable[[Array], Array]:
    return jax.jit(checksum, out_shardings=NamedSharding(mesh, PartitionSpec()))
