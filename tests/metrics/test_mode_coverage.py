"""Mode coverage and the evenness of the modes' shares."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.metrics import mode_coverage, mode_share_kl

CENTERS = jnp.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), radius=st.sampled_from([1.0, 3.0]), min_share=st.sampled_from([0.01, 0.2]))
def test_equals_the_definition(seed, radius, min_share):
    rng = np.random.default_rng(seed)
    samples = rng.integers(-2, 13, size=(50, 2)).astype(np.float32)
    result = mode_coverage(samples, CENTERS, radius, min_share, block_size=16)
    distances = np.sqrt(((samples[:, None] - np.asarray(CENTERS)[None]) ** 2).sum(-1))
    nearest = distances.argmin(axis=1)
    shares = np.array([((nearest == mode) & (distances[:, mode] <= radius)).mean() for mode in range(4)])
    np.testing.assert_allclose(result.shares, shares, rtol=1e-6)
    np.testing.assert_allclose(result.quality, shares.sum(), rtol=1e-6)
    np.testing.assert_allclose(result.coverage, (shares >= np.float32(min_share)).mean(), rtol=1e-6)


def test_the_edge_and_the_least_share_count():
    samples = jnp.array([[3.0, 0.0], [0.0, 3.5], [10.0, 0.0], [10.0, 1.0]])
    result = mode_coverage(samples, CENTERS, radius=3.0, min_share=0.25)
    assert result.shares.tolist() == [0.25, 0.5, 0.0, 0.0]
    assert (result.coverage, result.quality) == (0.5, 0.75)
    assert mode_coverage(samples, CENTERS, radius=3.0, min_share=0.26).coverage == 0.25


def test_a_sample_between_two_modes_counts_once():
    result = mode_coverage(jnp.array([[5.0, 0.0], [5.0, 0.0]]), CENTERS, radius=100.0, min_share=0.5)
    assert result.shares.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_samples_that_are_not_finite_belong_to_no_mode():
    samples = jnp.array([[0.0, 0.0], [jnp.nan, 0.0], [jnp.inf, 10.0], [10.0, 10.0]])
    result = jax.jit(lambda s: mode_coverage(s, CENTERS, 1.0, 0.1))(samples)
    assert result.shares.tolist() == [0.25, 0.0, 0.0, 0.25]
    assert result.quality == 0.5


def test_traced_thresholds():
    samples = jax.random.normal(jax.random.key(0), (20, 2))
    traced = jax.jit(lambda r, s: mode_coverage(samples, CENTERS, r, s))(1.0, 0.1)
    jax.tree.map(np.testing.assert_array_equal, traced, mode_coverage(samples, CENTERS, 1.0, 0.1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("radius", value) for value in (0.0, -1.0, float("nan"), float("inf"))),
        *(("min_share", value) for value in (0.0, 1.5, float("nan"))),
    ],
)
def test_bad_thresholds(name, value):
    arguments = {"radius": 1.0, "min_share": 0.1, name: value}
    with pytest.raises(ValueError, match=f"{name} must be"):
        mode_coverage(CENTERS, CENTERS, **arguments)


@pytest.mark.parametrize("seed", range(5))
def test_a_collapsed_generator_is_caught(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    full = jax.random.normal(keys[0], (400, 2)) + jnp.repeat(CENTERS, 100, axis=0)
    collapsed = jax.random.normal(keys[1], (400, 2)) + CENTERS[1]
    fair, poor = (mode_coverage(x, CENTERS, radius=3.0, min_share=0.05) for x in (full, collapsed))
    assert (fair.coverage, poor.coverage) == (1.0, 0.25)
    assert fair.quality > 0.97
    assert mode_share_kl(fair.shares) < 0.01
    np.testing.assert_allclose(mode_share_kl(poor.shares), np.log(4), rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), zeros=st.integers(0, 4))
def test_kl_equals_scipy(seed, zeros):
    rng = np.random.default_rng(seed)
    shares, target = rng.uniform(0.1, 1.0, size=5), rng.uniform(0.1, 1.0, size=5)
    shares[:zeros] = 0
    with jax.enable_x64():
        for weights in (target, None):
            kl = mode_share_kl(jnp.asarray(shares), None if weights is None else jnp.asarray(weights))
            expected = scipy.stats.entropy(shares, np.ones(5) if weights is None else weights)
            np.testing.assert_allclose(kl, expected, rtol=1e-10, atol=1e-14)


def test_kl_of_nothing_is_the_largest_possible():
    target = jnp.array([0.7, 0.1, 0.2])
    np.testing.assert_allclose(mode_share_kl(jnp.zeros(3), target), np.log(10), rtol=1e-6)
    np.testing.assert_allclose(mode_share_kl(jnp.array([0.0, 5.0, 0.0]), target), np.log(10), rtol=1e-6)


def test_kl_gradients():
    with jax.enable_x64():
        shares, target = jnp.array([0.5, 0.3, 0.2]), jnp.array([0.2, 0.2, 0.6])
        log_ratio = jnp.log(shares / target)
        expected = log_ratio - (shares * log_ratio).sum()
        np.testing.assert_allclose(jax.grad(mode_share_kl)(shares, target), expected, rtol=1e-10)
    for shares in (jnp.array([0.5, 0.0, 0.5]), jnp.zeros(3)):
        assert np.isfinite(jax.grad(mode_share_kl)(shares)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_kl_dtypes(dtype):
    with jax.enable_x64(dtype == "float64"):
        kl = jax.jit(mode_share_kl)(jnp.array([0.25, 0.75], dtype))
        assert kl.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_allclose(kl, np.log(2) + 0.25 * np.log(0.25) + 0.75 * np.log(0.75), rtol=1e-5)


def test_kl_over_a_batch():
    shares = jnp.array([[0.5, 0.5], [1.0, 0.0]])
    np.testing.assert_allclose(jax.vmap(mode_share_kl)(shares), [0.0, np.log(2)], atol=1e-7)


@pytest.mark.parametrize(
    ("shares", "target", "name"),
    [
        (jnp.array([0.5, -0.1]), None, "shares must be non-negative"),
        (jnp.array([0.5, jnp.nan]), None, "shares"),
        (jnp.zeros((2, 2)), None, "shares must have 1 axes"),
        (jnp.zeros(0), None, "shares must hold at least one mode"),
        (jnp.ones(2), jnp.ones(3), "target must have the shape"),
        (jnp.ones(2), jnp.array([1.0, 0.0]), "target must be positive"),
        (jnp.ones(2), jnp.array([1.0, jnp.inf]), "target must be finite"),
    ],
)
def test_bad_shares(shares, target, name, without_shape_checks):
    with pytest.raises(ValueError, match=name):
        mode_share_kl(shares, target)
