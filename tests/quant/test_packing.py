import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import PACKED_BITS, pack_bits, packed_length, storage_bits, unpack_bits
from poise.quant.checks import code_range


def draw(shape, bits, signed, seed=0):
    low, high = code_range(bits, signed)
    return np.random.default_rng(seed).integers(low, high + 1, shape).astype(np.int8 if signed else np.uint8)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_unpacking_is_the_exact_inverse(data):
    bits, signed = data.draw(st.sampled_from(PACKED_BITS)), data.draw(st.booleans())
    shape = data.draw(st.sampled_from([(1,), (9,), (8, 5), (3, 10, 2)]))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    codes = draw(shape, bits, signed, data.draw(st.integers(0, 99)))
    packed = pack_bits(jnp.asarray(codes), bits, axis, signed=signed)
    back = unpack_bits(packed, bits, axis, length=shape[axis], signed=signed)
    assert packed.shape[axis] == packed_length(shape[axis], bits)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("bits", PACKED_BITS)
def test_packed_bytes_are_a_little_endian_stream_of_bits(bits):
    codes = draw(16, bits, signed=False)
    stream = "".join(format(int(code), f"0{bits}b")[::-1] for code in codes)
    expected = [int(stream[start : start + 8][::-1], 2) for start in range(0, len(stream), 8)]
    np.testing.assert_array_equal(pack_bits(jnp.asarray(codes), bits, signed=False), expected)


def test_a_long_axis_takes_bits_eighths_of_a_byte_a_code():
    sizes = [pack_bits(jnp.zeros((64, 3), jnp.int8), bits).nbytes for bits in PACKED_BITS]
    assert sizes == [64 * 3 * bits // 8 for bits in PACKED_BITS]
    assert [storage_bits(bits) for bits in range(1, 9)] == [1, 2, 3, 4, 8, 8, 8, 8]


@pytest.mark.parametrize("bits", [3, 4])
def test_under_jit_and_vmap(bits):
    codes = jnp.asarray(draw((2, 5, 7), bits, signed=True))
    packed = jax.jit(jax.vmap(lambda c: pack_bits(c, bits, -1)))(codes)
    np.testing.assert_array_equal(packed, pack_bits(codes, bits, -1))
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda p: unpack_bits(p, bits, -1, length=7)))(packed), codes)


def test_what_does_not_fit_is_refused():
    codes = jnp.array([1, -2], jnp.int8)
    with pytest.raises(ValueError, match="bits must be one of 1, 2, 3, 4, 8, got 5"):
        pack_bits(codes, 5)
    with pytest.raises(ValueError, match=r"codes must lie in \[-1, 0\] at 1 bits, got -2 to 1"):
        pack_bits(codes, 1)
    with pytest.raises(ValueError, match=r"codes must lie in \[0, 15\]"):
        pack_bits(codes, 4, signed=False)
    with pytest.raises(ValueError, match="codes must be integers, got dtype float32"):
        pack_bits(jnp.ones(3), 4)
    with pytest.raises(ValueError, match="axis must lie in"):
        pack_bits(codes, 4, 1)
    with pytest.raises(ValueError, match="length 5 at 4 bits takes 3 bytes, got 1"):
        unpack_bits(pack_bits(codes, 4), 4, length=5)
