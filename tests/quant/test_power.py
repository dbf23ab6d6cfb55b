import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import (
    fake_quantize,
    power_bennett_mse,
    power_decode_table,
    power_dequantize,
    power_fake_quantize,
    power_quantize,
    power_search,
)
from poise.quant.power import largest_magnitude, power_values


def normal(size=20000, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(size, np.float32))


def relative_mse(w, a, bits):
    errors = [w - power_fake_quantize(w, exponent, bits=bits) for exponent in (a, 1.0)]
    return float(jnp.mean(errors[0] ** 2) / jnp.mean(errors[1] ** 2))


@pytest.mark.parametrize("bits", [2, 8])
def test_exponent_one_is_the_symmetric_uniform_quantizer(bits):
    w = normal(60).reshape(6, 10)
    scale = largest_magnitude(w, 1) / (2 ** (bits - 1) - 1)
    np.testing.assert_allclose(
        power_fake_quantize(w, 1.0, bits=bits, axis=1), fake_quantize(w, scale, bits=bits), rtol=2e-6, atol=1e-7
    )


def test_codes_of_the_square_root():
    w = jnp.array([-1.0, -0.3, -0.05, 0, 0.02, 0.2, 0.6, 1])
    codes, _ = power_quantize(w, 0.5, bits=4)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, [-7, -4, -2, 0, 1, 3, 5, 7])
    unsigned, _ = power_quantize(w, 0.5, bits=4, signed=False)
    assert unsigned.dtype == jnp.uint8
    np.testing.assert_array_equal(unsigned, [0, 0, 0, 0, 2, 7, 12, 15])


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.sampled_from([0.4, 0.5, 0.7, 1.0, 1.3]), st.integers(0, 1000))
def test_symmetries(bits, a, seed):
    w = normal(24, seed).reshape(4, 6)
    codes, scale = power_quantize(w, a, bits=bits, axis=1)
    value = power_dequantize(codes, scale, a, bits=bits)
    np.testing.assert_array_equal(power_quantize(value, a, bits=bits, axis=1)[0], codes)
    np.testing.assert_array_equal(power_quantize(-w, a, bits=bits, axis=1)[0], -codes)
    scaled, _ = power_quantize(4 * w, a, bits=bits, axis=1)
    np.testing.assert_array_equal(scaled, codes)
    # codes rise with the weights, and the largest weights are met exactly
    order = np.argsort(w, 1)
    assert (np.diff(np.take_along_axis(np.asarray(codes, int), order, 1), axis=1) >= 0).all()
    np.testing.assert_array_equal(np.abs(value).max(1, keepdims=True), scale)


def test_products_of_unrounded_codes_stand_for_products():
    x, y = jnp.linspace(0.1, 1, 7), jnp.linspace(1, 0.2, 7)
    product = power_values((100 * x**0.6) * (100 * y**0.6), 0.6, 100 * 100)
    np.testing.assert_allclose(product, x * y, rtol=1e-5)


@pytest.mark.parametrize(
    ("bits", "exponent", "ratio", "ratio_of_half"), [(3, 0.667, 0.625, 0.706), (4, 0.624, 0.637, 0.682)]
)
def test_search_finds_the_best_exponent_of_gaussian_weights(bits, exponent, ratio, ratio_of_half):
    w = normal(50_000).at[0].set(4.7)  # the gain depends on how far the largest weight stands out
    a = power_search(w, bits=bits)
    assert abs(a - exponent) < 0.02
    assert abs(relative_mse(w, a, bits) - ratio) < 0.015
    assert abs(relative_mse(w, 0.5, bits) - ratio_of_half) < 0.015
    assert all(relative_mse(w, a, bits) <= relative_mse(w, other, bits) + 1e-6 for other in (0.3, 0.5, 0.8, 1.0))


def test_search_on_uniform_weights_stays_uniform():
    w = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, 20000).astype(np.float32))
    assert abs(float(power_search(w, bits=4)) - 1) < 0.05


def test_search_over_a_tree():
    tree = {"a": normal(2000), "b": normal(2000, 1) ** 3}
    each = power_search(tree, bits=4, shared=False)
    assert float(each["b"]) < float(each["a"])
    shared = float(power_search(tree, bits=4))
    assert float(each["b"]) - 0.02 <= shared <= float(each["a"]) + 0.02
    with pytest.warns(UserWarning, match="at bits=2"):
        power_search(normal(2000), bits=2)


def test_the_high_resolution_error_has_one_minimum_where_the_fixed_point_is():
    u = jnp.abs(normal(50_000)) / jnp.max(jnp.abs(normal(50_000)))
    grid = np.linspace(0.3, 1.2, 46)
    error = np.asarray(jax.jit(jax.vmap(lambda a: power_bennett_mse(u, a)))(jnp.asarray(grid)))
    assert (np.diff(np.log(error), 2) > -1e-4).all()
    best = grid[error.argmin()]
    weights = np.asarray(u, float) ** (2 - 2 * best)
    assert abs(-weights.mean() / (weights * np.log(np.asarray(u, float))).mean() - best) < 0.03
    uniform = jnp.linspace(0, 1, 1001)
    assert abs(float(power_bennett_mse(uniform, 1.0)) - 1) < 0.01
    # against what is measured at 6 bits, relative to the uniform quantizer
    for a in (0.5, 0.8):
        predicted = float(power_bennett_mse(u, a) / power_bennett_mse(u, 1.0))
        assert abs(predicted - relative_mse(normal(50_000), a, 6)) < 0.02


def test_decode_tables():
    for bits in (2, 3, 4):
        codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
        levels = 2 ** (bits - 1) - 1
        expected = np.sign(codes) * np.minimum(np.abs(codes), levels) ** 2
        np.testing.assert_array_equal(power_decode_table(0.5, bits), expected)
    assert power_decode_table(0.5, 4).max() == 49
    for a in (0.5, 0.6, 1.0):
        table = power_decode_table(a, 5)
        value = power_dequantize(jnp.arange(-15, 16, dtype=jnp.int8), jnp.ones(1), a, bits=5)
        assert table.dtype == np.int8
        assert table.max() == 127
        np.testing.assert_allclose(table[1:] / 127, value, atol=0.5 / 127 + 1e-6)
        np.testing.assert_array_equal(jax.jit(power_decode_table, static_argnums=1)(a, 5), table)
    np.testing.assert_array_equal(jax.jit(power_decode_table, static_argnums=1)(0.5, 4)[8:], np.arange(8) ** 2)


def test_gradients_are_finite_at_zero_codes():
    codes = jnp.array([0.0, 1.0, -3.0, 7.0])
    slopes = jax.jit(jax.grad(lambda c, a: power_values(c, a, 7).sum(), argnums=(0, 1)))
    for a in (0.3, 1.0, 1.2):
        by_code, by_exponent = slopes(codes, a)
        assert np.isfinite(by_code).all()
        assert np.isfinite(by_exponent)
        assert (np.asarray(by_code) > 0).all()
    slope = jax.grad(lambda c: power_values(c, 1.0, 7).sum())(codes)
    np.testing.assert_allclose(slope, 1 / 7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_groups_of_zeros_and_dtypes(dtype):
    w = jnp.array([[0, 0, 0], [1, -2, 0.5]], dtype)
    codes, scale = power_quantize(w, 0.5, bits=4, axis=1)
    assert scale.dtype == dtype
    assert scale.shape == (2, 1)
    np.testing.assert_array_equal(codes[0], 0)
    value = power_dequantize(codes, scale, 0.5, bits=4)
    assert value.dtype == dtype
    np.testing.assert_array_equal(value[0], 0)
    under_vmap = jax.vmap(lambda row: power_quantize(row, 0.5, bits=4)[0])(w)
    np.testing.assert_array_equal(under_vmap, codes)


def test_bad_input_is_refused():
    w = jnp.ones(3)
    for message, call in {
        r"a must lie in \(0, inf\)": lambda: power_quantize(w, 0.0, bits=4),
        r"a must lie in \(0, inf\), got nan": lambda: power_quantize(w, float("nan"), bits=4),
        r"bits must be in \[2, 8\]": lambda: power_quantize(w, 0.5, bits=1),
        "w must be finite": lambda: power_quantize(w * jnp.nan, 0.5, bits=4),
        "w must not be empty": lambda: power_quantize(jnp.zeros(0), 0.5, bits=4),
        "axis must lie in": lambda: power_quantize(w, 0.5, bits=4, axis=1),
        "tree must have at least one array": lambda: power_search({}, bits=4),
        "tree must hold floats": lambda: power_search({"a": jnp.ones(3, int)}, bits=4),
        "p must lie in": lambda: power_search(w, bits=4, p=0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
