"""Small integer codes packed into bytes, and back."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poise.core.arguments import concrete
from poise.quant.checks import check_bits, code_range

PACKED_BITS = (1, 2, 3, 4, 8)
"""The widths that codes are stored in."""


def storage_bits(bits: int) -> int:
    """The width at which codes of so many bits are stored: their own if it can be packed, else 8.

    Example:
      >>> from poise.quant import storage_bits
      >>> [storage_bits(bits) for bits in (1, 3, 5, 8)]
      [1, 3, 8, 8]
    """
    check_bits(bits)
    return bits if bits in PACKED_BITS else 8


def packed_length(length: int, bits: int) -> int:
    """The number of bytes that so many codes take.

    Codes come in groups that fill whole bytes: at 1, 2, 3, 4 and 8 bits, 8, 4, 8, 2 and 1 codes take 1, 1, 3, 1 and 1.

    Example:
      >>> from poise.quant import packed_length
      >>> packed_length(9, 4), packed_length(9, 3)
      (5, 6)
    """
    group, size = _group(bits)
    return -(-length // group) * size


def pack_bits(codes: Array, bits: int, axis: int = 0, *, signed: bool = True) -> Array:
    r"""Packs integer codes along an axis, without loss.

    The codes are a stream of bits, lowest first: at 4 bits, the code of even index is the low half of its byte. Signed
    codes are kept in two's complement. A last group that isn't full is filled with zeros.

    Args:
      codes: integers in $[-2^{b-1}, 2^{b-1} - 1]$, or $[0, 2^b - 1]$ if not ``signed``. Concrete ones are checked.
      bits: 1, 2, 3, 4 or 8.
      axis: the axis along which neighbours share bytes.
      signed: whether the codes have a sign.

    Returns:
      uint8 with :func:`packed_length` bytes along ``axis``. At 8 bits the codes themselves, int8 if signed.

    Raises:
      ValueError: if the codes are no integers, ``bits`` is another number, a code doesn't fit, or there is no such
        axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import pack_bits, unpack_bits
      >>> packed = pack_bits(jnp.array([1, -2, 3], jnp.int8), 4)
      >>> [hex(byte) for byte in packed.tolist()]
      ['0xe1', '0x3']
      >>> unpack_bits(packed, 4, length=3).tolist()
      [1, -2, 3]
    """
    group, size = _group(bits)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"codes must be integers, got dtype {codes.dtype}")
    axis = _axis(axis, codes.ndim)
    low, high = code_range(bits, signed)
    known = concrete(codes)
    if known is not None and known.size and (known.min() < low or known.max() > high):
        raise ValueError(f"codes must lie in [{low}, {high}] at {bits} bits, got {known.min()} to {known.max()}")
    if bits == 8:
        return codes.astype(jnp.int8 if signed else jnp.uint8)
    length = codes.shape[axis]
    groups = -(-length // group)
    widths = [(0, groups * group - length if place == axis else 0) for place in range(codes.ndim)]
    word = jnp.uint8 if size == 1 else jnp.uint32
    fields = jnp.pad(codes, widths).astype(jnp.int32).astype(word) & word(2**bits - 1)
    fields = fields.reshape(*codes.shape[:axis], groups, group, *codes.shape[axis + 1 :])
    words = jnp.sum(fields << _shifts(group, bits, codes.ndim - axis - 1, word), axis + 1, dtype=word)
    if size > 1:
        words = jnp.expand_dims(words, axis + 1) >> _shifts(size, 8, codes.ndim - axis - 1, word)
        words = (words & word(255)).astype(jnp.uint8)
    return words.reshape(*codes.shape[:axis], groups * size, *codes.shape[axis + 1 :])


def unpack_bits(packed: Array, bits: int, axis: int = 0, *, length: int | None = None, signed: bool = True) -> Array:
    """The codes that :func:`pack_bits` packed.

    Args:
      packed: what it returned.
      bits: 1, 2, 3, 4 or 8.
      axis: the axis along which codes were packed.
      length: how many codes there are along it; None for as many as fill the bytes.
      signed: whether the codes have a sign.

    Returns:
      int8 codes, uint8 if not ``signed``.

    Raises:
      ValueError: if ``bits`` is another number, there is no such axis, or ``length`` doesn't belong to so many bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import unpack_bits
      >>> unpack_bits(jnp.array([0b00000110], jnp.uint8), 1, signed=False).tolist()
      [0, 1, 1, 0, 0, 0, 0, 0]
    """
    group, size = _group(bits)
    axis = _axis(axis, packed.ndim)
    held = packed.shape[axis]
    length = held // size * group if length is None else length
    if packed_length(length, bits) != held:
        raise ValueError(f"length {length} at {bits} bits takes {packed_length(length, bits)} bytes, got {held}")
    out = jnp.int8 if signed else jnp.uint8
    if bits == 8:
        return packed.astype(out)
    before, after = packed.shape[:axis], packed.shape[axis + 1 :]
    word = jnp.uint8 if size == 1 else jnp.uint32
    words = packed.astype(word)
    if size > 1:
        words = words.reshape(*before, held // size, size, *after)
        words = jnp.sum(words << _shifts(size, 8, len(after), word), axis + 1, dtype=word)
    fields = jnp.expand_dims(words, axis + 1) >> _shifts(group, bits, len(after), word)
    fields = fields.astype(jnp.uint8).reshape(*before, held // size * group, *after)
    spare = jnp.uint8(8 - bits)
    # The field's top bit goes to the byte's top bit, from where an arithmetic shift drags it down again.
    codes = (fields << spare).astype(out) >> spare.astype(out)
    return codes[(slice(None),) * axis + (slice(0, length),)]


def _group(bits: int) -> tuple[int, int]:
    """How many codes fill how many bytes."""
    if bits not in PACKED_BITS:
        raise ValueError(f"bits must be one of {', '.join(map(str, PACKED_BITS))}, got {bits!r}")
    group = 8 // math.gcd(8, bits)
    return group, group * bits // 8


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis must lie in [{-ndim}, {ndim - 1}], got {axis}")
    return axis % ndim


def _shifts(count: int, step: int, trailing: int, dtype: type) -> Array:
    return jnp.asarray(np.arange(count) * step, dtype).reshape(count, *(1,) * trailing)
