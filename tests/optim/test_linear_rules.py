"""Iterations on separable data: exact counts and paths, bounds, limits, failures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import (
    batch_perceptron_rule,
    iterations_to_separate,
    logistic_gd,
    logistic_rule,
    path_of_rule,
    perceptron_rule,
)

quick = settings(max_examples=10, deadline=None)


@jax.jit
def logistic_counts(features, labels, step_size):
    """Steps until separation, normalized and not."""
    rules = logistic_rule(step_size, normalized=True), logistic_rule(step_size)
    return [iterations_to_separate(rule, features, labels, 100_000).num_steps for rule in rules]


@functools.partial(jax.jit, static_argnums=3)
def logistic_paths(features, labels, step_size, num_steps):
    """Iterates, normalized and not."""
    return [logistic_gd(features, labels, step_size, num_steps, normalized) for normalized in (True, False)]


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "perceptron_*.npz")
def test_published_counts_and_paths(golden_file):
    """Exact counts of all four methods at every step size, and the first 20 iterates."""
    data = np.load(golden_file)
    with jax.enable_x64():
        x, y = jnp.asarray(data["features"]), jnp.asarray(data["labels"])
        for i, step_size in enumerate(data["step_sizes"]):
            normalized, plain = logistic_counts(x, y, step_size)
            assert int(normalized) == data["normalized_iterations"][i]
            assert int(plain) == data["lr_gd_iterations"][i]
            paths = logistic_paths(x, y, step_size, data["lr_gd_trajectory"].shape[1] - 1)
            for path, key in zip(paths, ("normalized_trajectory", "lr_gd_trajectory"), strict=True):
                np.testing.assert_allclose(path, data[key][i], rtol=1e-9, atol=1e-9 * np.abs(data[key][i]).max())
        for prefix in ("", "normalized_"):
            result = iterations_to_separate(batch_perceptron_rule(prefix != ""), x, y, 100_000)
            assert int(result.num_steps) == data[f"{prefix}batch_perceptron_iterations"]
            assert bool(result.separated)


def worst_case(n):
    """One example of one class against n - 1 copies of another."""
    x = np.concatenate([[[0.5, -1.0]], np.tile([[-0.5, -1.0]], (n - 1, 1))])
    return jnp.asarray(x), jnp.asarray([1.0] + (n - 1) * [-1.0])


def test_the_papers_table():
    """2, 2, 16, 157 steps when normalized with gamma = 100, 10, 1, 0.1; 308 for gradient descent with gamma = 100."""
    with jax.enable_x64():
        x, y = worst_case(1000)
        normalized = jax.jit(lambda gamma: iterations_to_separate(logistic_rule(gamma, True), x, y, 1000).num_steps)
        counts = [int(normalized(gamma)) for gamma in (100.0, 10.0, 1.0, 0.1)]
        counts.append(int(iterations_to_separate(logistic_rule(100.0), x, y, 1000).num_steps))
    assert counts == [2, 2, 16, 157, 308]


def test_two_examples_in_closed_form():
    """theta_1 = gamma (2/4, 3/4) has a loss that diverges with gamma, theta_2 -> gamma (1, 1/4) separates."""
    with jax.enable_x64():
        x, y = jnp.array([[1.0, -1.0], [-1.0, -4.0]]), jnp.array([1.0, -1.0])
        losses = []
        for gamma in (10.0, 100.0, 1000.0):
            _, first, second = logistic_gd(x, y, gamma, 2)
            np.testing.assert_allclose(first, gamma * np.array([0.5, 0.75]), rtol=1e-14)
            np.testing.assert_allclose(second / gamma, [1.0, 0.25], atol=np.exp(-0.2 * gamma))
            losses.append(float(jnp.mean(jnp.logaddexp(0, -y * (x @ first)))))
            assert (y * (x @ second) > 0).all()
        assert losses[0] > np.log(2)
        assert losses[2] > 9 * losses[1] > 81 * losses[0]


def random_data(seed, n=30, d=3):
    """Separable data: a random direction and a gap."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    normal = rng.standard_normal(d)
    normal /= np.linalg.norm(normal)
    side = np.where(x @ normal > 0, 1.0, -1.0)
    x += 0.2 * side[:, None] * normal
    return x, side, (side * (x @ normal)).min(), np.linalg.norm(x, axis=1).max()


@quick
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 30.0]))
def test_bounds_on_the_number_of_steps(seed, step_size):
    """Novikoff's for the perceptrons, and R^2/mu^2 + 2 log(2n-1)/(gamma mu^2) for normalized gradient descent."""
    with jax.enable_x64():
        x, y, margin, radius = random_data(seed)
        ratio = (radius / margin) ** 2  # the margin of a known direction, at most the best one
        normalized, _ = logistic_counts(x, y, step_size)
        assert int(normalized) <= ratio + 2 * np.log(2 * len(x) - 1) / (step_size * margin**2)
        for steps, bound in zip(perceptron_counts(x, y), (ratio, ratio, ratio * len(x)), strict=True):
            assert int(steps) <= bound


@jax.jit
def perceptron_counts(x, y):
    rules = perceptron_rule(), batch_perceptron_rule(normalized=True), batch_perceptron_rule()
    return [iterations_to_separate(rule, x, y, 100_000).num_steps for rule in rules]


def test_normalized_path_survives_huge_margins():
    """Margins of 1e6 in float32: plain gradients are zero, normalized steps keep their length; no NaN."""
    x, y = jnp.array([[1.0, 0.0], [0.8, 0.6]]), jnp.array([1.0, 1.0])
    path = logistic_gd(1e3 * x, y, 1.0, 50, normalized=True)
    assert bool(jnp.isfinite(path).all())
    assert float(jnp.linalg.norm(jnp.diff(path[-3:], axis=0), axis=1).min()) > 500
    assert (jnp.diff(logistic_gd(1e3 * x, y, 1.0, 50)[-3:], axis=0) == 0).all()


def test_failure_is_reported():
    """The same example with both labels, and the origin, which no direction separates."""
    for x, y in ((jnp.ones((2, 1)), jnp.array([1.0, -1.0])), (jnp.zeros((1, 2)), jnp.ones(1))):
        for rule in (logistic_rule(1.0), logistic_rule(1.0, normalized=True), perceptron_rule()):
            result = iterations_to_separate(rule, x, y, 25)
            assert not bool(result.separated)
            assert int(result.num_steps) == 25
            assert bool(jnp.isfinite(result.theta).all())


def test_vmap_over_step_sizes():
    x, y = (jnp.asarray(a, jnp.float32) for a in worst_case(50))
    count = lambda gamma: iterations_to_separate(logistic_rule(gamma, normalized=True), x, y, 1000).num_steps  # noqa: E731
    gammas, count = jnp.array([0.1, 1.0, 100.0]), jax.jit(count)
    assert jax.vmap(count)(gammas).tolist() == [int(count(gamma)) for gamma in gammas]


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (jnp.zeros((0, 2)), jnp.zeros(0), "n at least 1"),
        (jnp.ones((2, 2)), jnp.array([1.0, 0.0]), "labels must be -1 or 1"),
        (jnp.array([[1.0, jnp.nan]]), jnp.ones(1), "features must be finite"),
        (jnp.array([[1.0, jnp.inf]]), jnp.ones(1), "features must be finite"),
    ],
)
def test_bad_data(features, labels, message):
    for run in (path_of_rule, iterations_to_separate):
        with pytest.raises(ValueError, match=message):
            run(perceptron_rule(), features, labels, 3)


def test_bad_numbers():
    x, y = jnp.eye(2), jnp.ones(2)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        path_of_rule(perceptron_rule(), x, y, 0)
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        iterations_to_separate(perceptron_rule(), x, y, 0)
    with pytest.raises(ValueError, match="step_size must lie"):
        logistic_rule(0.0)
