"""Uniform quantization: integers and back, the straight-through gradient, groups of zeros, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import absmax_scale, dequantize, fake_quantize, minmax_qparams, quantize

quick = settings(max_examples=25, deadline=None)
numbers = st.integers(0, 10**6)


def draw(seed, shape=(3, 7)):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4), jnp.float32)


FAKE = jax.jit(fake_quantize, static_argnames="bits")


@quick
@given(numbers, st.sampled_from([1, 2, 4, 8]), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_both_ways_agree_bit_for_bit(seed, bits, dtype):
    x = draw(seed).astype(dtype)
    scale = absmax_scale(x, bits, 1)
    codes = quantize(x, scale, bits=bits)
    assert codes.dtype == jnp.int8
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    fake = FAKE(x, scale, bits=bits)
    assert fake.dtype == dtype
    np.testing.assert_array_equal(fake, dequantize(codes, scale))


@quick
@given(numbers, st.sampled_from([1, 3, 8]))
def test_asymmetric_codes_too(seed, bits):
    x = draw(seed) + 0.3
    scale, zero_point = minmax_qparams(x, bits, 1)
    codes = quantize(x, scale, zero_point, bits=bits, signed=False)
    assert codes.dtype == jnp.uint8
    assert codes.max() <= 2**bits - 1
    fake = fake_quantize(x, scale, zero_point, bits=bits, signed=False)
    np.testing.assert_array_equal(fake, dequantize(codes, scale, zero_point))
    assert (jnp.abs(fake - x) <= 1.01 * scale).all()  # the range covers the data


def test_gradients_are_the_closed_forms(quick_jit):
    """The codes are rounded before they are clipped: -4.4 becomes -4, which is not clipped."""
    x, scale = jnp.array([-5.0, -4.4, -1.3, 0.0, 2.6, 3.4, 3.6, 9.0]), jnp.float32(1.0)
    inside = jnp.array([0, 1, 1, 1, 1, 1, 0, 0])
    codes = jnp.array([-4, -4, -1, 0, 3, 3, 3, 3])
    dx, ds = quick_jit(jax.grad(lambda x, s: fake_quantize(x, s, bits=3).sum(), (0, 1)))(x, scale)
    np.testing.assert_array_equal(dx, inside)
    np.testing.assert_allclose(ds, (codes - inside * x).sum(), rtol=1e-6)


def test_a_group_with_scale_0_gives_0_and_its_gradient_too(quick_jit):
    x, scale = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[0.0], [1.0]])
    assert quantize(x, scale, bits=4).tolist() == [[0, 0], [3, 4]]
    assert fake_quantize(x, scale, bits=4).tolist() == [[0, 0], [3, 4]]
    dx, ds = quick_jit(jax.grad(lambda x, s: fake_quantize(x, s, bits=4).sum(), (0, 1)))(x, scale)
    assert not dx[0].any()
    assert (dx[1] == 1).all()
    assert np.isfinite(ds).all()


def test_no_gradient_reaches_the_zero_point():
    x, zero = jnp.linspace(-1, 1, 5), jnp.array(3.0)
    assert jax.grad(lambda z: fake_quantize(x, 0.1, z, bits=2, signed=False).sum())(zero) == 0


def test_bfloat16_weights_with_float32_scales_come_back_in_bfloat16():
    x = jnp.linspace(-1, 1, 9, dtype=jnp.bfloat16)
    y = fake_quantize(x, jnp.float32(0.3), bits=4)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, dequantize(quantize(x, jnp.float32(0.3), bits=4), 0.3).astype(jnp.bfloat16))


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 0}, r"bits must be in \[1, 8\], got 0"),
        ({"bits": 9}, r"bits must be in \[1, 8\], got 9"),
        ({"bits": True}, "bits must be an integer"),
        ({"x": jnp.ones((2, 3), jnp.int32)}, "x must hold floats, got int32"),
        ({"x": jnp.full((2, 3), jnp.nan)}, "x must be finite, got 6"),
        ({"scale": jnp.ones(2)}, r"scale must broadcast to the shape \(2, 3\), got \(2,\)"),
        ({"scale": jnp.ones((4, 2, 3))}, "scale must broadcast"),
        ({"scale": jnp.array(-1.0)}, "scale must lie in"),
        ({"scale": jnp.array(jnp.inf)}, "scale must be finite"),
        ({"zero_point": jnp.ones(2, jnp.int32)}, "zero_point must broadcast"),
        ({"zero_point": jnp.array(0.5)}, "zero_point must hold whole numbers"),
    ],
)
def test_bad_input(function, changes, message):
    arguments = {"x": jnp.ones((2, 3)), "scale": jnp.array(0.5), "zero_point": None, "bits": 4} | changes
    with pytest.raises(ValueError, match=message):
        function(**arguments)


def test_bad_codes():
    with pytest.raises(ValueError, match="codes must hold integers, got float32"):
        dequantize(jnp.ones(3), 0.5)
    with pytest.raises(ValueError, match="scale must broadcast"):
        dequantize(jnp.ones(3, jnp.int8), jnp.ones(2))
