"""StatsQ: the official numbers, its levels, XNOR at one bit, symmetries, the confidence mask, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import high_confidence_mask, statsq, statsq_codes

quick = settings(max_examples=20, deadline=None)
numbers, widths = st.integers(0, 10**6), st.integers(1, 8)


def draw(seed, shape=(4, 9)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "statsq*.npz")
def test_official_quantizer(golden_file, quick_jit):
    data = np.load(golden_file)
    prefixes = [key.removesuffix("w_hat") for key in data.files if key.endswith("w_hat")]
    assert prefixes
    for prefix in prefixes:
        bits = int(prefix[1 : prefix.index("_")])

        def everything(w, g):
            w_hat, pullback = jax.vjp(lambda w: statsq(w, bits=bits, axis=1), w)
            return *statsq_codes(w, bits=bits, axis=1), w_hat, pullback(g)[0]

        codes, scale, w_hat, dw = quick_jit(everything)(data[prefix + "w"], data[prefix + "g"])
        np.testing.assert_array_equal(codes, data[prefix + "codes"])
        np.testing.assert_allclose(scale, data[prefix + "scale"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(w_hat, data[prefix + "w_hat"], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(dw, data[prefix + "dw"])
    np.testing.assert_allclose(statsq(data["x3"], bits=3, axis=(0, 2)), data["x3_hat"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(statsq(data["x4"], bits=4, axis=(0, 1, 3)), data["x4_hat"], rtol=0, atol=1e-6)


@quick
@given(numbers)
def test_one_bit_is_xnor(seed):
    w = draw(seed)
    expected = jnp.sign(w) * jnp.mean(jnp.abs(w), axis=1, keepdims=True)
    np.testing.assert_array_equal(statsq(w, bits=1, axis=1), expected)


@quick
@given(numbers, widths, st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_codes_and_scale_give_the_weights_bit_for_bit(seed, bits, dtype):
    """As odd integers, which is what a product of integers takes."""
    w = draw(seed).astype(dtype)
    codes, alpha = statsq_codes(w, bits=bits, axis=1)
    assert codes.dtype == jnp.int8
    odd = 2 * codes.astype(jnp.int32) + 1
    rebuilt = (alpha.astype(jnp.float32) / 2**bits * odd).astype(dtype)
    np.testing.assert_array_equal(statsq(w, bits=bits, axis=1), rebuilt)
    n = 2 ** (bits - 1)
    assert (jnp.abs(rebuilt.astype(jnp.float32)) <= alpha.astype(jnp.float32) * (1 - 0.5 / n) * 1.01).all()


@quick
@given(numbers, widths, st.integers(-5, 5))
def test_other_units(seed, bits, exponent):
    w, unit = draw(seed), 2.0**exponent
    np.testing.assert_array_equal(statsq(unit * w, bits=bits, axis=1), unit * statsq(w, bits=bits, axis=1))


@quick
@given(numbers, widths)
def test_negated_weights_have_mirrored_codes(seed, bits):
    w = draw(seed)
    np.testing.assert_array_equal(statsq_codes(-w, bits=bits, axis=1)[0], -1 - statsq_codes(w, bits=bits, axis=1)[0])


def test_two_bits_have_four_levels_and_no_zero():
    w = jnp.array([[-1.9, -0.4, 0.0, 0.1, 1.6]])
    alpha = 2 * 4.0 / 5
    np.testing.assert_allclose(
        statsq(w, bits=2, axis=1), alpha * jnp.array([[-0.75, -0.25, 0.25, 0.25, 0.75]]), rtol=1e-6
    )


def test_the_derivative_is_the_identitys_and_none_flows_through_the_scale():
    w = jnp.array([[-9.0, 0.0, 0.3], [0.0, 0.0, 0.0]])
    g = jnp.arange(6.0).reshape(2, 3)
    y, pullback = jax.vjp(lambda w: statsq(w, bits=2, axis=1), w)
    np.testing.assert_array_equal(pullback(g)[0], g)
    assert not y[1].any()
    assert not jax.grad(lambda w: statsq_codes(w, bits=2, axis=1)[1].sum())(w).any()


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "cga*.npz")
def test_official_mask(golden_file):
    data = np.load(golden_file)
    prefixes = [key.removesuffix("frozen") for key in data.files if key.startswith("b") and key.endswith("_frozen")]
    assert prefixes
    for prefix in prefixes:
        bits, boundary_range = int(prefix[1 : prefix.index("_")]), float(prefix.split("_br")[1].removesuffix("_"))
        mask = high_confidence_mask(data[prefix + "w"], bits=bits, boundary_range=boundary_range, axis=1)
        np.testing.assert_array_equal(mask, data[prefix + "frozen"].astype(bool), err_msg=prefix)


@quick
@given(numbers, st.integers(1, 4))
def test_the_widest_band_frees_all_but_outer_half_cells_and_clipped_weights(seed, bits):
    w, n = draw(seed), 2 ** (bits - 1)
    u = n * np.clip(np.asarray(w) / (2 * np.abs(w).mean(1, keepdims=True)), -1, 1) - 0.5
    mask = high_confidence_mask(w, bits=bits, boundary_range=0.5, axis=1)
    clear = np.minimum(np.abs(u + n), np.abs(u - n + 1)) > 1e-5  # away from the ends, where rounding decides
    np.testing.assert_array_equal(np.asarray(~mask)[clear], ((u >= -n) & (u <= n - 1))[clear])


def test_a_band_of_no_width_frees_what_sits_on_a_threshold():
    w = jnp.array([[1.0, -0.5, 0.0, 1.5, -1.0, 2.0]])  # alpha = 2: thresholds at -1, 0 and 1
    mask = high_confidence_mask(w, bits=2, boundary_range=0.0, axis=1)
    assert mask.tolist() == [[False, True, False, True, False, True]]


@pytest.mark.parametrize("function", [statsq, statsq_codes])
def test_bad_input(function):
    for w, bits, axis, message in [
        (jnp.ones((2, 3)), 0, 1, r"bits must be in \[1, 8\], got 0"),
        (jnp.ones((2, 3)), 9, 1, "bits must be in"),
        (jnp.ones((2, 3)), 2, 2, "axis must lie in"),
        (jnp.ones((2, 3), jnp.int32), 2, 1, "w must hold floats"),
        (jnp.full((2, 3), jnp.nan), 2, 1, "w must be finite"),
        (jnp.ones((0, 3)), 2, None, "w must not be empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(w, bits=bits, axis=axis)


@pytest.mark.parametrize("boundary_range", [-0.1, 0.51, np.nan])
def test_bad_bands(boundary_range):
    with pytest.raises(ValueError, match="boundary_range must lie in"):
        high_confidence_mask(jnp.ones((2, 3)), bits=2, boundary_range=boundary_range, axis=1)
