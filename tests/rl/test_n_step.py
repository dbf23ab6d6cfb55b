"""Transitions over several steps against a loop in Python: ends inside of the window, terminated or cut short."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poise.rl import StepRecord, n_step_transition
from poise.rl.n_step import push_step

GAMMA = 0.9
transition = jax.jit(functools.partial(n_step_transition, gamma=GAMMA))


def by_hand(window, b):
    total, factor = 0.0, 1.0
    for k in range(len(window.reward)):
        total += factor * window.reward[k, b]
        factor *= GAMMA
        if window.terminated[k, b] or window.truncated[k, b]:
            break
    discount = 0.0 if window.terminated[k, b] else factor
    return total, discount, window.final_observation[k, b]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10_000), st.sampled_from([1, 4]))
def test_against_a_loop(seed, n):
    rng = np.random.default_rng(seed)
    observation, final = rng.normal(size=(2, n, 5, 2)).astype(np.float32)
    ends = rng.integers(0, 4, (n, 5))
    window = StepRecord(
        observation, rng.integers(3, size=(n, 5)), rng.normal(size=(n, 5)).astype("f"), ends == 1, ends == 2, final
    )
    out = transition(window)
    np.testing.assert_array_equal(out.observation, observation[0])
    np.testing.assert_array_equal(out.action, window.action[0])
    for b in range(5):
        reward, discount, last = by_hand(window, b)
        np.testing.assert_allclose(out.reward[b], reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out.discount[b], discount, rtol=1e-6)
        np.testing.assert_array_equal(out.next_observation[b], last)


def test_rewards_of_the_next_episode_may_be_anything():
    no = np.zeros((2, 1), bool)
    window = StepRecord(no, no.astype(int), np.array([[1.0], [np.nan]], np.float32), ~no, no, no)
    out = transition(window)
    assert (float(out.reward[0]), float(out.discount[0])) == (1.0, 0.0)


def test_pushing_drops_the_oldest():
    zero = jnp.zeros((3, 1))
    window = StepRecord(zero, zero, zero, zero, zero, zero)
    for i in range(1, 5):
        window = push_step(window, StepRecord(*(jnp.full(1, float(i)) for _ in window)))
    assert window.reward[:, 0].tolist() == [2, 3, 4]


def test_bad_gamma():
    zero = jnp.zeros((1, 1))
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\]"):
        n_step_transition(StepRecord(zero, zero.astype(int), zero, zero > 0, zero > 0, zero), 1.5)
