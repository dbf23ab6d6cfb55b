"""Energy distance against direct formulas, SciPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from poise.metrics import energy_distance


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_prdc*.npz")
def test_golden(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        distance = energy_distance(jnp.asarray(data["real"]), jnp.asarray(data["fake"]))
        np.testing.assert_allclose(distance, data["energy_distance"], rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(2, 2), (7, 4)]))
def test_is_the_square_of_scipys_in_one_dimension(seed, shape):
    rng = np.random.default_rng(seed)
    with jax.enable_x64():
        x, y = (rng.normal(size=rows) for rows in shape)
        distance = energy_distance(jnp.asarray(x)[:, None], jnp.asarray(y)[:, None], block_size=3)
        np.testing.assert_allclose(distance, scipy.stats.energy_distance(x, y) ** 2, rtol=1e-10, atol=1e-14)


def test_of_two_points_is_twice_their_distance():
    x, y = jnp.zeros((2, 3)), jnp.broadcast_to(jnp.array([2.0, 3.0, 6.0]), (3, 3))
    assert energy_distance(x, y) == 14.0


def test_identical_sets():
    for seed in range(10):
        x = jax.random.normal(jax.random.key(seed), (50, 3))
        assert 0 <= energy_distance(x, jnp.flip(x, axis=0)) < 2e-6


def test_gradients():
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        x, y = jnp.asarray(rng.normal(size=(6, 2))), jnp.asarray(rng.normal(size=(5, 2)))
        check_grads(lambda x, y: energy_distance(x, y, block_size=4), (x, y), order=1, rtol=1e-6)
        # A sample of y on one of x: that pair adds nothing, the others pull as before.
        x = jnp.array([[0.0], [4.0]])
        np.testing.assert_allclose(jax.grad(energy_distance)(x, jnp.array([[0.0], [0.0]])), [[0.5], [0.5]], atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_finds_what_means_and_covariances_hide(seed):
    """A ring has the moments of a Gaussian; the energy distance tells them apart."""
    keys = jax.random.split(jax.random.key(seed), 3)
    gaussian, other = jax.random.normal(keys[0], (2, 400, 2))
    angles = jax.random.uniform(keys[1], (400,), maxval=2 * jnp.pi)
    ring = jnp.sqrt(2.0) * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    assert energy_distance(gaussian, ring) > 5 * energy_distance(gaussian, other)
