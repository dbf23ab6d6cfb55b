"""Checksums of arrays: equal to a plain computation on the host, sensitive to every bit, blind to sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from poise.launch.digest import checksum, digests

TYPES = ["bool", "int8", "uint16", "int32", "uint32", "float16", "bfloat16", "float32", "complex64", "float8_e4m3fn"]
WIDE = ["int64", "float64", "complex128"]


def mix(word):
    word = np.uint32(word ^ (word >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    word = np.uint32(word ^ (word >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return word ^ (word >> np.uint32(16))


def reference(array):
    """The checksum by numpy, from the array's bytes."""
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    size = min(array.dtype.itemsize, 4)
    if array.dtype.kind == "c":
        size = 4
    words = raw.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size]).astype(np.uint32)
    place = np.arange(len(words), dtype=np.uint32)
    return [int(mix(words ^ mix(place + np.uint32(salt))).sum(dtype=np.uint32)) for salt in (0x9E3779B9, 0x7F4A7C15)]


def bits(dtype, shape, seed=0):
    dtype = jnp.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    raw = rng.integers(0, 256, size=(*shape, dtype.itemsize), dtype=np.uint8)
    return np.ascontiguousarray(raw).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", TYPES + WIDE)
@pytest.mark.parametrize("shape", [(), (7,), (3, 0), (2, 3, 4)])
def test_it_is_what_numpy_computes_from_the_bytes(dtype, shape):
    with jax.enable_x64(dtype in WIDE):
        array = bits(dtype, shape)
        assert np.asarray(checksum(jnp.asarray(array))).tolist() == reference(array)


@given(dtype=st.sampled_from(TYPES), place=st.integers(0, 23), bit=st.integers(0, 63))
@settings(max_examples=25, deadline=None)
def test_every_flipped_bit_shows(dtype, place, bit):
    array = bits(dtype, (2, 3, 4))
    changed = array.copy().reshape(-1)
    if dtype == "bool":
        changed[place] ^= True
    else:
        raw = changed.view(np.uint8).reshape(24, -1)
        raw[place, bit // 8 % raw.shape[1]] ^= np.uint8(1 << bit % 8)
    before, after = (np.asarray(checksum(jnp.asarray(a.reshape(2, 3, 4)))) for a in (array, changed))
    assert (before != after).all()


def test_places_matter():
    array = jnp.arange(6.0)
    assert digests([array]) != digests([array[::-1]])
    assert digests([jnp.zeros(3)]) != digests([jnp.zeros(4)])


def test_signed_zeros_and_nan_payloads_differ():
    assert digests([jnp.array(0.0)]) != digests([jnp.array(-0.0)])
    payloads = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert digests([jnp.asarray(payloads[0])]) != digests([jnp.asarray(payloads[1])])


def test_typed_keys_count_by_their_bits():
    key = jax.random.split(jax.random.key(5), 3)
    assert digests([key]) == digests([jax.random.key_data(key)])


@pytest.mark.parametrize("axes", [(), ("a",), (None, "b"), ("b", "a")])
def test_sharding_does_not_matter(axes):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    array = bits("float32", (8, 12))
    placed = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))
    assert np.asarray(checksum(placed)).tolist() == reference(array)
