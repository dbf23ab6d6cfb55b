"""Scales and zero points: the reference's numbers, optimality of the search, groups, bad input."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import absmax_scale, fake_quantize, minmax_qparams, mse_qparams

CASE = re.compile(r"b(?P<bits>\d)_(?P<group>ch|pt)_(?P<kind>asym|sym)_(?P<rule>mm|mse)_delta")


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "flexround.npz")
def test_reference_scales_and_zero_points(golden_file, quick_jit):
    data = np.load(golden_file)
    cases = [match for key in data.files if (match := CASE.fullmatch(key))]
    assert cases
    for case in cases:
        bits, axis = int(case["bits"]), 1 if case["group"] == "ch" else None
        if case["kind"] == "sym" and case["rule"] == "mm":
            scale, zero_point = absmax_scale(data["w"], bits, axis), jnp.zeros(())
        else:
            search = {"mm": minmax_qparams, "mse": mse_qparams}[case["rule"]]
            options = {"symmetric": True} if case["kind"] == "sym" else {}
            scale, zero_point = quick_jit(lambda w: search(w, bits, axis, **options))(data["w"])
        expected = data[case[0]]
        np.testing.assert_allclose(np.ravel(scale), np.ravel(expected), rtol=1e-6, err_msg=case[0])
        zeros = data[case[0].replace("delta", "zero_point")]
        np.testing.assert_array_equal(np.broadcast_to(np.ravel(zero_point), zeros.size), np.ravel(zeros))


def test_the_search_finds_the_least_error_of_its_grid(quick_jit):
    rng = np.random.default_rng(0)
    x, bits, grid = rng.standard_normal(30), 3, 8
    with jax.enable_x64():
        scale, zero = quick_jit(lambda x: mse_qparams(x, bits, None, grid=grid, norm=2))(x)
    width, top, errors = x.max() - x.min(), 2**bits - 1, {}
    for i in range(1, grid + 1):
        for z in range(top + 1):
            delta = width * i / grid / top
            codes = np.clip(np.round(x / delta), -z, top - z)
            errors[(delta, z)] = np.mean((x - delta * codes) ** 2)
    best = min(errors, key=errors.__getitem__)
    np.testing.assert_allclose(scale[0], best[0], rtol=1e-12)
    assert int(zero[0]) == best[1]


SEARCH = jax.jit(mse_qparams, static_argnames=("bits", "axis", "norm", "grid", "symmetric"))


def test_one_sided_data_keep_their_side():
    x = jnp.linspace(0.5, 1.0, 40)
    assert SEARCH(x, 2, None, grid=4)[1].tolist() == [0]
    assert SEARCH(-x, 2, None, grid=4)[1].tolist() == [3]


def test_the_symmetric_search_is_no_worse_than_the_largest_magnitude():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 50)), jnp.float32)
    scale, zero = SEARCH(x, 3, 1, norm=2, grid=20, symmetric=True)
    assert not zero.any()
    searched, largest = (
        np.mean((fake_quantize(x, s, bits=3) - x) ** 2, axis=1) for s in (scale, absmax_scale(x, 3, 1))
    )
    assert (searched <= largest).all()
    assert (searched < largest).any()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.125, 8.0, width=32))
def test_scales_are_homogeneous(seed, factor):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, 4)), jnp.float32)
    np.testing.assert_allclose(absmax_scale(factor * x, 4, (0, 2)), factor * absmax_scale(x, 4, (0, 2)), rtol=1e-6)
    np.testing.assert_allclose(minmax_qparams(factor * x, 4, -1)[0], factor * minmax_qparams(x, 4, 2)[0], rtol=1e-6)


def test_groups_of_zeros():
    x = jnp.array([[0.0, 0.0], [1.0, -2.0]])
    assert absmax_scale(x, 4, 1)[0] == 0
    for search in (minmax_qparams, lambda *args: SEARCH(*args, grid=4)):
        scale, zero = search(x, 4, 1)
        assert scale[0] > 0
        assert not fake_quantize(x, scale, zero, bits=4, signed=False)[0].any()


def test_dtypes_jit_and_vmap():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 5)), jnp.bfloat16)
    assert absmax_scale(x, 4, 1).dtype == minmax_qparams(x, 4, 1)[0].dtype == jnp.bfloat16
    x = x.astype(jnp.float32)
    for a, b, c in zip(
        minmax_qparams(x, 2, -1),
        jax.jit(lambda x: minmax_qparams(x, 2, -1))(x),
        jax.vmap(lambda x: minmax_qparams(x, 2, -1))(x),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize("function", [absmax_scale, minmax_qparams, mse_qparams])
def test_bad_input(function):
    for x, bits, axis, message in [
        (jnp.ones((2, 3)), 0, 0, "bits must be in"),
        (jnp.ones((2, 3)), 4, 2, r"axis must lie in \[-2, 1\]"),
        (jnp.ones((2, 3)), 4, (0, -2), "axis must name every axis at most once"),
        (jnp.ones((2, 3), jnp.int8), 4, 0, "x must hold floats"),
        (jnp.full((2, 3), jnp.inf), 4, 0, "x must be finite"),
        (jnp.ones((0, 3)), 4, 0, r"x must not be empty, got shape \(0, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            function(x, bits, axis)


def test_bad_searches():
    with pytest.raises(ValueError, match="norm"):
        mse_qparams(jnp.ones(3), 4, None, norm=0)
    with pytest.raises(ValueError, match="grid"):
        mse_qparams(jnp.ones(3), 4, None, grid=0)
