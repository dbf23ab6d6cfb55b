"""Armijo's search: the condition at every step, stopping, dtypes, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.optim import Armijo, armijo_gradient_descent


def rosenbrock(x):
    return (1 - x[0]) ** 2 + 20 * (x[1] - x[0] ** 2) ** 2


def test_every_step_satisfies_the_condition_and_no_larger_trial_does():
    """Against a search written out in Python, step by step."""
    options = Armijo(c=0.3, shrink=0.7, expand=1.5, initial_step=4.0)
    with jax.enable_x64():
        x, step = np.array([-1.2, 1.0]), 4.0
        gradient = jax.jit(jax.grad(rosenbrock))
        descend = jax.jit(lambda x, n: armijo_gradient_descent(rosenbrock, x, n, options), static_argnums=1)
        trials = 0
        for _ in range(8):
            g = np.asarray(gradient(x))
            step *= 1.5
            trials += 1
            while rosenbrock(x - step * g) > rosenbrock(x) - 0.3 * step * g @ g:
                step *= 0.7
                trials += 1
            x = x - step * g
        ours, info = descend(jnp.array([-1.2, 1.0]), 8)
        np.testing.assert_allclose(ours, x, rtol=1e-13)
        assert float(info.step_size) == pytest.approx(step, rel=1e-13)
        assert float(info.grad_norm) == pytest.approx(np.linalg.norm(g), rel=1e-13)
        assert (int(info.num_steps), int(info.num_trials)) == (8, trials)


def test_stops_where_the_gradient_vanishes():
    _, info = armijo_gradient_descent(lambda x: jnp.sum(x**2), jnp.zeros(3), 50)
    assert int(info.num_steps) == 1
    assert float(info.grad_norm) == 0.0


def test_nan_trials_are_rejected():
    """A logarithm that is NaN beyond zero: the search backs off into the domain."""
    x, _ = armijo_gradient_descent(lambda x: x - jnp.log(x), jnp.array(5.0), 60)
    assert float(x) == pytest.approx(1.0, abs=1e-2)


def test_gives_up_after_the_last_trial():
    """No step against a rising direction passes; the last, untried step is taken."""
    options = Armijo(max_backtracks=3, expand=1.0, shrink=0.5, initial_step=1.0)
    jump = lambda x: jnp.where(x == 1.0, 0.0, 1.0) + x - 1.0  # noqa: E731
    x, info = armijo_gradient_descent(jump, jnp.array(1.0), 1, options)
    assert (float(info.step_size), int(info.num_trials), float(x)) == (0.125, 3, 0.875)
    _, info = armijo_gradient_descent(jump, jnp.array(1.0), 1, options._replace(max_backtracks=100, min_step=0.3))
    assert (float(info.step_size), int(info.num_trials)) == (0.25, 2)


def test_vmap_is_the_loop():
    starts = jnp.array([[-1.2, 1.0], [0.5, 0.5], [2.0, -1.0]])
    run = jax.jit(lambda x: armijo_gradient_descent(rosenbrock, x, 5)[0])
    np.testing.assert_allclose(jax.vmap(run)(starts), jnp.stack([run(x) for x in starts]), rtol=1e-5)


def test_low_precision_keeps_its_dtype():
    x, info = armijo_gradient_descent(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2, jnp.bfloat16), 20)
    assert x.dtype == jnp.bfloat16
    assert info.step_size.dtype == jnp.float32
    np.testing.assert_allclose(x.astype(jnp.float32), 1.0, atol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Armijo(c=0.0), "c must lie"),
        (Armijo(shrink=0.0), "shrink must lie"),
        (Armijo(expand=0.9), "expand must lie"),
        (Armijo(max_backtracks=0), "max_backtracks must be at least 1"),
        (Armijo(min_step=-1.0), "min_step must lie"),
        (Armijo(tolerance=-1.0), "tolerance must lie"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        armijo_gradient_descent(rosenbrock, jnp.zeros(2), 1, options)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        armijo_gradient_descent(rosenbrock, jnp.zeros(2), 0)
