"""Environments: the rules of catch, new starts, time limits, noise, sticky actions, and gymnax's calling convention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.rl import (
    Environment,
    EnvStep,
    catch,
    from_gymnax,
    reward_noise,
    step_or_reset,
    sticky_actions,
    time_limit,
)

KEY = jax.random.key(0)


def test_catch_rewards_the_paddle_below_the_ball():
    env = catch(4, 5)
    state, _ = jax.jit(jax.vmap(env.reset))(jax.random.split(KEY, 40))
    assert set(np.asarray(state.ball_column).tolist()) == set(range(5))
    step = jax.jit(jax.vmap(env.step, in_axes=(None, 0, 0)))
    follow = jnp.sign(state.ball_column - state.paddle) + 1
    for policy, expected in ((follow, None), (jnp.full(40, 2), None)):
        now, rewards = state, []
        for count in range(3):
            move = jnp.sign(now.ball_column - now.paddle) + 1 if policy is follow else policy
            now, out = step(KEY, now, move)
            rewards.append(np.asarray(out.reward))
            assert np.all(np.asarray(out.terminated) == (count == 2))
            assert not np.any(np.asarray(out.truncated))
        assert not np.any(rewards[:2])
        expected = 1 if policy is follow else np.where(np.asarray(state.ball_column) == 4, 1, -1)
        np.testing.assert_array_equal(rewards[2], np.broadcast_to(expected, 40))
        pictures = np.asarray(out.observation)
        assert set(np.unique(pictures)) == {0, 1}
        np.testing.assert_array_equal(pictures[:, :3].sum((1, 2)), 0)


def test_the_true_last_observation_survives_a_new_start():
    env = catch(2, 3)
    state, _ = env.reset(KEY)
    after, observation, step = jax.jit(step_or_reset, static_argnums=0)(env, jax.random.key(1), state, jnp.array(1))
    assert bool(step.terminated)
    assert int(after.ball_row) == 0
    assert float(observation[0].sum()) == 1  # the new ball is at the top
    assert float(step.observation[0].sum()) == 0  # the old one was not
    longer = catch(5, 3)
    state, _ = longer.reset(KEY)
    after, observation, step = step_or_reset(longer, KEY, state, jnp.array(1))
    np.testing.assert_array_equal(observation, step.observation)


def test_time_limits_truncate_and_ends_terminate():
    env = time_limit(catch(4, 3), 3)
    (state, _), kinds = env.reset(KEY), []
    for _ in range(3):
        state, out = env.step(KEY, state, jnp.array(1))
        kinds.append((bool(out.terminated), bool(out.truncated)))
    assert kinds == [(False, False), (False, False), (True, False)]  # both at once is an end
    env = time_limit(catch(5, 3), 2)
    state, _ = env.reset(KEY)
    state, out = env.step(KEY, state, jnp.array(1))
    state, out = env.step(KEY, state, jnp.array(1))
    assert (bool(out.terminated), bool(out.truncated)) == (False, True)


@pytest.mark.parametrize(("kind", "mean", "std"), [("normal", 0.0, 2.0), ("uniform", 1.0, 2 / np.sqrt(12))])
def test_reward_noise(kind, mean, std):
    env = reward_noise(catch(), 2.0, kind)
    state, _ = env.reset(KEY)
    out = jax.jit(jax.vmap(lambda key: env.step(key, state, jnp.array(1))[1]))(jax.random.split(KEY, 4000))
    np.testing.assert_allclose(out.reward.mean(), mean, rtol=0, atol=5 * std / np.sqrt(4000))
    np.testing.assert_allclose(out.reward.std(), std, rtol=0.05)
    plain = catch().step(KEY, state, jnp.array(1))[1]
    np.testing.assert_array_equal(out.observation[7], plain.observation)


def test_sticky_actions():
    def count(probability):
        env = sticky_actions(catch(9, 9), probability)

        def play(key):
            state, _ = env.reset(key)
            state, _ = env.step(key, state, jnp.array(0))  # obeyed: from the middle to the left
            first = state[0].paddle
            state, _ = env.step(jax.random.fold_in(key, 1), state, jnp.array(2))
            return first, state[0].paddle

        first, second = jax.jit(jax.vmap(play))(jax.random.split(KEY, 2000))
        assert np.all(np.asarray(first) == 3)
        return float((second == 2).mean())

    assert count(0.0) == 0
    assert count(1.0) == 1
    assert abs(count(0.25) - 0.25) < 0.05


class GymnaxLike:
    """The calling convention of gymnax 1.0, on a walk to the right that ends at 3."""

    num_actions = 2
    default_params = 2  # the time limit

    def reset_env(self, key, params):
        return jnp.zeros(2), {"place": jnp.zeros((), jnp.int32), "time": 0}

    def step_env(self, key, state, action, params):
        state = {"place": state["place"] + action, "time": state["time"] + 1}
        return jnp.ones(2) * state["place"], state, 1, state["place"] >= 3, {"discount": 1.0}

    def is_truncated(self, state, params):
        return state["time"] >= params


@pytest.mark.parametrize(("limit", "expected"), [(None, (False, True)), (9, (False, False))])
def test_gymnax_adapter(limit, expected):
    env = from_gymnax(GymnaxLike(), limit)
    assert isinstance(env, Environment)
    state, _ = env.reset(KEY)

    def step(state, action):
        return env.step(KEY, state, action)

    state, out = jax.lax.scan(step, state, jnp.ones(2, jnp.int32))  # the carry keeps its dtypes
    assert isinstance(out, EnvStep)
    assert out.reward.dtype == jnp.float32
    assert (bool(out.terminated[-1]), bool(out.truncated[-1])) == expected
    np.testing.assert_array_equal(out.observation[-1], [2, 2])


def test_at_the_end_and_at_the_limit_an_episode_is_terminated():
    env = from_gymnax(GymnaxLike(), 3)
    state, _ = env.reset(KEY)
    for _ in range(3):
        state, out = env.step(KEY, state, jnp.array(1))
    assert (bool(out.terminated), bool(out.truncated)) == (True, False)


def test_bad_arguments():
    with pytest.raises(ValueError, match="rows must be at least 2"):
        catch(rows=1)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        time_limit(catch(), 0)
    with pytest.raises(ValueError, match="scale must lie in"):
        reward_noise(catch(), -1.0)
    with pytest.raises(ValueError, match="kind must be one of normal, uniform"):
        reward_noise(catch(), 1.0, "cauchy")
    with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\]"):
        sticky_actions(catch(), 1.5)
    with pytest.raises(TypeError, match=r"env must be an environment of gymnax .* got a object without step_env"):
        from_gymnax(object())
