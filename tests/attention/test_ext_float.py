import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.attention import (
    ExtFloat,
    ext_add,
    ext_cumsum,
    ext_div_to_float,
    ext_exp,
    ext_from_float,
    ext_log,
    ext_mul,
    ext_psum,
    ext_sum,
)

reals = st.floats(-20_000, 20_000, width=32)


def value(x):
    """log of an extended number in float64."""
    return np.log(np.asarray(x.mantissa, np.float64)) + np.asarray(x.exponent, np.float64) * np.log(2)


def close(a, b, rtol):
    """Equal up to a relative error of the numbers themselves."""
    np.testing.assert_allclose(value(a) - value(b), 0, atol=rtol)


@pytest.mark.golden
@pytest.mark.golden_pattern("attention", "two_pass_*.npz")
def test_official_pairs(golden_file):
    z = np.load(golden_file)
    single = jax.jit(ext_exp)(jnp.asarray(z["x_elem"]))
    np.testing.assert_array_equal(single.exponent, z["exponent_elem"])
    np.testing.assert_array_max_ulp(np.asarray(single.mantissa), z["mantissa_elem"], 4)
    for name in [name for name in z if name.startswith("sum_")]:
        case = name.split("_")[1]
        total = jax.jit(lambda x: ext_sum(ext_exp(x)))(jnp.asarray(z[f"x_{case}"]))
        assert float(total.exponent) == z[name][1]
        np.testing.assert_allclose(total.mantissa, z[name][0], rtol=1e-6)
        np.testing.assert_allclose(ext_log(total), z[f"logsumexp_{case}_f64"], rtol=1e-6, atol=1e-6)


def test_exponential_to_the_last_digits():
    x = np.linspace(-20_000, 20_000, 10_007).astype(np.float32)
    found = ext_exp(jnp.asarray(x))
    np.testing.assert_array_equal(found.exponent, np.round(x * np.float32(np.log2(np.e))))
    # log m + n log 2 = x, and a relative error of 5e-7 in m is one of 5e-7 there
    np.testing.assert_allclose(value(found) - x.astype(np.float64), 0, atol=5e-7)
    assert float(found.mantissa.min()) > 0.7
    assert float(found.mantissa.max()) < 1.416
    with jax.enable_x64():
        wide = ext_exp(jnp.asarray(x, jnp.float64))
        assert wide.mantissa.dtype == jnp.float64
        np.testing.assert_allclose(value(wide) - x.astype(np.float64), 0, atol=1e-11)


@settings(max_examples=8, deadline=None)
@given(st.lists(reals, min_size=4, max_size=4), st.randoms())
def test_order_of_addition_does_not_matter(numbers, random):
    x = jnp.array(numbers, jnp.float32)
    terms = [ext_exp(number) for number in x]
    tree = ext_sum(ext_exp(x))
    random.shuffle(terms)
    folded = functools.reduce(ext_add, terms)
    cumsum = jax.jit(lambda x: ext_cumsum(ext_exp(x)))
    scanned = jax.tree.map(lambda part: part[-1], cumsum(x))
    backwards = jax.tree.map(lambda part: part[-1], cumsum(x[::-1]))
    exact = np.logaddexp.reduce(np.array(numbers, np.float64))
    assert float(tree.exponent) == np.max(np.round(np.asarray(x) * np.float32(np.log2(np.e))))
    for total in (tree, folded, scanned, backwards):
        np.testing.assert_allclose(value(total) - exact, 0, atol=1e-6)
        assert total.exponent == tree.exponent


@settings(max_examples=8, deadline=None)
@given(reals, reals)
def test_arithmetic(a, b):
    x, y = ext_exp(jnp.float32(a)), ext_exp(jnp.float32(b))
    np.testing.assert_allclose(value(ext_mul(x, y)) - (a + b), 0, atol=1e-6)
    assert jax.tree.all(jax.tree.map(np.array_equal, ext_add(x, y), ext_add(y, x)))
    zero = ext_exp(-jnp.inf)
    assert jax.tree.all(jax.tree.map(np.array_equal, ext_add(x, zero), x))
    assert float(ext_log(ext_mul(x, zero))) == -np.inf
    assert float(ext_div_to_float(ext_mul(x, zero), y)) == 0
    one = ext_from_float(jnp.float32(1))
    close(ext_mul(x, one), x, 1e-11)
    with np.errstate(over="ignore", under="ignore"):
        quotient = np.exp(np.float64(a) - np.float64(b))
    found = float(ext_div_to_float(x, y))
    if 1.2e-38 < quotient < 3.4e38:
        np.testing.assert_allclose(found, quotient, rtol=1e-6)
    else:
        assert found <= 1.2e-38 if quotient < 1 else found > 3.4e38


@settings(max_examples=8, deadline=None)
@given(st.floats(-(2.0**127), 2.0**127, width=32, allow_subnormal=False), st.floats(2.0**-99, 2.0**99, width=32))
def test_plain_numbers_come_back(a, b):
    x, one = ext_from_float(jnp.float32(a)), ext_from_float(jnp.float32(1))
    assert float(ext_div_to_float(x, one)) == np.float32(a)
    assert a == 0 or 0.5 <= abs(float(x.mantissa)) < 1
    back = ext_div_to_float(ext_mul(x, ext_from_float(jnp.float32(b))), ext_from_float(jnp.float32(b)))
    np.testing.assert_allclose(back, np.float32(a), rtol=3e-7)


def test_powers_of_two_are_exact():
    one = ExtFloat(jnp.ones(5), jnp.array([-126.0, -1.0, 0.0, 1.0, 127.0]))
    unit = ExtFloat(jnp.ones(()), jnp.zeros(()))
    np.testing.assert_array_equal(ext_div_to_float(one, unit), 2.0 ** np.array([-126, -1, 0, 1, 127]))
    shifted = ext_sum(ext_exp(jnp.array([3.0, 4.0])))._asdict()
    # adding a multiple of log 2 to all terms moves the exponent alone
    moved = ext_sum(ExtFloat(*ext_exp(jnp.array([3.0, 4.0])))._replace(exponent=jnp.array([4.0, 6.0]) + 100))
    assert float(moved.mantissa) == float(shifted["mantissa"])
    assert float(moved.exponent) == float(shifted["exponent"]) + 100


def test_running_sums_along_any_axis():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 500, (3, 5)), jnp.float32)
    for axis in (0, 1, -1):
        expected = np.logaddexp.accumulate(np.asarray(x, np.float64), axis=axis)
        np.testing.assert_allclose(ext_log(ext_cumsum(ext_exp(x), axis)), expected, rtol=1e-6, atol=1e-5)


def test_sum_over_devices():
    x = jnp.asarray(np.random.default_rng(0).normal(0, 500, (8, 5)), jnp.float32)

    def total(block):
        return ext_log(ext_psum(ext_sum(ext_exp(block)), "data"))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda x: total(x[0]),
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("data"),
        out_specs=jax.sharding.PartitionSpec(),
    )
    exact = np.logaddexp.reduce(np.asarray(x, np.float64), axis=None)
    np.testing.assert_allclose(jax.jit(spread)(x), exact, rtol=1e-6)


def test_gradients_are_the_softmax_and_zero_where_nothing_is():
    x = jnp.array([1000.0, 1001.0, -jnp.inf, -3000.0])
    gradient = jax.grad(lambda x: ext_log(ext_sum(ext_exp(x))))(x)
    np.testing.assert_allclose(gradient, jax.nn.softmax(x), rtol=1e-6, atol=1e-7)
    empty = jax.grad(lambda x: jnp.where(jnp.isfinite(y := ext_log(ext_sum(ext_exp(x)))), y, 0))(jnp.full(3, -jnp.inf))
    np.testing.assert_array_equal(empty, 0)


def test_broken_numbers_stay_broken():
    for bad in (jnp.nan, jnp.inf):
        assert np.isnan(ext_log(ext_sum(ext_exp(jnp.array([1.0, bad])))))


def test_bad_input():
    for function in (ext_exp, ext_from_float):
        with pytest.raises(TypeError, match="x must have a floating dtype, got int32"):
            function(jnp.arange(3))
