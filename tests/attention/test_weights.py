import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.attention import attention_entropy, length_scale, lssa_weights, reweight_attention


def scores_of(z):
    q, k = (z[name] / np.linalg.norm(z[name], axis=-1, keepdims=True) for name in ("q", "k"))
    length, dim = q.shape[-2:]
    scale = np.asarray(length_scale(dim, jnp.arange(1.0, length + 1)))[:, None]
    return jnp.asarray(scale * (q @ k.swapaxes(-1, -2))), np.tril(np.ones((length, length), bool))


@pytest.mark.golden
@pytest.mark.golden_pattern("attention", "lssar_*.npz")
def test_weights_of_an_independent_implementation(golden_file):
    z = np.load(golden_file)
    with jax.enable_x64():
        scores, mask = scores_of(z)
        weights = lssa_weights(scores, mask)
        np.testing.assert_allclose(weights, z["lssa_weights"], atol=1e-6)
        for power in z["powers"]:
            reweighted = reweight_attention(weights, mask, power=float(power))
            np.testing.assert_allclose(reweighted, z[f"lssar_p{power}_weights"], atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), power=st.sampled_from([1, 1.5, 3, 15, 40]), scale=st.floats(1e-6, 1e6))
def test_reweighting_is_the_published_formula_at_any_scale(seed, power, scale):
    rng = np.random.default_rng(seed)
    weights = rng.random((3, 10))
    mask = rng.random((3, 10)) < 0.7
    mask[2] = False
    number = mask.sum(-1, keepdims=True)
    plain = np.where(mask, weights, 0) / np.maximum(np.where(mask, weights, 0).sum(-1, keepdims=True), 1e-30)
    z = np.where(mask, np.maximum(number * plain - (number >= 4), 0), 0) ** power
    expected = z / np.maximum(z.sum(-1, keepdims=True), 1e-300)
    with jax.enable_x64():
        out = reweight_attention(jnp.asarray(scale * weights), jnp.asarray(mask), power=power)
    np.testing.assert_allclose(out, expected, rtol=1e-9, atol=1e-12)
    assert not np.asarray(out)[2].any()


def test_a_flat_row_keeps_its_weights_and_their_gradient():
    weights = jnp.full((1, 8), 0.125)
    np.testing.assert_allclose(reweight_attention(weights, power=15), weights, rtol=1e-6)
    direction = jnp.arange(8.0)

    def of_plain(x):
        return jnp.vdot(x / x.sum(), direction)

    gradient = jax.grad(lambda x: jnp.vdot(reweight_attention(x, power=15), direction))(weights)
    np.testing.assert_allclose(gradient, jax.grad(of_plain)(weights), rtol=1e-5)


def test_traced_powers_have_gradients():
    weights = jnp.array([[0.4, 0.3, 0.2, 0.1]])

    def first(power):
        return reweight_attention(weights, power=power)[0, 0]

    slope = jax.jit(jax.grad(first))(2.0)
    ends = [reweight_attention(weights, power=2 + e)[0, 0] for e in (1e-2, -1e-2)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-2, rtol=1e-3)


def test_number_of_keys_may_be_given():
    weights = jnp.array([[0.6, 0.4, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]])
    given_number = reweight_attention(weights, power=1, num_keys=jnp.array([2, 4]))
    mask = jnp.array([[True, True, False, False], [True] * 4])
    np.testing.assert_allclose(given_number, reweight_attention(weights, mask, power=1), rtol=1e-6)


def test_only_high_powers_keep_a_fixed_number_of_keys():
    rng = np.random.default_rng(0)
    found = {}
    for number in (64, 1024):
        keys = rng.standard_normal((number, 64))
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        queries = rng.standard_normal((64, 64))
        queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
        plain = lssa_weights(jnp.asarray(length_scale(64, number) * (queries @ keys.T), jnp.float32))
        for power in (1, 3, 15):
            weights = plain if power == 1 else reweight_attention(plain, power=power)
            found[power, number] = float(jnp.exp(attention_entropy(weights)).mean())
    assert found[1, 1024] > 8 * found[1, 64]  # in proportion to the context
    assert found[3, 1024] > 8 * found[3, 64]
    assert found[15, 1024] < 4 * found[15, 64]
    assert found[15, 1024] < 10


@settings(max_examples=10, deadline=None)
@given(effective=st.integers(1, 12))
def test_entropy_of_equal_weights(effective):
    weights = jnp.where(jnp.arange(12) < effective, 1 / effective, 0)
    np.testing.assert_allclose(attention_entropy(weights), np.log(effective), rtol=1e-5, atol=1e-6)
    assert np.isfinite(jax.grad(attention_entropy)(weights)).all()


def test_dtypes():
    scores = jnp.zeros((4, 4))
    for function in (lssa_weights, reweight_attention, attention_entropy):
        assert function(scores.astype(jnp.bfloat16)).dtype == jnp.float32
        with jax.enable_x64():
            assert function(jnp.zeros((4, 4), jnp.float64)).dtype == jnp.float64


def test_bad_input():
    weights = jnp.ones((2, 2))
    with pytest.raises(ValueError, match=r"power must lie in \[1, inf\), got 0.5"):
        reweight_attention(weights, power=0.5)
    with pytest.raises(ValueError, match="offset_min_keys must be at least 0"):
        reweight_attention(weights, offset_min_keys=-1)
    with pytest.raises(ValueError, match="head_dim must be at least 2, got 1"):
        length_scale(1, 10)
