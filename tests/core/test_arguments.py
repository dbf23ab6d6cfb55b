"""Checks of hyper-parameters: what passes, what is refused, and with which words."""

import jax
import jax.numpy as jnp
import optax
import pytest

from poise.core.arguments import check_choice, check_count, check_range, check_real


@pytest.mark.parametrize("value", [0.0, 0.5, jnp.float32(0.5), jnp.bfloat16(0.25), 0])
def test_range_lets_numbers_inside_pass(value):
    check_range("x", value, 0.0, 1.0, open_high=True)


@pytest.mark.parametrize("value", [1.0, -1e-9, float("nan"), float("inf"), jnp.array([0.5, 2.0])])
def test_range_refuses_numbers_outside(value):
    with pytest.raises(ValueError, match=r"x must lie in \[0, 1\), got"):
        check_range("x", value, 0.0, 1.0, open_high=True)


def test_range_refuses_what_is_no_number():
    with pytest.raises(TypeError, match="x must be a number, got 'a'"):
        check_range("x", "a")


def test_tracers_schedules_and_none_pass():
    jax.jit(lambda x: check_range("x", x, 5.0, 6.0))(1.0)
    jax.jit(lambda x: check_count("x", x, 5))(1)
    check_range("x", optax.constant_schedule(-1.0), 0.0)
    check_range("x", None, 0.0)


def test_counts():
    check_count("k", 3, 1, 3)
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\], got 4"):
        check_count("k", 4, 1, 3)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        check_count("k", 0)
    for bad in (2.0, True, "2"):
        with pytest.raises(TypeError, match="k must be an integer"):
            check_count("k", bad)


def test_choices():
    with pytest.raises(ValueError, match="kind must be one of a, b, got 'c'"):
        check_choice("kind", "c", ("a", "b"))


def test_complex_leaves():
    check_real("params", {"a": jnp.ones(2), "b": None})
    with pytest.raises(TypeError, match=r"params must be real, got complex64 at \['b'\]"):
        check_real("params", {"a": jnp.ones(2), "b": jnp.ones(2, jnp.complex64)})
