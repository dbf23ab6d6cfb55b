"""Rounding, clamping and scaling: values, straight-through gradients, the ends of the clamp, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import clamp_inclusive, grad_scale, round_ste

FUNCTIONS = {
    "round_ste": round_ste,
    "clamp_inclusive": lambda x: clamp_inclusive(x, -2, 1),
    "grad_scale": lambda x: grad_scale(x, 0.25),
}
every = pytest.mark.parametrize("name", FUNCTIONS)


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6, width=32))
def test_rounding_is_half_to_even_with_the_identitys_derivative(value):
    out, slope = jax.value_and_grad(round_ste)(jnp.float32(value))
    assert float(out) == float(np.round(np.float32(value)))
    assert float(slope) == 1.0


def test_the_clamps_derivative_is_1_at_its_ends_and_0_outside():
    """Where `jnp.clip` gives 1/2."""
    x = jnp.array([-2.1, -2.0, 0.0, 1.0, 1.1])
    clamp = jax.jit(jax.grad(lambda x: (clamp_inclusive(x, -2.0, 1.0) * jnp.arange(1.0, 6.0)).sum()))
    assert clamp(x).tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]
    clip = jax.grad(lambda x: jnp.clip(x, -2.0, 1.0).sum())(x)
    assert clip.tolist() == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_bounds_broadcast_and_are_constants():
    x, hi = jnp.arange(6.0).reshape(2, 3), jnp.array([[1.0], [4.0]])
    out = clamp_inclusive(x, 0.0, hi)
    assert out.tolist() == [[0.0, 1.0, 1.0], [3.0, 4.0, 4.0]]
    assert not jax.grad(lambda hi: clamp_inclusive(x, 0.0, hi).sum())(hi).any()


def test_grad_scale_by_group():
    x, c = jnp.ones((2, 3)), jnp.array([[2.0], [0.0]])
    assert jax.grad(lambda x: grad_scale(x, c).sum())(x).tolist() == [[2.0] * 3, [0.0] * 3]


@every
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes_are_kept(name, dtype):
    with jax.enable_x64():
        x = jnp.array([-3.0, 0.4, 1.0], dtype)
        assert FUNCTIONS[name](x).dtype == dtype
        assert jax.grad(lambda x: FUNCTIONS[name](x).sum())(x).dtype == dtype


@every
def test_jit_and_vmap_change_nothing(name):
    x = jnp.linspace(-3, 3, 12).reshape(3, 4)
    expected = FUNCTIONS[name](x)
    np.testing.assert_array_equal(jax.jit(FUNCTIONS[name])(x), expected)
    np.testing.assert_array_equal(jax.vmap(FUNCTIONS[name])(x), expected)


@every
def test_bad_input(name):
    with pytest.raises(ValueError, match="x must hold floats, got int32"):
        FUNCTIONS[name](jnp.arange(3))
    with pytest.raises(ValueError, match="x must be finite, got 2 entries"):
        FUNCTIONS[name](jnp.array([1.0, jnp.nan, jnp.inf]))


def test_bad_bounds_and_factors():
    with pytest.raises(ValueError, match="lo must not exceed hi"):
        clamp_inclusive(jnp.ones(2), 1.0, 0.0)
    with pytest.raises(ValueError, match="c must broadcast"):
        grad_scale(jnp.ones(2), jnp.ones((3, 2)))
