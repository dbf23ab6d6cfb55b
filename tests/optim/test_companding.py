"""Companding functions: inverses, slopes, bounds, limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import companding, companding_bound, companding_grad, companding_inverse

KINDS = ("arctan", "tanh", "softsign", "identity")
quick = settings(max_examples=15, deadline=None)
positive = st.floats(0.05, 5.0)
values = jnp.linspace(-3.0, 3.0, 25)

forward = jax.jit(companding, static_argnums=3)
slope = jax.jit(companding_grad, static_argnums=3)
inverse = jax.jit(companding_inverse, static_argnums=3)
autodiff = jax.jit(
    jax.vmap(jax.grad(lambda v, a, b, kind: companding(v, a, b, kind), (0, 1, 2)), (0, None, None, None)),
    static_argnums=3,
)


@quick
@given(positive, positive, st.sampled_from(KINDS))
def test_inverse_oddness_monotonicity_and_slope(a, b, kind):
    with jax.enable_x64():
        v = b * np.linspace(-3.0, 3.0, 25)
        w = np.asarray(forward(v, a, b, kind))
        np.testing.assert_allclose(inverse(w, a, b, kind), v, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(forward(-v, a, b, kind), -w, rtol=1e-15)
        assert (np.diff(w) > 0).all()
        assert np.abs(w).max() < float(companding_bound(a, kind))
        np.testing.assert_allclose(slope(v, a, b, kind), autodiff(v, a, b, kind)[0], rtol=1e-9, atol=1e-12)


@quick
@given(positive, positive)
def test_arctan_in_closed_form(a, b):
    with jax.enable_x64():
        v = np.linspace(-3.0, 3.0, 25)
        np.testing.assert_allclose(forward(v, a, b, "arctan"), a * np.arctan(v / b), rtol=1e-14, atol=1e-16)
        np.testing.assert_allclose(inverse(v * a / 4, a, b, "arctan"), b * np.tan(v / 4), rtol=1e-13, atol=1e-16)
        by_v, by_a, by_b = autodiff(v, a, b, "arctan")
        np.testing.assert_allclose(by_v, a * b / (b**2 + v**2), rtol=1e-13)
        np.testing.assert_allclose(by_a, np.arctan(v / b), rtol=1e-13, atol=1e-16)
        np.testing.assert_allclose(by_b, -a * v / (b**2 + v**2), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(("kind", "order", "factor"), [("arctan", 3, 1 / 3), ("tanh", 3, 1 / 3), ("softsign", 2, 1.0)])
def test_wide_limit_is_the_identity(kind, order, factor):
    """With a = b the error is v^3/3a^2 for arctan and tanh, v|v|/a for softsign, to leading order."""
    with jax.enable_x64():
        v = np.linspace(0.5, 2.0, 7)
        for a in (1e2, 1e3):
            error = v - np.asarray(forward(v, a, a, kind))
            np.testing.assert_allclose(
                error, factor * v**order / a ** (order - 1), rtol=3 * (2 / a) ** (order - 1) + 1e-6
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_extreme_values(kind, dtype):
    """No NaN at zero nor at the largest values, neither in the value, the slope, nor any derivative."""
    top = 1e30 if dtype != jnp.float16 else 6e4
    v = jnp.array([0.0, top, -top, 1.0], dtype)
    w, dw = companding(v, 0.2, 0.1, kind), companding_grad(v, 0.2, 0.1, kind)
    derivatives = autodiff(v.astype(jnp.float32), 0.2, 0.1, kind)
    assert w.dtype == dw.dtype == dtype
    for x in (w, dw, *derivatives):
        assert bool(jnp.isfinite(x).all())
    if kind != "identity":
        eps = float(jnp.finfo(dtype).eps)
        assert float(jnp.abs(w).max()) <= float(companding_bound(0.2, kind)) * (1 + eps)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_inverse_beyond_the_bound_is_finite(kind):
    w = jnp.array([-1e9, -1.0, 1.0, float(companding_bound(0.1, kind))])
    v = inverse(w, 0.1, 0.1, kind)
    assert bool(jnp.isfinite(v).all())
    assert (jnp.sign(v) == jnp.sign(w)).all()
    assert bool(jnp.isfinite(jax.grad(lambda w: inverse(w, 0.1, 0.1, kind).sum())(w)).all())


def test_scales_broadcast():
    a = jnp.array([[0.5], [2.0]])
    w = companding(jnp.ones((2, 3)), a, 1.0)
    np.testing.assert_allclose(w, a * jnp.arctan(1.0) * jnp.ones((1, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "kind", "message"),
    [
        (0.0, 1.0, "arctan", r"a must lie in \(0, inf\), got 0.0"),
        (-1.0, 1.0, "arctan", "a must lie"),
        (float("inf"), 1.0, "tanh", "a must lie"),
        (float("nan"), 1.0, "tanh", "a must lie"),
        (1.0, 0.0, "softsign", r"b must lie in \(0, inf\), got 0.0"),
        (1.0, -2.0, "identity", "b must lie"),
    ],
)
def test_bad_scales(a, b, kind, message):
    for function in (companding, companding_grad, companding_inverse):
        with pytest.raises(ValueError, match=message):
            function(values, a, b, kind)
