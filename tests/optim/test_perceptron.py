"""Perceptrons: limits of gradient descent with large steps, one update at a time, standing still in the end."""

import jax
import jax.numpy as jnp
import numpy as np

from poise.optim import (
    batch_perceptron,
    batch_perceptron_rule,
    iterations_to_separate,
    logistic_gd,
    path_of_rule,
    perceptron_rule,
)


def random_data(seed, n=30, d=3):
    """Separable data: a random direction and a gap."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    normal = rng.standard_normal(d)
    normal /= np.linalg.norm(normal)
    side = np.where(x @ normal > 0, 1.0, -1.0)
    x += 0.2 * side[:, None] * normal
    return jnp.asarray(x), jnp.asarray(side)


def test_updates_are_what_they_say():
    """Against loops written out in Python, whatever the order of signs."""
    with jax.enable_x64():
        x, y = random_data(1)
        signed = np.asarray(y[:, None] * x)
        for rule, update in (
            (perceptron_rule(), lambda wrong, t: wrong[0]),
            (batch_perceptron_rule(), lambda wrong, t: wrong.sum(0) / len(signed) * (0.5 if t == 0 else 1.0)),
            (batch_perceptron_rule(normalized=True), lambda wrong, t: wrong.mean(0)),
        ):
            theta = np.zeros(3)
            for t, ours in enumerate(path_of_rule(rule, x, y, 8)):
                np.testing.assert_allclose(ours, theta, rtol=1e-12, atol=1e-14)
                wrong = signed[signed @ theta <= 0]
                theta = theta + update(wrong, t) if len(wrong) else theta


def test_large_steps_tend_to_the_batch_perceptron():
    with jax.enable_x64():
        x, y = random_data(3)
        limit = batch_perceptron(x, y, 6)
        assert jnp.abs(jnp.diff(limit, axis=0)).max() > 0.1
        gap = jax.jit(lambda gamma: jnp.abs(logistic_gd(x, y, gamma, 6) / gamma - limit).max())
        gaps = [float(gap(gamma)) for gamma in (1e2, 1e4, 1e6)]
        assert gaps[2] < 1e-9
        assert gaps[2] <= gaps[1] <= gaps[0]


def test_perceptrons_stand_still_once_all_is_separated():
    x, y = jnp.eye(2), jnp.array([1.0, -1.0])
    for rule in (perceptron_rule(), batch_perceptron_rule(), batch_perceptron_rule(normalized=True)):
        path = path_of_rule(rule, x, y, 6)
        result = iterations_to_separate(rule, x, y, 10)
        assert (path[int(result.num_steps) :] == result.theta).all()
