"""Token log-probabilities and divergences: official values, masks over anything, invariance to constants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from poise.rl import sequence_logprob, token_forward_kl, token_logprobs


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "sparse_po*.npz")
def test_official_token_values(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        policy, ref, labels, mask = (
            jnp.asarray(data[name]) for name in ("policy_logits", "ref_logits", "labels", "loss_mask")
        )
        ours = jax.jit(token_logprobs)(policy, labels, mask), jax.jit(token_logprobs)(ref, labels, mask)
        kl = jax.jit(token_forward_kl)(policy, ref, mask)
    np.testing.assert_allclose(ours[0], data["token_logp_policy"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(ours[1], data["token_logp_ref"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(kl, data["token_forward_kl"], rtol=0, atol=1e-10)


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "preference_losses*.npz")
def test_official_sums_and_means(golden_file):
    data = np.load(golden_file)
    with jax.enable_x64():
        logps, mask = jnp.asarray(data["token_logp_policy"]), jnp.asarray(data["completion_mask"])
        total, mean = sequence_logprob(logps, mask), sequence_logprob(logps, mask, length_normalize=True)
    np.testing.assert_allclose(total, data["policy_logps"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(mean, data["avg_logps"], rtol=0, atol=1e-10)


def test_definitions_and_invariance():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    labels = rng.integers(6, size=(3, 4))
    logp, logq = special.log_softmax(p, -1), special.log_softmax(q, -1)
    ours = token_logprobs(jnp.asarray(p), jnp.asarray(labels))
    np.testing.assert_allclose(ours, np.take_along_axis(logp, labels[..., None], -1)[..., 0], rtol=0, atol=2e-6)
    kl = token_forward_kl(jnp.asarray(p), jnp.asarray(q))
    np.testing.assert_allclose(kl, (np.exp(logq) * (logq - logp)).sum(-1), rtol=0, atol=2e-6)
    assert np.all(np.asarray(kl) > 0)
    moved = jnp.asarray(p + rng.normal(size=(3, 4, 1)).astype(np.float32))
    np.testing.assert_allclose(token_logprobs(moved, jnp.asarray(labels)), ours, rtol=0, atol=2e-6)
    np.testing.assert_array_equal(token_forward_kl(moved, moved), np.zeros((3, 4)))


def test_masked_positions_may_hold_anything():
    mask = jnp.array([True, True, False])
    clean = jnp.array([[0.5, 1.0], [0.1, -0.2], [0.0, 0.0]])
    wild = clean.at[2].set(jnp.array([jnp.nan, jnp.inf]))
    labels = jnp.array([0, 1, -100])

    def total(logits):
        return token_logprobs(logits, labels, mask).sum() + token_forward_kl(logits, clean, mask).sum()

    value, gradient = jax.jit(jax.value_and_grad(total))(wild)
    reference, expected = jax.jit(jax.value_and_grad(total))(clean)
    assert value == reference
    np.testing.assert_array_equal(gradient, expected)
    assert not np.any(np.asarray(gradient[2]))
    alone = sequence_logprob(jnp.full((2, 3), jnp.nan), jnp.zeros((2, 3), int), length_normalize=True)
    np.testing.assert_array_equal(alone, [0, 0])


def test_excluded_tokens():
    """Logits of -inf, as from a mask over the vocabulary."""
    policy, ref = jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.array([[0.0, 1.0, -jnp.inf]])
    kl, gradient = jax.value_and_grad(lambda p: token_forward_kl(p, ref)[0])(policy)
    rho = special.softmax([0.0, 1.0])
    np.testing.assert_allclose(kl, (rho * np.log(rho / 0.5)).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient[0], [0.5 - rho[0], 0.5 - rho[1], 0], rtol=0, atol=1e-6)
    only_ref = token_forward_kl(jnp.array([[0.0, 0.0, 0.0]]), ref)
    assert np.isfinite(only_ref[0])
    assert np.isposinf(token_forward_kl(policy, jnp.zeros((1, 3)))[0])
    assert np.isneginf(token_logprobs(policy, jnp.array([2]))[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64():
        wide, logits = jnp.promote_types(dtype, jnp.float32), jnp.zeros((2, 3), dtype)
        logps = token_logprobs(logits, jnp.array([0, 1]))
        assert logps.dtype == wide
        assert token_forward_kl(logits, logits).dtype == wide
        assert sequence_logprob(logps.astype(dtype), jnp.array([1, 1]), length_normalize=True).dtype == wide


def test_bad_arguments():
    logits, labels = jnp.zeros((2, 3)), jnp.zeros(2, int)
    with pytest.raises(TypeError, match="labels must be integers, got float32"):
        token_logprobs(logits, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(3,\)"):
        token_logprobs(logits, jnp.zeros(3, int))
    with pytest.raises(TypeError, match="mask must be boolean or integer, got float32"):
        token_logprobs(logits, labels, jnp.ones(2))
    with pytest.raises(ValueError, match="ref_logits must have the shape"):
        token_forward_kl(logits, jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\)"):
        sequence_logprob(logits, jnp.ones(3, int))
