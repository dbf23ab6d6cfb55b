"""Bellman targets and the conservative penalty: definitions by hand, terminal states, gradients, refused arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import special

from poise.rl import conservative_penalty, q_learning_target, sarsa_target

quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@quick
@given(st.integers(0, 1000), st.sampled_from([(1, 1), (3, 4)]))
def test_targets_by_hand(seed, shape):
    batch, actions = shape
    rng = np.random.default_rng(seed)
    r, discount = rng.normal(size=batch).astype("f"), rng.uniform(0, 1, batch).astype("f")
    q, selector = rng.normal(size=(2, batch, actions)).astype("f")
    action = rng.integers(actions, size=batch)
    args = jnp.asarray(r), jnp.asarray(discount), jnp.asarray(q)
    rows = np.arange(batch)
    np.testing.assert_allclose(q_learning_target(*args), r + discount * q.max(-1), rtol=1e-6, atol=1e-6)
    double = r + discount * q[rows, selector.argmax(-1)]
    np.testing.assert_allclose(q_learning_target(*args, jnp.asarray(selector)), double, rtol=1e-6, atol=1e-6)
    sarsa = r + discount * q[rows, action]
    np.testing.assert_allclose(sarsa_target(*args, jnp.asarray(action)), sarsa, rtol=1e-6, atol=1e-6)
    one = jax.vmap(q_learning_target)(*args)
    np.testing.assert_array_equal(one, q_learning_target(*args))


def test_a_terminal_state_has_no_value():
    q = jnp.array([[jnp.nan, jnp.inf], [1.0, 2.0]])
    target = q_learning_target(jnp.array([3.0, 3.0]), jnp.array([0.0, 0.5]), q)
    np.testing.assert_array_equal(target, [3.0, 4.0])


def test_bad_rewards_stay_visible():
    target = q_learning_target(jnp.array([jnp.nan, 1.0]), jnp.zeros(2), jnp.zeros((2, 2)))
    assert jnp.isnan(target[0])
    assert target[1] == 1


def test_no_gradient_flows_through_a_target():
    def total(r, q):
        return q_learning_target(r, jnp.ones(2), q).sum()

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.ones(2), jnp.ones((2, 3))):
        assert not np.any(gradient)


@jax.jit
def penalty_and_gradient(q, action):
    def total(q):
        penalty = conservative_penalty(q, action)
        return penalty.sum(), penalty

    return jax.value_and_grad(total, has_aux=True)(q)


@quick
@given(st.integers(0, 1000), st.floats(0.01, 300))
def test_conservative_penalty(seed, scale):
    q = np.float32(scale * np.random.default_rng(seed).normal(size=(6, 4)))
    action = np.arange(6) % 4
    (_, penalty), gradient = penalty_and_gradient(q, action)
    assert np.all(np.asarray(penalty) >= 0)
    surprise = special.logsumexp(q, -1) - q[np.arange(6), action]
    np.testing.assert_allclose(penalty, surprise, rtol=1e-5, atol=1e-6 * max(1, scale))
    exact = special.softmax(np.float64(q), -1) - np.eye(4)[action]
    np.testing.assert_allclose(gradient, exact, rtol=0, atol=1e-6 * max(1, scale))


def test_conservative_penalty_vanishes_only_under_certainty():
    certain = jnp.array([[1e4, 0.0], [0.0, 1e4]])
    np.testing.assert_array_equal(conservative_penalty(certain, jnp.array([0, 1])), [0, 0])
    np.testing.assert_array_equal(conservative_penalty(certain, jnp.array([1, 0])), [1e4, 1e4])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64])
def test_dtypes(dtype):
    with jax.enable_x64():
        wide, r, q = jnp.promote_types(dtype, jnp.float32), jnp.ones(2, dtype), jnp.ones((2, 3), dtype)
        assert q_learning_target(r, jnp.ones(2), q).dtype == wide
        assert conservative_penalty(q, jnp.zeros(2, jnp.int32)).dtype == wide


def test_bad_arguments():
    q, r = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(TypeError, match="action must be integers, got float32"):
        conservative_penalty(q, r)
    with pytest.raises(TypeError, match="next_action must be integers, got bool"):
        sarsa_target(r, r, q, r > 0)
    with pytest.raises(ValueError, match=r"action must have the shape \(2,\)"):
        conservative_penalty(q, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="must have one shape"):
        q_learning_target(r, jnp.zeros(3), q)
    with pytest.raises(ValueError, match="q_next_selector must have the shape"):
        q_learning_target(r, r, q, jnp.zeros((2, 4)))
