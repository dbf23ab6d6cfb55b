"""Precision, recall, density and coverage against official code, a plain reference, and what they are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.metrics import PRDC, prdc


def reference(real, fake, k):
    """The definition, written out with all distances at once."""

    def distances(a, b):
        return np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))

    def radii(a):
        table = distances(a, a)
        np.fill_diagonal(table, np.inf)
        return np.sort(table, axis=1)[:, k - 1]

    between = distances(real, fake)
    in_real = between < radii(real)[:, None]
    in_fake = between < radii(fake)[None]
    return (
        in_real.any(axis=0).mean(),
        in_fake.any(axis=1).mean(),
        in_real.sum(axis=0).mean() / k,
        (between.min(axis=1) < radii(real)).mean(),
    )


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_prdc*.npz")
@pytest.mark.parametrize("block_size", [128, 33])
def test_golden(golden_file, block_size):
    data = np.load(golden_file)
    with jax.enable_x64():
        scores = prdc(
            jnp.asarray(data["real"]), jnp.asarray(data["fake"]), k=int(data["nearest_k"]), block_size=block_size
        )
        # Counts are exact; what may differ is the rounding of a quotient.
        for name in PRDC._fields:
            assert float(getattr(scores, name)) == pytest.approx(float(data[name]), rel=4e-16)


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_prdc*.npz")
def test_golden_in_float32(golden_file):
    data = np.load(golden_file)
    scores = prdc(
        jnp.asarray(data["real"], jnp.float32), jnp.asarray(data["fake"], jnp.float32), k=int(data["nearest_k"])
    )
    for name in PRDC._fields:
        assert float(getattr(scores, name)) == pytest.approx(float(data[name]), rel=3e-7)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    case=st.sampled_from([(6, 6, 1, 5), (9, 14, 2, 1), (20, 11, 3, 2)]),
    levels=st.sampled_from([2, 4, 100]),
)
def test_equals_the_definition_with_ties_and_duplicates(seed, case, levels):
    n, m, dim, k = case
    rng = np.random.default_rng(seed)
    real, fake = (rng.integers(0, levels, size=(rows, dim)).astype(np.float32) for rows in (n, m))
    np.testing.assert_allclose(prdc(real, fake, k=k), reference(real, fake, k), rtol=2e-7)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), case=st.sampled_from([(1, 1), (5, 30), (36, 2)]))
def test_identical_sets_are_perfect(seed, case):
    k, dim = case
    samples = jax.random.normal(jax.random.key(seed), (37, dim))
    assert prdc(samples, samples, k=k, block_size=10) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_near_neighbours_far_from_the_origin_keep_their_places(offset):
    # With |x|^2 + |y|^2 - 2xy, float32 distances of 0.01 around 1e3 would be noise.
    grid = (np.random.default_rng(0).permutation(64)[:, None] / 64).astype(np.float32)
    samples = np.concatenate([grid, np.roll(grid, 1, axis=0)], axis=1) + np.float32(offset)
    np.testing.assert_allclose(
        prdc(samples[:40], samples[30:], k=3), reference(samples[:40], samples[30:], 3), rtol=2e-7
    )


def test_sets_far_apart_share_nothing():
    samples = jax.random.normal(jax.random.key(0), (20, 2))
    assert prdc(samples, samples + 100.0) == (0.0, 0.0, 0.0, 0.0)


def test_radius_excludes_the_sample_itself_and_the_edge():
    real = jnp.array([[0.0], [1.0], [3.0]])  # first neighbours at 1, 1, 2
    edge, inside = jnp.array([[2.0], [9.0]]), jnp.array([[1.875], [9.0]])
    assert prdc(real, edge, k=1).precision == 0.5  # inside the ball of 3 alone
    np.testing.assert_allclose(prdc(real, edge, k=1).coverage, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(prdc(real, inside, k=1).coverage, 2 / 3, rtol=1e-6)


def test_samples_repeated_more_than_k_times_have_empty_balls():
    samples = jnp.repeat(jnp.array([[0.0], [5.0]]), 4, axis=0)
    assert prdc(samples, samples, k=3) == (0.0, 0.0, 0.0, 0.0)


def test_samples_that_are_not_finite_lie_in_no_ball():
    real = jax.random.normal(jax.random.key(0), (30, 2))
    fake = jax.random.normal(jax.random.key(1), (20, 2))
    clean = prdc(real, fake, k=2)
    spoiled = jax.jit(lambda r, f: prdc(r, f, k=2))(
        jnp.concatenate([real, jnp.array([[jnp.nan, 0.0], [jnp.inf, jnp.inf]])]),
        jnp.concatenate([fake, jnp.array([[0.0, jnp.nan], [-jnp.inf, 0.0], [jnp.inf, jnp.inf]])]),
    )
    share_real, share_fake = 30 / 32, 20 / 23
    expected = [a * b for a, b in zip(clean, (share_fake, share_real, share_fake, share_real), strict=True)]
    np.testing.assert_allclose(spoiled, expected, rtol=1e-6)


@pytest.mark.parametrize("k", [0, -1, 20, 100])
def test_k_out_of_range(k):
    samples = jax.random.normal(jax.random.key(0), (30, 2))
    with pytest.raises(ValueError, match=rf"k must be between 1 and .*19.*got {k}"):
        prdc(samples, samples[:20], k=k)


@pytest.mark.parametrize("seed", range(5))
def test_each_score_falls_where_it_should(seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    centers = jnp.array([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0], [8.0, 8.0]])
    real, good = (jax.random.normal(key, (400, 2)) + jnp.repeat(centers, 100, axis=0) for key in keys[:2])
    half = jax.random.normal(keys[2], (400, 2)) + jnp.repeat(centers[:2], 200, axis=0)
    noisy = good + 6 * jax.random.normal(keys[3], (400, 2))
    fair, dropped, blurred = prdc(real, good), prdc(real, half), prdc(real, noisy)
    assert min(fair.precision, fair.recall, fair.coverage) > 0.9
    assert abs(fair.density - 1) < 0.15
    # Dropped modes cost recall and coverage, not precision; noise costs precision and density, not recall.
    assert dropped.recall < 0.6
    assert dropped.coverage < 0.6
    assert dropped.precision > 0.9
    assert blurred.precision < 0.6
    assert blurred.density < 0.6
    assert blurred.recall > 0.8


@pytest.mark.parametrize("seed", range(5))
def test_one_outlier_fools_precision_but_not_density(seed):
    """Naeem et al., section 3.1: one far real sample has a huge ball, in which bad samples count as precise."""
    keys = jax.random.split(jax.random.key(seed), 2)
    real = jax.random.normal(keys[0], (300, 2)).at[0].set(jnp.array([20.0, 0.0]))
    bad = jax.random.normal(keys[1], (300, 2)) + jnp.array([25.0, 5.0])
    scores = prdc(real, bad)
    assert scores.precision > 0.95
    assert scores.density < 0.25
    assert scores.coverage < 0.01
