"""LSQ: the official numbers, gradients in closed form, scale invariance, steps that are not positive, bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import lsq, lsq_init
from poise.quant.lsq import LEAST_STEP, lsq_codes

AXES = {"w": 1, "w_tensor": None, "a3": (0, 2), "a4": (0, 1, 3), "v3": (0, 1), "head": None, "pt": None}


def case_of(tag, x):
    """What a tag of the golden files says: bits, sign, axes and the variant of the code that it comes from."""
    bits = int(re.search(r"_b(\d)", tag)[1])
    if tag.startswith("pc_sym"):  # lsq-net: symmetric, one step per output channel, all entries counted in N
        axis = tuple(range(1, x.ndim))
        return {"bits": bits, "axis": axis}, {"symmetric": True, "grad_scale": (x.size * (2 ** (bits - 1) - 1)) ** -0.5}
    axis = AXES["w_tensor"] if tag.startswith("w_tensor") else AXES[tag.split("_")[0]]
    return {"bits": bits, "axis": axis, "signed": "unsigned" not in tag and "softmax" not in tag}, {}


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "lsq*.npz")
def test_official_quantizers(golden_file, quick_jit):
    data = np.load(golden_file)
    tags = [key.removesuffix("_s_init") for key in data.files if key.endswith("_s_init")]
    assert tags
    for tag in tags:
        x, g, expected_step = (data[f"{tag}_{key}"] for key in ("x", "g", "s_init"))
        options, variant = case_of(tag, x)
        doubled = not options.get("signed", True) and not tag.startswith("pt")
        initial = quick_jit(lambda x: lsq_init(x, **options, multiplier=4.0 if doubled else 2.0))(x)
        np.testing.assert_allclose(np.ravel(initial), np.ravel(expected_step), rtol=0, atol=1e-6, err_msg=tag)

        def both(x, step, g):
            y, pullback = jax.vjp(lambda x, step: lsq(x, step, **options, **variant), x, step)
            return y, *pullback(g)

        y, dx, ds = quick_jit(both)(x, data[f"{tag}_s"].reshape(initial.shape), g)
        for ours, key in ((y, "y"), (dx, "dx"), (ds, "ds")):
            theirs = data[f"{tag}_{key}"]
            np.testing.assert_allclose(np.ravel(ours), np.ravel(theirs), rtol=0, atol=1e-6, err_msg=f"{tag} {key}")


@functools.partial(jax.jit, static_argnames=("bits", "signed"))
def slopes(x, step, bits, signed):
    f = lambda x, s: lsq(x, s, bits=bits, signed=signed, axis=None, grad_scale=1.0).sum()  # noqa: E731
    return jax.grad(f, (0, 1))(x, step)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 8]), st.booleans())
def test_gradients_are_the_closed_forms(seed, bits, signed):
    rng = np.random.default_rng(seed)
    q_n, q_p = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    step = np.float32(rng.uniform(0.1, 1))
    x = (step * rng.uniform(-1.5 * q_n - 1, 1.5 * q_p + 1, (2, 9))).astype(np.float32)
    dx, ds = slopes(x, step, bits, signed)
    v = x / step
    inside = (v >= -q_n) & (v <= q_p)
    np.testing.assert_allclose(dx, inside, rtol=1e-6)
    expected = np.where(inside, np.round(v) - v, np.where(v < -q_n, -q_n, q_p)).sum()
    np.testing.assert_allclose(ds, expected, rtol=1e-4, atol=1e-4 * q_p)


def test_entries_on_the_grid_give_the_step_no_gradient(quick_jit):
    step = jnp.full((1, 1), 0.25)
    x = 0.25 * jnp.arange(-4.0, 4.0).reshape(2, 4)
    dx, ds = quick_jit(jax.grad(lambda x, s: lsq(x, s, bits=3, axis=None).sum(), (0, 1)))(x, step)
    assert float(ds[0, 0]) == 0.0
    assert (dx == 1).all()  # the least and the greatest code included


def test_four_times_the_entries_halve_the_gradients_scale(quick_jit):
    x = jnp.array([[0.1, 0.3]])
    slope = lambda x: quick_jit(jax.grad(lambda s: lsq(x, s, bits=4, axis=None).mean()))(jnp.full((1, 1), 0.2))  # noqa: E731
    np.testing.assert_allclose(slope(jnp.tile(x, (4, 1))), slope(x) / 2, rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(-4, 4))
def test_weights_and_steps_in_other_units(seed, exponent):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((3, 8)), jnp.float32)
    unit = 2.0**exponent
    step = lsq_init(x, bits=3, axis=1)
    np.testing.assert_array_equal(lsq(unit * x, unit * step, bits=3, axis=1), unit * lsq(x, step, bits=3, axis=1))


def test_steps_that_drift_below_zero_count_as_the_least_and_keep_their_gradient():
    x = jnp.linspace(-1.0, 1.0, 8)
    f = jax.jit(jax.value_and_grad(lambda s: lsq(x, s, bits=4, axis=None).sum()))
    value, slope = f(jnp.array([-0.1]))
    np.testing.assert_allclose(value, f(jnp.array([1e-5]))[0])
    np.testing.assert_allclose(slope, f(jnp.array([1e-5]))[1])
    assert slope != 0


def test_groups_of_zeros_have_a_step(quick_jit):
    x = jnp.zeros((2, 3))
    step = lsq_init(x, bits=4, axis=1)
    y, slope = quick_jit(jax.value_and_grad(lambda x: lsq(x, step, bits=4, axis=1).sum()))(x)
    assert (step > 0).all()
    assert y == 0
    np.testing.assert_allclose(slope, 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"bits must be in \[2, 8\], got 1"),
        ({"bits": 9}, r"bits must be in \[2, 8\]"),
        ({"bits": 0, "signed": False}, r"bits must be in \[1, 8\], got 0"),
        ({"x": jnp.ones((2, 3), jnp.int32)}, "x must hold floats"),
        ({"x": jnp.full((2, 3), jnp.nan)}, "x must be finite"),
        ({"step": jnp.ones((1, 3))}, r"step must have the shape \(2, 1\), one for each group of axis=1, got \(1, 3\)"),
        ({"step": jnp.array(1.0)}, "step must have the shape"),
        ({"step": jnp.array([[1.0], [0.0]])}, "step must lie in"),
        ({"step": jnp.array([[1.0], [jnp.inf]])}, "step must be finite"),
        ({"axis": 2}, "axis must lie in"),
        ({"symmetric": True, "signed": False}, "symmetric must be False"),
        ({"grad_scale": -1.0}, "grad_scale"),
    ],
)
def test_bad_input(options, message):
    arguments = {"x": jnp.ones((2, 3)), "step": jnp.ones((2, 1)), "bits": 4, "axis": 1} | options
    with pytest.raises(ValueError, match=message):
        lsq(**arguments)


def test_bad_input_of_the_initial_step():
    with pytest.raises(ValueError, match="x must not be empty"):
        lsq_init(jnp.ones((0, 3)), bits=4, axis=None)
    with pytest.raises(ValueError, match="multiplier"):
        lsq_init(jnp.ones(3), bits=4, axis=None, multiplier=0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bits", [2, 8])
def test_codes_times_the_step_are_what_lsq_gives(bits, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5)), dtype)
    step = lsq_init(x, bits=bits, axis=0).at[0, 0].set(LEAST_STEP / 4)
    codes, used = jax.jit(functools.partial(lsq_codes, bits=bits))(x, step)
    assert codes.dtype == jnp.int8
    assert used.dtype == jnp.float32
    assert float(used.min()) == np.float32(LEAST_STEP)
    np.testing.assert_array_equal((codes * used).astype(dtype), lsq(x, step, bits=bits, axis=0))
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    with pytest.raises(ValueError, match=r"bits must be in \[2, 8\], got 1"):
        lsq_codes(x, step, bits=1)
