"""Oscillation: the official traces with and without freezing, definitions by hand, scan, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import (
    freezing_init,
    freezing_update,
    oscillating_fraction,
    oscillation_init,
    oscillation_update,
)


@jax.jit
def trace(codes, momentum):
    """All states after the first, by scan."""

    def step(state, codes):
        state = oscillation_update(state, codes, momentum)
        return state, state

    return jax.lax.scan(step, oscillation_init(codes[0]), codes[1:])[1]


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "oscillation*.npz")
def test_official_tracking(golden_file):
    data = np.load(golden_file)
    prefixes = [key.removesuffix("x_int") for key in data.files if key.endswith("x_int")]
    assert prefixes
    for prefix in prefixes:
        threshold, momentum = float(prefix[3:-1]), float(data[prefix + "momentum"])
        given_codes = jnp.asarray(data[prefix + "x_int"])
        if threshold == 0:
            states = trace(given_codes, momentum)
        else:

            def step(state, codes):
                codes, state = freezing_update(state, codes, threshold=threshold, momentum=momentum)
                return state, (codes, state)

            codes, freezing = jax.lax.scan(step, freezing_init(given_codes[0]), given_codes[1:])[1]
            np.testing.assert_array_equal(codes, data[prefix + "y_int"][1:])
            np.testing.assert_array_equal(freezing.frozen, data[prefix + "frozen"][1:])
            assert freezing.frozen.any()
            states = freezing.oscillation
        np.testing.assert_allclose(states.frequency, data[prefix + "ema"][1:], rtol=0, atol=1e-6)
        np.testing.assert_array_equal(states.total, data[prefix + "total"][1:])


def test_what_counts_as_an_oscillation():
    """Back and forth counts, a drift does not, and neither does a pause between forth and back."""
    codes = jnp.array([[0, 0, 0, 0], [1, 1, 1, 0], [0, 2, 1, 0], [1, 3, 1, 0], [0, 4, 0, 0]], jnp.int8)
    states = trace(codes, 0.5)
    assert states.total[-1].tolist() == [3, 0, 1, 0]
    assert states.frequency[-1].tolist() == [0.875, 0.0, 0.5, 0.0]
    last = jax.tree.map(lambda x: x[-1], states)
    assert float(oscillating_fraction(last)) == 0.5
    assert float(oscillating_fraction(last, threshold=0.6)) == 0.25


def test_codes_may_jump_from_one_end_of_int8_to_the_other():
    states = trace(jnp.array([[-128], [127], [-128], [127]], jnp.int8), 0.01)
    assert states.total[-1].tolist() == [2]
    assert states.direction[:, 0].tolist() == [-1, 1, -1]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_mirrored_codes_oscillate_alike_and_floats_as_integers(seed):
    codes = np.random.default_rng(seed).integers(-2, 2, (20, 5))
    states = trace(jnp.asarray(codes, jnp.int8), 0.1)
    mirrored = trace(jnp.asarray(-1 - codes, jnp.float32), 0.1)
    np.testing.assert_array_equal(states.total, mirrored.total)
    np.testing.assert_array_equal(states.frequency, mirrored.frequency)


def test_bad_input():
    state = oscillation_init(jnp.zeros(3, jnp.int8))
    with pytest.raises(ValueError, match=r"codes must have the shape \(3,\) of the first ones, got \(2,\)"):
        oscillation_update(state, jnp.zeros(2, jnp.int8))
    with pytest.raises(ValueError, match="momentum"):
        oscillation_update(state, state.codes, momentum=1.5)
    with pytest.raises(ValueError, match="threshold"):
        oscillating_fraction(state, threshold=-1.0)
    with pytest.raises(ValueError, match="threshold"):
        freezing_update(freezing_init(state.codes), state.codes, threshold=2.0)
