"""Maximum mean discrepancy against direct formulas and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from poise.metrics import mmd2


def reference(x, y, bandwidths, unbiased):
    def kernel(a, b):
        squared = ((a[:, None] - b[None]) ** 2).sum(-1)
        return np.mean([np.exp(-squared / (2 * h**2)) for h in bandwidths], axis=0)

    def within(a):
        n = len(a)
        table = kernel(a, a)
        return (table.sum() - np.trace(table)) / (n * (n - 1)) if unbiased else table.mean()

    return within(x) + within(y) - 2 * kernel(x, y).mean()


@pytest.mark.golden
@pytest.mark.golden_pattern("fdistill", "metric_prdc*.npz")
@pytest.mark.parametrize("unbiased", [False, True])
def test_golden(golden_file, unbiased):
    data = np.load(golden_file)
    with jax.enable_x64():
        estimate = mmd2(*(jnp.asarray(data[name]) for name in ("real", "fake", "mmd_bandwidths")), unbiased=unbiased)
        np.testing.assert_allclose(estimate, data["mmd2_unbiased" if unbiased else "mmd2_biased"], rtol=1e-12)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(2, 3, 1), (9, 5, 3)]),
    unbiased=st.booleans(),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_equals_the_definition(seed, shape, unbiased, scale):
    n, m, dim = shape
    rng = np.random.default_rng(seed)
    with jax.enable_x64():
        x, y, widths = rng.normal(size=(n, dim)), rng.normal(size=(m, dim)), scale * np.array([0.5, 1.0])
        estimate = mmd2(*map(jnp.asarray, (x, y, widths)), unbiased=unbiased, block_size=4)
        np.testing.assert_allclose(estimate, reference(x, y, widths, unbiased), rtol=1e-11, atol=1e-14)


def test_identical_sets():
    x = jax.random.normal(jax.random.key(0), (50, 3))
    assert 0 <= mmd2(x, x, [0.5, 2.0]) < 1e-7
    # The unbiased estimate misses the pairs of a sample with itself, which the mean over both sets still holds.
    assert mmd2(x, x, [0.5], unbiased=True) < 0


def test_never_negative():
    for seed in range(20):
        x = jax.random.normal(jax.random.key(seed), (30, 2))
        assert mmd2(x, jnp.flip(x, axis=0), [0.1, 1.0, 30.0]) >= 0


@pytest.mark.parametrize("seed", range(3))
def test_unbiased_estimate_of_the_closed_form(seed):
    """For N(0, 1) and N(d, 1) in one dimension: 2 s (1 - exp(-d^2 / 2(s^2 + 2))) / sqrt(s^2 + 2)."""
    with jax.enable_x64():
        x, y = np.random.default_rng(seed).normal(size=(2, 200, 100, 1))
        bandwidth, shift = 1.3, 0.8
        estimates = jax.vmap(lambda a, b: mmd2(a, b, [bandwidth], unbiased=True))(
            jnp.asarray(x), jnp.asarray(y) + shift
        )
        variance = bandwidth**2 + 2
        expected = 2 * bandwidth / np.sqrt(variance) * (1 - np.exp(-(shift**2) / (2 * variance)))
        error = np.std(estimates) / np.sqrt(len(estimates))
        assert abs(np.mean(estimates) - expected) < 4 * error
        assert error < 0.03 * expected


@pytest.mark.parametrize("unbiased", [False, True])
def test_gradients(unbiased):
    rng = np.random.default_rng(0)
    with jax.enable_x64():
        arguments = jnp.asarray(rng.normal(size=(6, 2))), jnp.asarray(rng.normal(size=(5, 2))), jnp.array([0.7, 2.0])
        check_grads(lambda x, y, h: mmd2(x, y, h, unbiased, block_size=3), arguments, order=1, rtol=1e-6)


def test_tiny_bandwidths_have_no_effect_but_on_equal_samples():
    x = jnp.array([[0.0], [1.0], [1.0]])
    y = jnp.array([[0.0], [2.0]])
    # Equal pairs: 5/9 within x, 1/2 within y, 1/6 between.
    np.testing.assert_allclose(mmd2(x, y, [1e-30]), 5 / 9 + 1 / 2 - 2 / 6, rtol=1e-6)


@pytest.mark.parametrize("bandwidths", [[0.0], [1.0, -2.0], [], [[1.0]], [float("nan")], [float("inf")]])
def test_bad_bandwidths(bandwidths, without_shape_checks):
    x = jnp.zeros((3, 1))
    with pytest.raises(ValueError, match="bandwidths"):
        mmd2(x, x, bandwidths)


def test_traced_bandwidths():
    x, y = jax.random.normal(jax.random.key(0), (2, 10, 2))
    np.testing.assert_allclose(jax.jit(mmd2)(x, y, jnp.array([0.5, 1.0])), mmd2(x, y, [0.5, 1.0]), rtol=1e-5)
