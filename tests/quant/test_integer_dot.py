import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant import (
    absmax_scale,
    dequantize_tensor,
    int8_conv,
    int8_dot,
    int8_dot_general,
    minmax_qparams,
    power_quantize,
    quantize,
    quantize_activations,
    quantized_tensor,
    tensor_codes,
)
from poise.quant.integer_dot import term_limit

MAX_TERMS = term_limit()


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def symmetric(w, bits, axis):
    scale = absmax_scale(w, bits, axis)
    return quantized_tensor(quantize(w, scale, bits=bits), scale, bits=bits, packed_axis=0)


def asymmetric(w, bits, axis):
    scale, zero = minmax_qparams(w, bits, axis)
    half = 2 ** (bits - 1)
    codes = quantize(w, scale, zero, bits=bits, signed=False).astype(jnp.int32) - half
    return quantized_tensor(codes, scale, zero - half, bits=bits, packed_axis=0)


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "qwix_qarray*.npz")
def test_integer_products_of_qwix(golden_file):
    z = np.load(golden_file)
    weight = quantized_tensor(jnp.asarray(z["int8_qvalue"]), jnp.asarray(z["int8_scale"]), bits=8, packed_axis=0)
    x, scale = jnp.asarray(z["x"]), jnp.asarray(z["dot_x_scale"])
    np.testing.assert_allclose(quantize_activations(x, -1)[1], scale, rtol=1e-6)
    codes, _ = quantize_activations(x, -1, scale)  # the largest entries are ties, so the scale has to be the very one
    np.testing.assert_array_equal(codes, z["dot_x_qvalue"])
    sums = jax.lax.dot(codes, tensor_codes(weight), preferred_element_type=jnp.int32)
    np.testing.assert_array_equal(sums, z["dot_acc"])
    np.testing.assert_allclose(int8_dot(x, weight, scale=scale), z["dot_y"], rtol=1e-5, atol=1e-6)


def reference(x, weight, scale=None, zero_point=None):
    """The same product in float64: quantized activations times the dequantized kernel."""
    codes, scale = quantize_activations(x, -1, scale, zero_point)
    value = (np.asarray(codes, float) - (0 if zero_point is None else zero_point)) * np.asarray(scale, float)
    return value @ np.asarray(dequantize_tensor(weight), float)


WEIGHTS = {
    "symmetric": lambda w: symmetric(w, 8, 0),
    "one scale": lambda w: symmetric(w, 4, None),
    "asymmetric": lambda w: asymmetric(w, 8, 0),
    "asymmetric, one scale": lambda w: asymmetric(w, 3, None),
    "asymmetric, scalars": lambda w: quantized_tensor(
        quantize(w, 0.4, -2, bits=4), jnp.float32(0.4), jnp.int8(-2), bits=4
    ),
    "groups": lambda w: quantized_tensor(
        quantize(w.reshape(3, 8, -1), jnp.full((3, 1, 1), 0.02), bits=8).reshape(w.shape),
        jnp.broadcast_to(jnp.array([[0.02], [0.03], [0.01]]), (3, w.shape[1])),
        bits=8,
    ),
    "groups with a zero point": lambda w: quantized_tensor(
        quantize(w, 0.05, bits=4), jnp.full((2, 1), 0.05), jnp.array([[3], [-8]]), bits=4
    ),
    "half_integer": lambda w: quantized_tensor(
        quantize(w, 0.5, bits=3), jnp.float32(0.25), bits=3, scheme="half_integer"
    ),
    "square root": lambda w: quantized_tensor(
        *power_quantize(w, 0.5, bits=4, axis=0), bits=4, scheme="power", exponent=jnp.float32(0.5)
    ),
}


@pytest.mark.parametrize(
    ("kind", "fixed"),
    [(kind, {}) for kind in WEIGHTS]
    + [
        (kind, {"scale": 0.02, "zero_point": -11})
        for kind in ("asymmetric", "asymmetric, scalars", "groups with a zero point")
    ],
)
def test_dense_products_are_exact(kind, fixed):
    x, weight = draw((2, 5, 24)), WEIGHTS[kind](draw((24, 10), 1))
    got = jax.jit(lambda x, weight: int8_dot(x, weight, **fixed))(x, weight)
    expected = reference(x, weight, **fixed)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_sums_are_integers():
    weight = symmetric(draw((24, 10)), 8, 0)
    jaxpr = str(jax.make_jaxpr(int8_dot)(draw((3, 24)), weight))
    assert "i32[1,3,10] = dot_general" in jaxpr
    assert "preferred_element_type=int32" in jaxpr
    assert "f32[24,10]" not in jaxpr


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (symmetric, {"strides": (2, 1), "padding": "VALID"}),
        (asymmetric, {"rhs_dilation": (2, 2), "padding": [(1, 2), (0, 3)]}),
        (asymmetric, {"feature_group_count": 2}),
    ],
)
def test_convolutions_are_exact(kind, options):
    x = draw((2, 7, 6, 4))
    weight = kind(draw((3, 2, 4 // options.get("feature_group_count", 1), 6), 1), 8, (0, 1, 2))
    got = int8_conv(x, weight, **options)
    codes, scale = quantize_activations(x, (1, 2, 3))
    with jax.enable_x64():
        options = {"window_strides": (1, 1), "padding": "SAME", **options}
        options["window_strides"] = options.pop("strides", options["window_strides"])
        expected = jax.lax.conv_general_dilated(
            np.asarray(codes, float) * np.asarray(scale, float),
            np.asarray(dequantize_tensor(weight), float),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            **options,
        )
        expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_rows_of_zeros_vmap_and_dtype():
    weight = symmetric(draw((8, 3)), 8, 0)
    x = draw((4, 8)).at[1].set(0)
    dot = jax.jit(int8_dot)
    out = dot(x, weight)
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_array_equal(jax.jit(jax.vmap(int8_dot, (0, None)))(x, weight), out)
    half = dot(x.astype(jnp.bfloat16), weight)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), out, atol=0.05)


def test_products_of_flax_layers_as_they_come():
    x = draw((6, 5, 16))
    dense, integers = nn.DenseGeneral((2, 4)), nn.DenseGeneral((2, 4), dot_general=int8_dot_general())
    variables = jax.jit(dense.init)(jax.random.key(0), x)
    expected, got = jax.jit(dense.apply)(variables, x), jax.jit(integers.apply)(variables, x)
    error = np.abs(expected - got).max() / np.abs(expected).max()
    assert 0 < error < 0.03
    kernel = variables["params"]["kernel"].reshape(16, 8)
    exact = jax.jit(lambda x, w: int8_dot(x, symmetric(w, 8, 0)))(x, kernel).reshape(6, 5, 2, 4)
    np.testing.assert_allclose(got, exact, atol=1e-5)
    batched = jax.jit(lambda x: int8_dot_general()(x, x, (((2,), (2,)), ((0,), (0,)))))(x)
    np.testing.assert_allclose(batched, jnp.einsum("bik,bjk->bij", x, x), atol=0.6)


def test_what_does_not_fit_is_refused():
    weight = symmetric(draw((8, 3)), 8, 0)
    long = quantized_tensor(jnp.zeros((MAX_TERMS + 1, 1), jnp.int8), jnp.ones((1, 1)), bits=8)
    for message, call in {
        "weight must have shape": lambda: int8_dot(draw((2, 7)), weight),
        "at most 131071 terms": lambda: int8_dot(jnp.zeros((1, MAX_TERMS + 1)), long),
        "zero_point needs a scale": lambda: int8_dot(draw((2, 8)), weight, zero_point=3),
        "weight must have shape ": lambda: int8_conv(draw((2, 5, 5, 4)), symmetric(draw((3, 3, 3, 2)), 8, None)),
        "one scale or one for each feature": lambda: int8_conv(
            draw((2, 5, 5, 4)), symmetric(draw((3, 3, 4, 2)), 8, (0, 1))
        ),
        "weight_bits must": lambda: int8_dot_general(1),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    two = dataclasses.replace(WEIGHTS["square root"](draw((24, 10))), exponent=jnp.array([0.5, 0.6]))
    with pytest.raises(ValueError, match="exponent must be one number"):
        int8_dot(draw((2, 24)), two)


@pytest.mark.parametrize(
    ("x_zero", "w_zero", "limit"), [(False, False, 131071), (False, True, 65793), (True, True, 33025)]
)
def test_one_more_term_than_allowed_may_overflow(x_zero, w_zero, limit):
    assert term_limit(x_zero, w_zero) == term_limit(w_zero, x_zero) == limit
    largest = (255 if x_zero else 128) * (255 if w_zero else 128)
    assert largest * limit < 2**31 <= largest * (limit + 1)


@pytest.mark.parametrize("x_zero", [None, -128])
def test_the_longest_sums_with_zero_points_are_exact_and_longer_ones_are_refused(x_zero):
    terms = term_limit(x_zero is not None, True)
    code = -128 if x_zero is None else 127
    fixed = {"scale": 1.0, "zero_point": x_zero}

    def largest(terms):
        weight = quantized_tensor(
            jnp.full((terms, 1), 127, jnp.int8), jnp.ones((1, 1)), jnp.full((1, 1), -128, jnp.int8), bits=8
        )
        return int8_dot(jnp.full((1, terms), code - (x_zero or 0), jnp.float32), weight, **fixed)

    np.testing.assert_allclose(largest(terms), (code - (x_zero or 0)) * 255.0 * terms, rtol=1e-6)
    with pytest.raises(ValueError, match=f"at most {terms} terms"):
        largest(120_000)


def test_long_kernels_of_convolutions_with_zero_points_are_refused():
    shape = (term_limit(False, True) + 1, 1, 1)
    scale, zero = jnp.ones((1, 1, 1)), jnp.zeros((1, 1, 1), jnp.int8)
    codes = jnp.ones(shape, jnp.int8)
    with pytest.raises(ValueError, match="at most 65793 terms"):
        int8_conv(jnp.ones((1, 2, 1)), quantized_tensor(codes, scale, zero, bits=8))


def test_convolutions_take_scalar_zero_points():
    x, w = draw((2, 6, 3)), draw((3, 3, 4), 1)
    codes = quantize(w, 0.4, -2, bits=4)
    scalars = quantized_tensor(codes, jnp.float32(0.4), jnp.int8(-2), bits=4)
    ones = quantized_tensor(codes, jnp.full((1, 1, 1), 0.4), jnp.full((1, 1, 1), -2), bits=4)
    np.testing.assert_array_equal(int8_conv(x, scalars), int8_conv(x, ones))
