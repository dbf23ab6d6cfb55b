"""Ranking accuracy: the official ideal ratios, the flipping theorem as an equality of booleans, limits of beta."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import special

from poise.rl import (
    alignment_gap,
    attenuated_dpo_loss,
    correctly_ranked,
    dpo_loss,
    flip_difficulty,
    flip_loss_threshold,
    idealized_log_ratio,
    idealized_ranking_accuracy,
    ranking_accuracy,
    ranking_transitions,
    reward_accuracy,
    sequence_logprob,
    whole_ranking_accuracy,
)

quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.golden
@pytest.mark.golden_pattern("rl", "ranking_accuracy*.npz")
def test_official_ideal_ratios(golden_file):
    data = np.load(golden_file)
    share, eps = data["alpha_1"], float(data["eps"])

    def order(ratio):
        return np.where(np.abs(ratio - 1) <= 0.05, 0, np.sign(ratio - 1))

    with jax.enable_x64():
        pair = [jnp.asarray(data[f"logp_{i}"] / data[f"length_{i}"]) for i in (1, 2)]
        for beta in data["betas"]:
            official = data[f"official_ratio_lengthnorm_beta{float(beta)}"]
            ours = np.asarray(idealized_log_ratio(*pair, jnp.asarray(share), float(beta), eps))
            # The official code keeps a share of 0 as it is and divides a share of 1 by eps.
            inner, all_first = (share > 0) & (share < 1), share == 1
            np.testing.assert_allclose(ours[inner], np.log(official[inner]), rtol=0, atol=1e-9)
            first = ours[all_first] - np.log1p(-eps) / beta
            np.testing.assert_allclose(first, np.log(official[all_first]), rtol=0, atol=1e-9)
            assert np.all(official[share == 0] == 0)
            # At a share of 0 our ratio is finite; the reference's own order can't be seen through the official zero.
            ratio = np.where(share == 0, 0, np.exp(ours))
            agree = order(ratio) == order(data["official_expected_ratio"])
            accuracy = float(data[f"official_idealized_acc_lengthnorm_beta{float(beta)}"])
            assert np.mean(agree) == pytest.approx(accuracy, abs=1e-12)


@quick
@given(st.integers(0, 10_000), st.floats(0.01, 2.0))
def test_a_pair_is_right_exactly_when_its_loss_is_below_the_threshold(seed, beta):
    """Away from ties, where rounding decides."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 20, size=(4, 500))
    x = x[:, np.abs(x[0] - x[1]) > 1e-6]
    with jax.enable_x64():
        policy, ref = (jnp.asarray(x[:2, :, None]), jnp.asarray(x[2:, :, None]))
        mask = jnp.ones_like(policy[0], bool)
        loss = dpo_loss(*policy, *ref, mask, mask, beta=beta)
        below = np.asarray(loss <= flip_loss_threshold(*jnp.asarray(x[2:]), beta=beta))
        right = np.asarray(correctly_ranked(*jnp.asarray(x[:2])))
    decided = np.asarray(loss) > 1e-12  # below, the losses of both sides of the threshold round to one number
    assert decided.sum() > 200
    np.testing.assert_array_equal(below[decided], right[decided])


def test_limits_of_the_ideal():
    rng = np.random.default_rng(0)
    first, second = jnp.asarray(rng.normal(-20, 5, (2, 200)), jnp.float32)
    own = ranking_accuracy(first, second)
    assert 0.2 < own < 0.8
    assert idealized_ranking_accuracy(first, second, 0.75, 1e6) == own
    assert idealized_ranking_accuracy(first, second, 0.5, 0.1) == own
    assert idealized_ranking_accuracy(first, second, 0.75, 1e-4) == 1
    assert idealized_ranking_accuracy(first, second, 0.25, 1e-4) == 0
    ratio = idealized_log_ratio(first, second, 0.8, 0.3)
    np.testing.assert_allclose(ratio, first - second + special.logit(0.8) / 0.3, rtol=1e-5, atol=1e-5)
    edge = idealized_log_ratio(first, second, jnp.where(jnp.arange(200) < 100, 0.0, 1.0), 0.1, eps=1e-3)
    assert np.isfinite(edge).all()
    gap = alignment_gap(first, second, first, second, 0.75, 1e-4)
    np.testing.assert_allclose(gap, 1 - own, rtol=1e-6)


def test_thresholds():
    zero = jnp.zeros(2)
    np.testing.assert_allclose(flip_loss_threshold(zero, zero), np.log(2), rtol=1e-6)
    hard = flip_loss_threshold(jnp.array([-200.0]), jnp.array([0.0]), beta=0.1)
    np.testing.assert_allclose(hard, np.exp(-20), rtol=1e-5)
    right = jnp.array([0.0, 5.0])
    assert bool(jnp.all(flip_loss_threshold(right, zero, beta=1.0) > 0.6))  # a loss of 0.6 leaves these right
    np.testing.assert_array_equal(flip_difficulty(right, zero), -right)


def test_ties_and_shares():
    first, second = jnp.log(jnp.array([0.5, 0.5, 0.1])), jnp.log(jnp.array([0.495, 0.48, 0.9]))
    assert correctly_ranked(first, second, 0.5).tolist() == [True, False, False]
    assert correctly_ranked(first, second, 0.5, tie_tol=0.1).tolist() == [True, True, False]
    assert correctly_ranked(first, second, 0.3).tolist() == [False, False, True]
    assert correctly_ranked(first, first).all()
    assert not correctly_ranked(first, first, 0.9).any()


@quick
@given(st.integers(0, 1000), st.floats(-50, 50))
def test_invariances(seed, shift):
    first, second, ref1, ref2 = (
        jnp.asarray(x) for x in np.random.default_rng(seed).integers(-90, 0, (4, 9)).astype("f")
    )
    moved = float(np.round(shift))
    assert ranking_accuracy(first, second) == ranking_accuracy(first + moved, second + moved)
    # A constant per pair in policy or reference.
    assert reward_accuracy(first, second, ref1, ref2) == reward_accuracy(first + moved, second + moved, ref1, ref2)
    logps = jnp.stack([first, second])
    mask = jnp.ones_like(logps, int)
    mean, total = sequence_logprob(logps, mask, length_normalize=True), sequence_logprob(logps, mask)
    assert correctly_ranked(mean[0], mean[1]) == correctly_ranked(total[0], total[1])  # of one length


def test_attenuation():
    rng = np.random.default_rng(0)
    x = [jnp.asarray(v) for v in rng.normal(-9, 3, (4, 20)).astype(np.float32)]
    mask = jnp.ones((20, 1), int)
    full = dpo_loss(*(v[:, None] for v in x), mask, mask, beta=0.4)
    np.testing.assert_allclose(attenuated_dpo_loss(*x, beta=0.4), full, rtol=1e-5)
    free = attenuated_dpo_loss(*x, beta=0.4, ref_weight=0.0)
    np.testing.assert_array_equal(free, attenuated_dpo_loss(x[0], x[1], 3 * x[2], -x[3], beta=0.4, ref_weight=0.0))
    np.testing.assert_allclose(free, np.log1p(np.exp(-0.4 * (x[0] - x[1]))), rtol=1e-5)


def test_transitions_count_every_pair_once():
    before, after = jnp.array([0, 0, 0, 1, 1], bool), jnp.array([0, 1, 1, 0, 1], bool)
    assert ranking_transitions(before, after).tolist() == [[1, 2], [1, 1]]


def test_whole_rankings():
    logps = jnp.array([[-1.0, -2.0, -3.0], [-1.0, -2.0, -1.5], [-1.0, -1.0, -1.0]])
    np.testing.assert_allclose(whole_ranking_accuracy(logps), 2 / 3, rtol=1e-6)


def test_rewards_are_right_long_before_rankings():
    """A log-linear policy: training to a reward accuracy of 0.95 hardly moves the ranking accuracy."""
    gaps = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        features = rng.normal(size=(1000, 50))  # chosen minus rejected; turned so that a hidden direction prefers it
        features = jnp.asarray(features * np.sign(features @ rng.normal(size=(50, 1))), jnp.float32)
        difficulty = jnp.asarray(rng.normal(3, 20, 1000), jnp.float32)
        zero = jnp.zeros(1000)

        def loss(theta, features=features, difficulty=difficulty, zero=zero):
            return attenuated_dpo_loss(features @ theta - difficulty, zero, -difficulty, zero, beta=0.1).mean()

        @jax.jit
        def train(loss=loss):
            step = lambda theta, _: (theta - 5 * jax.grad(loss)(theta), None)  # noqa: E731
            return jax.lax.scan(step, jnp.zeros(50), length=50)[0]

        policy = features @ train() - difficulty
        reward = reward_accuracy(policy, zero, -difficulty, zero)
        gaps.append(float(reward - ranking_accuracy(policy, zero)))
        assert reward > 0.9
    assert np.mean(gaps) > 0.2


def test_bad_arguments():
    x = jnp.zeros(3)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\]"):
        ranking_accuracy(x, x, alpha=1.5)
    with pytest.raises(ValueError, match="tie_tol must lie in"):
        ranking_accuracy(x, x, tie_tol=-1.0)
    with pytest.raises(ValueError, match="beta must lie in"):
        idealized_ranking_accuracy(x, x, beta=0.0)
    with pytest.raises(ValueError, match="eps must lie in"):
        idealized_log_ratio(x, x, 0.5, 0.1, eps=0.5)
    with pytest.raises(ValueError, match="ref_weight must lie in"):
        attenuated_dpo_loss(x, x, x, x, ref_weight=-1.0)
    with pytest.raises(ValueError, match=r"logp_rejected must have shape \(3,\)"):
        ranking_accuracy(x, jnp.zeros(2))
    with pytest.raises(ValueError, match="logps must hold 2 or more"):
        whole_ranking_accuracy(jnp.zeros((3, 1)))
