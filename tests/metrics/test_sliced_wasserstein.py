"""Sliced Wasserstein distance against direct formulas, SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from poise.metrics import sliced_wasserstein


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_prdc*.npz")
def test_golden(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        real, fake, projections = (jnp.asarray(data[name]) for name in ("real", "fake", "projections"))
        first = int(data["sliced_n"])
        np.testing.assert_allclose(sliced_wasserstein(real, fake, projections, 1), data["sliced_w1"], rtol=1e-12)
        np.testing.assert_allclose(
            sliced_wasserstein(real[:first], fake[:first], projections, 2), data["sliced_w2sq_first_n"], rtol=1e-12
        )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(2, 2), (3, 2), (6, 4), (5, 7)]))
def test_order_one_equals_scipy_for_unequal_numbers(seed, shape):
    rng = np.random.default_rng(seed)
    with jax.enable_x64():
        x, y = (rng.integers(-3, 4, size=rows) + rng.normal(size=rows).round(1) for rows in shape)
        distance = sliced_wasserstein(jnp.asarray(x)[:, None], jnp.asarray(y)[:, None], jnp.ones((1, 1)), 1)
        np.testing.assert_allclose(distance, scipy.stats.wasserstein_distance(x, y), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
@pytest.mark.parametrize("shape", [(4, 6), (5, 3), (6, 6)])
def test_unequal_numbers_equal_repeated_samples(p, shape):
    """Repeating every sample changes no distribution, and brings both sets to the same number."""
    rng = np.random.default_rng(0)
    n, m = shape
    x, y, projections = rng.normal(size=(n, 3)), rng.normal(size=(m, 3)), rng.normal(size=(5, 3))
    common = np.lcm(n, m)
    repeated = [np.sort(np.repeat(z, common // len(z), axis=0) @ projections.T, axis=0) for z in (x, y)]
    expected = (np.abs(repeated[0] - repeated[1]) ** p).mean()
    with jax.enable_x64():
        distance = sliced_wasserstein(*map(jnp.asarray, (x, y, projections)), p, block_size=2)
        np.testing.assert_allclose(distance, expected, rtol=1e-12)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), p=st.sampled_from([1, 2, 2.5]))
def test_of_a_shift(seed, p):
    rng = np.random.default_rng(seed)
    with jax.enable_x64():
        x, shift, projections = (jnp.asarray(rng.normal(size=shape)) for shape in ((9, 4), (4,), (6, 4)))
        expected = jnp.mean(jnp.abs(projections @ shift) ** p)
        np.testing.assert_allclose(sliced_wasserstein(x, x + shift, projections, p), expected, rtol=1e-10)
        assert sliced_wasserstein(x, x, projections, p) == 0


def test_gradients():
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        arguments = tuple(jnp.asarray(rng.normal(size=shape)) for shape in ((6, 2), (4, 2), (3, 2)))
        for p in (1, 2.5):
            check_grads(lambda *a, p=p: sliced_wasserstein(*a, p), arguments, order=1, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_descent_carries_samples_to_their_target(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (60, 2))
    y = 0.5 * jax.random.normal(keys[1], (90, 2)) + jnp.array([3.0, -1.0])
    angles = jnp.arange(16) * jnp.pi / 16
    directions = jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    gradient = jax.jit(jax.grad(lambda z: sliced_wasserstein(z, y, directions, 2)))
    start = sliced_wasserstein(x, y, directions, 2)
    for _ in range(60):
        x = x - 0.5 * len(x) * gradient(x)
    assert sliced_wasserstein(x, y, directions, 2) < 1e-3 * start


@pytest.mark.parametrize("p", [0.5, 0, -1, float("inf"), float("nan")])
def test_bad_order(p):
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="p must be finite and at least 1"):
        sliced_wasserstein(x, x, jnp.eye(2), p)


@pytest.mark.parametrize("projections", [jnp.ones((4, 3)), jnp.ones(2), jnp.ones((0, 2)), jnp.full((1, 2), jnp.nan)])
def test_bad_projections(projections, without_shape_checks):
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(x, x, projections, 1)
