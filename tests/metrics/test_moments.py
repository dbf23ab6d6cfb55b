"""Mean and covariance, at once and over a stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.metrics import finalize_moments, init_moments, merge_moments, moments, update_moments


def assert_moments(actual, expected, rtol):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def samples(n=40, dim=3, seed=0, dtype=np.float64):
    return (np.random.default_rng(seed).normal(size=(n, dim)) * [1.0, 10.0, 0.1] + [0.0, 5.0, -1.0]).astype(dtype)


def test_equals_numpy():
    with jax.enable_x64():
        x = samples()
        assert_moments(moments(jnp.asarray(x)), (x.mean(0), np.cov(x, rowvar=False)), rtol=1e-13)


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.sampled_from([1, 8, 16, 39]), max_size=4, unique=True))
def test_any_stream_gives_the_moments_of_all(cuts):
    with jax.enable_x64():
        x = jnp.asarray(samples())
        running = init_moments(dim=3, dtype=jnp.float64)
        for batch in np.split(x, sorted(cuts)):
            running = update_moments(running, jnp.asarray(batch))
        assert running.count == 40
        assert_moments(finalize_moments(running), moments(x), rtol=1e-13)


def test_merging_is_order_free_and_empty_sets_are_neutral():
    with jax.enable_x64():
        empty = init_moments(dim=3, dtype=jnp.float64)
        a, b, c = (update_moments(empty, jnp.asarray(samples(n, seed=n))) for n in (5, 1, 17))
        left, right = merge_moments(merge_moments(a, b), c), merge_moments(a, merge_moments(c, b))
        assert_moments(left, right, rtol=1e-13)
        for merged in (merge_moments(a, empty), merge_moments(empty, a)):
            jax.tree.map(np.testing.assert_array_equal, merged, a)
        jax.tree.map(np.testing.assert_array_equal, merge_moments(empty, empty), empty)


def test_scan_and_jit():
    x = jnp.asarray(samples(dtype=np.float32))

    @jax.jit
    def stream(batches):
        running, _ = jax.lax.scan(lambda r, batch: (update_moments(r, batch), None), init_moments(dim=3), batches)
        return finalize_moments(running)

    assert_moments(stream(x.reshape(8, 5, 3)), moments(x), rtol=1e-5)


def test_vmapped_streams_merge():
    x = jnp.asarray(samples(dtype=np.float32))
    parts = jax.vmap(lambda batch: update_moments(init_moments(dim=3), batch))(x.reshape(2, 20, 3))
    merged = merge_moments(*(jax.tree.map(lambda leaf, i=i: leaf[i], parts) for i in range(2)))
    assert_moments(finalize_moments(merged), moments(x), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_batches_are_cast_to_the_dtype_of_the_stream(dtype):
    with jax.enable_x64():
        batch = jnp.asarray(samples(), dtype)
        for kept in (jnp.float32, jnp.float64):
            running = update_moments(init_moments(dim=3, dtype=kept), batch)
            assert (running.count.dtype, running.mean.dtype, running.scatter.dtype) == (jnp.int32, kept, kept)
            exact = np.asarray(batch, np.float64)
            assert_moments(finalize_moments(running), (exact.mean(0), np.cov(exact, rowvar=False)), rtol=1e-5)


def test_a_large_mean_costs_no_digits():
    # Sums of squares in float32 would leave nothing of a variance of 1 beside a squared mean of 1e8.
    x = np.random.default_rng(0).integers(-2, 3, size=(1000, 2)).astype(np.float32) + np.float32(1e4)
    running = init_moments(dim=2)
    for batch in np.split(x, 10):
        running = update_moments(running, jnp.asarray(batch))
    np.testing.assert_allclose(finalize_moments(running).cov, np.cov(x.astype(np.float64), rowvar=False), atol=2e-3)


def test_gradient_of_a_stream():
    def spread(x):
        running = update_moments(update_moments(init_moments(dim=3), x[:3]), x[3:])
        return jnp.trace(finalize_moments(running).cov)

    x = jnp.asarray(samples(8, dtype=np.float32))
    np.testing.assert_allclose(jax.grad(spread)(x), 2 * (x - x.mean(0)) / 7, rtol=1e-4, atol=1e-5)


def test_too_few_samples():
    one = update_moments(init_moments(dim=3), jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"running.count must be at least 2, got 1"):
        finalize_moments(one)
    # A traced count can't be checked; its covariance is 0.
    for running in (one, init_moments(dim=3)):
        assert not jax.jit(finalize_moments)(running).cov.any()


def test_bad_input(without_shape_checks):
    running = init_moments(dim=3)
    with pytest.raises(ValueError, match=r"features must have 3 columns.*\(4, 2\)"):
        update_moments(running, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="features must hold at least 1 samples"):
        update_moments(running, jnp.ones((0, 3)))
    with pytest.raises(ValueError, match="features must be finite"):
        update_moments(running, jnp.full((4, 3), jnp.nan))
    with pytest.raises(ValueError, match=r"first and second.*\(3,\).*\(2,\)"):
        merge_moments(running, init_moments(dim=2))
    with pytest.raises(ValueError, match="features must have 2 axes"):
        moments(jnp.ones(3))
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        init_moments(dim=0)
    with pytest.raises(TypeError, match="dtype must be float32 or float64, got float16"):
        init_moments(dim=1, dtype=jnp.float16)
    with pytest.raises(ValueError, match="enable_x64"):
        init_moments(dim=1, dtype=jnp.float64)
