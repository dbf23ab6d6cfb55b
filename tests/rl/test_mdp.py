"""Finite environments: values by iteration, optimal policies by enumeration, regret, random ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.rl import (
    MDP,
    normalized_regret,
    optimal_policy,
    policy_return,
    policy_value,
    potential_shaping,
    random_mdp,
    random_reward,
)


@functools.cache
def instance(seed=0, states=4, actions=3):
    with jax.enable_x64():
        mdp = random_mdp(jax.random.key(seed), states, actions, 0.9)
        return mdp, random_reward(jax.random.key(seed + 100), mdp)


def test_value_solves_bellmans_equation():
    mdp, reward = instance()
    with jax.enable_x64():
        policy = jax.random.dirichlet(jax.random.key(2), jnp.ones(3), (4,))
        value = np.asarray(jax.jit(policy_value)(mdp, reward, policy))
        uniform = policy_value(mdp, reward)
        explicit = jax.jit(policy_value)(mdp, reward, jnp.full((4, 3), 1 / 3))
        total = jax.jit(policy_return)(mdp, reward, policy)
        policy = np.asarray(policy)
    q = np.sum(np.asarray(mdp.transition) * (np.asarray(reward) + 0.9 * value), -1)
    np.testing.assert_allclose(value, np.sum(policy * q, -1), rtol=1e-12)
    np.testing.assert_allclose(uniform, explicit, rtol=1e-12)
    np.testing.assert_allclose(total, np.dot(mdp.initial, value), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_best_and_worst_among_all_deterministic_policies(seed):
    mdp, reward = instance(seed)
    with jax.enable_x64():
        policies = jnp.stack([jnp.eye(3)[jnp.array(choice)] for choice in itertools.product(range(3), repeat=4)])
        values = jax.jit(jax.vmap(policy_value, in_axes=(None, None, 0)))(mdp, reward, policies)
        regrets = jax.jit(jax.vmap(normalized_regret, in_axes=(None, None, 0)))(mdp, reward, policies)
        best = jax.jit(lambda *args: policy_value(*args, optimal_policy(*args)))(mdp, reward)
        values, regrets = np.asarray(values), np.asarray(regrets)
    np.testing.assert_allclose(best, values.max(0), rtol=1e-12)  # in every state at once
    returns = values @ np.asarray(mdp.initial)
    expected = (returns.max() - returns) / (returns.max() - returns.min())
    np.testing.assert_allclose(regrets, expected, rtol=0, atol=1e-10)
    assert (regrets.min(), regrets.max()) == (0, 1)


def test_optimal_policies_under_vmap_and_in_float32():
    mdp, _ = instance()
    mdp = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), mdp)
    rewards = jax.vmap(random_reward, in_axes=(0, None))(jax.random.split(jax.random.key(3), 6), mdp)
    together = jax.jit(jax.vmap(optimal_policy, in_axes=(None, 0)))(mdp, rewards)
    single = jax.jit(optimal_policy)
    for reward, policy in zip(rewards, together, strict=True):
        np.testing.assert_array_equal(policy, single(mdp, reward))
        np.testing.assert_array_equal(policy.sum(-1), 1)


def test_shaping_moves_all_returns_alike():
    mdp, reward = instance()
    with jax.enable_x64():
        potential = 3 * jnp.arange(4.0)
        shaped = potential_shaping(reward, potential, 0.9)
        policies = jax.random.dirichlet(jax.random.key(2), jnp.ones(3), (5, 4))
        returns = jax.jit(jax.vmap(policy_return, in_axes=(None, None, 0)))
        shift = np.asarray(returns(mdp, shaped, policies)) - np.asarray(returns(mdp, reward, policies))
    np.testing.assert_allclose(shift, -np.dot(mdp.initial, potential), rtol=1e-10)


def test_regret_without_a_choice_is_zero():
    mdp, _ = instance()
    with jax.enable_x64():
        constant = jnp.full((4, 3, 4), 7.0)
        assert normalized_regret(mdp, constant, jnp.full((4, 3), 1 / 3)) == 0


def test_random_environments():
    mdp = random_mdp(jax.random.key(0), 32, 4)
    np.testing.assert_allclose(mdp.transition.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(mdp.initial.sum(), 1, rtol=1e-6)
    share = float((mdp.transition > 0).mean())
    assert 0.13 < share < 0.19  # a normal exceeds 1 with probability 0.159
    assert bool((random_mdp(jax.random.key(0), 3, 2, threshold=float("inf")).transition.max(-1) == 1).all())
    assert bool((random_mdp(jax.random.key(0), 3, 2, threshold=-float("inf")).transition > 0).all())
    rewards = jax.jit(jax.vmap(random_reward, in_axes=(0, None)))(jax.random.split(jax.random.key(1), 40), mdp)
    sparse = ((rewards == 0).mean((1, 2, 3)) > 0.02).sum()
    assert 3 < int(sparse) < 30
    assert len(np.unique(np.asarray(rewards.std((1, 2, 3))))) == 40


def test_bad_arguments():
    mdp, reward = random_mdp(jax.random.key(0), 3, 2), jnp.zeros((3, 2, 3))
    with pytest.raises(ValueError, match="transition must be nonnegative and sum to 1"):
        policy_value(mdp._replace(transition=0.9 * mdp.transition), reward)
    with pytest.raises(ValueError, match="initial must be nonnegative and sum to 1"):
        policy_return(mdp._replace(initial=jnp.array([1.5, -0.5, 0.0])), reward)
    with pytest.raises(ValueError, match=r"discount must lie in \[0, 1\)"):
        optimal_policy(mdp._replace(discount=1.0), reward)
    with pytest.raises(ValueError, match=r"reward must have shape \(3, 2, 3\)"):
        policy_value(mdp, jnp.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="policy must be nonnegative and sum to 1"):
        policy_value(mdp, reward, jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"policy must have shape \(3, 2\)"):
        normalized_regret(mdp, reward, jnp.ones((3, 3)) / 3)
    with pytest.raises(ValueError, match=r"transition must have shape \[states, actions, states\]"):
        policy_value(MDP(jnp.ones((2, 2, 3)) / 3, 0.5, jnp.ones(2) / 2), jnp.zeros((2, 2, 3)))
    with pytest.raises(ValueError, match=r"potential must have shape \(3,\)"):
        potential_shaping(reward, jnp.zeros(2), 0.5)
    with pytest.raises(ValueError, match="num_states must be at least 1"):
        random_mdp(jax.random.key(0), 0, 2)
    traced = jax.jit(lambda scale: policy_value(mdp._replace(transition=scale * mdp.transition), reward))
    assert np.isfinite(traced(0.5)).all()  # what is traced can't be looked at
