"""The average that starts at the first gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.optim import average_gradients


def test_weights_of_all_gradients():
    """(1-beta)^(t-1) for the first, beta (1-beta)^(t-s) for the others, summing to 1."""
    beta, steps = 0.3, 6
    with jax.enable_x64():
        tx = average_gradients(beta)
        state = tx.init(jnp.zeros(steps))
        for g in jnp.eye(steps):
            update, state = tx.update(g, state)
        update, state = np.asarray(update), jax.tree.map(np.asarray, state)
    weights = beta * (1 - beta) ** np.arange(steps - 1, -1, -1)
    weights[0] /= beta
    np.testing.assert_allclose(update, weights, rtol=1e-13)
    assert float(update.sum()) == pytest.approx(1.0)
    np.testing.assert_array_equal(state.average, update)


def test_beta_one_passes_gradients_through():
    grads = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    tx = average_gradients(1.0)
    state = tx.init(jnp.zeros(4))
    for g in grads:
        update, state = tx.update(jnp.asarray(g), state)
        np.testing.assert_array_equal(update, g)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_and_none(dtype):
    params = {"a": jnp.ones(2, dtype), "b": jnp.ones(2, dtype)}
    tx = average_gradients(0.5, accumulator_dtype=jnp.float32)
    state = tx.init(params)
    _, state = tx.update(params, state)
    updates, after = tx.update({"a": 3 * params["a"], "b": None}, state)
    assert updates["b"] is None
    assert updates["a"].dtype == dtype
    assert after.average["a"].dtype == jnp.float32
    assert after.average["a"].tolist() == [2.0, 2.0]
    assert after.average["b"].tolist() == [1.0, 1.0]
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_is_optax_ema_but_for_the_start():
    """The same recursion: the difference to a plain ema decays as (1-beta)^t times the first gradient."""
    with jax.enable_x64():
        grads = np.random.default_rng(1).standard_normal((5, 3))
        ours, theirs = average_gradients(0.2), optax.ema(0.8, debias=False)
        a, b = ours.init(jnp.zeros(3)), theirs.init(jnp.zeros(3))
        for t, g in enumerate(grads):
            x, a = ours.update(jnp.asarray(g), a)
            y, b = theirs.update(jnp.asarray(g), b)
            np.testing.assert_allclose(x - y, 0.8 ** (t + 1) * grads[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beta", [0.0, -0.1, 1.1])
def test_bad_input(beta):
    with pytest.raises(ValueError, match=r"beta must lie in \(0, 1\]"):
        average_gradients(beta)
