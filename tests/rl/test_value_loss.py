"""Read-out and cross-entropy: official losses and gradients, entropy as the least loss, -inf logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.rl import bin_centers, bin_edges, categorical_td_loss, expected_value, hl_gauss_probs


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "hl_gauss*.npz")
def test_official_losses_of_hl_gauss(golden_file):
    data = np.load(golden_file)
    for case in sorted({name.partition("_")[0] for name in data.files}):
        part = {name.removeprefix(f"{case}_"): data[name] for name in data.files if name.startswith(f"{case}_")}
        edges, span = jnp.asarray(part["support"]), float(part["max"] - part["min"])

        def losses(logits, target, edges=edges, sigma=part["sigma"]):
            return categorical_td_loss(logits, hl_gauss_probs(target, edges, sigma))

        logits, target = jnp.asarray(part["logits"]), jnp.asarray(part["target"])
        ours = jax.jit(losses)(logits, target)
        np.testing.assert_allclose(ours, part["loss_per_example"], rtol=0, atol=5e-6)
        np.testing.assert_allclose(ours.mean(), part["loss_mean"], rtol=0, atol=5e-6)
        gradient = jax.jit(jax.grad(lambda logits, target=target, losses=losses: losses(logits, target).mean()))(logits)
        np.testing.assert_allclose(gradient, part["grad_logits"], rtol=0, atol=5e-6)
        values = jax.jit(expected_value)(logits, bin_centers(edges))
        np.testing.assert_allclose(values, part["pred_value"], rtol=0, atol=3e-6 * span)
        outside = jax.jit(losses)(jnp.asarray(part["oob_logits"]), jnp.asarray(part["oob_target"])).mean()
        np.testing.assert_allclose(outside, part["oob_loss_mean"], rtol=0, atol=5e-6)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "categorical_projection*.npz")
def test_official_losses_of_c51(golden_file):
    data = np.load(golden_file)
    for case in sorted({name.partition("_")[0] for name in data.files}):
        part = {name.removeprefix(f"{case}_"): data[name] for name in data.files if name.startswith(f"{case}_")}
        rows = np.arange(len(part["action"]))

        def losses(logits, part=part, rows=rows):
            return categorical_td_loss(logits[rows, part["action"]], jnp.asarray(part["target_probs_rlax"]))

        logits = jnp.asarray(part["logits"])
        np.testing.assert_allclose(losses(logits), part["loss_per_example"], rtol=0, atol=2e-5)
        gradient = jax.grad(lambda logits: losses(logits).mean())(logits)
        np.testing.assert_allclose(gradient, part["grad_logits_of_mean"], rtol=0, atol=2e-5)


gradients = jax.jit(jax.grad(categorical_td_loss, argnums=(0, 1)))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1000), st.floats(0.1, 1e4))
def test_gradient_is_softmax_minus_target_and_bounded(seed, scale):
    rng = np.random.default_rng(seed)
    logits, p = np.float32(scale * rng.normal(size=7)), np.float32(rng.dirichlet(np.full(7, 0.3)))
    gradient, to_target = gradients(logits, p)
    exact = np.exp(logits - logits.max(), dtype=np.float64)
    np.testing.assert_allclose(gradient, exact / exact.sum() - p, rtol=0, atol=2e-6)
    assert np.abs(gradient).sum() <= 2 + 1e-5
    assert not np.any(to_target)


def test_least_loss_is_the_entropy():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(9), 4).astype(np.float32)
    least = np.asarray(jax.jit(categorical_td_loss)(np.log(p), p))
    np.testing.assert_allclose(least, -(p * np.log(p)).sum(-1), rtol=1e-6)
    worse = jax.jit(categorical_td_loss)(np.log(p) + rng.normal(size=p.shape).astype(np.float32), p)
    assert np.all(np.asarray(worse) > least + 0.01)


def test_minus_infinity():
    logits, p = jnp.array([0.0, -jnp.inf, 0.0]), jnp.array([0.5, 0.0, 0.5])
    loss, gradient = jax.value_and_grad(categorical_td_loss)(logits, p)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)
    assert jnp.isposinf(categorical_td_loss(logits, jnp.array([0.0, 0.5, 0.5])))
    slope = jax.grad(expected_value)(logits, jnp.array([0.0, 5.0, 4.0]))
    np.testing.assert_allclose(slope, [-1, 0, 1], rtol=1e-6)


def test_nan_targets_are_not_hidden():
    edges = bin_edges(-1.0, 1.0, 4)
    assert jnp.isnan(categorical_td_loss(jnp.zeros(4), hl_gauss_probs(jnp.array(jnp.nan), edges, 0.3)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64():
        wide = jnp.promote_types(dtype, jnp.float32)
        logits, grid = jnp.zeros((2, 4), dtype), jnp.arange(4.0)
        assert grid.dtype == jnp.float64
        assert expected_value(logits, grid).dtype == wide
        assert categorical_td_loss(logits, jnp.full((2, 4), 0.25)).dtype == wide
        assert jax.grad(lambda x: categorical_td_loss(x, jnp.full((2, 4), 0.25)).sum())(logits).dtype == dtype


def test_constant_logits_and_extreme_ones():
    grid = jnp.array([0.0, 1.0, 5.0])
    np.testing.assert_allclose(expected_value(jnp.full(3, 1e30), grid), 2.0, rtol=1e-6)
    assert float(expected_value(jnp.array([0.0, 3e38, 0.0]), grid)) == 1.0
    batched = jax.jit(jax.vmap(expected_value, in_axes=(0, None)))(jnp.eye(3), grid)
    np.testing.assert_allclose(batched, expected_value(jnp.eye(3), grid), rtol=1e-6)


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"support must have shape \(4,\)"):
        expected_value(jnp.zeros((2, 4)), jnp.zeros(5))
    with pytest.raises(ValueError, match=r"target_probs must have the shape \(2, 4\)"):
        categorical_td_loss(jnp.zeros((2, 4)), jnp.zeros((2, 5)))
