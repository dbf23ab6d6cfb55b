"""Proximal maps at the end of a chain: exact zeros, step sizes, leaves without updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.optim import apply_prox


def soft(params, step_size):
    """The proximal map of the l1 norm."""
    return jax.tree.map(lambda p: jnp.sign(p) * jnp.maximum(jnp.abs(p) - step_size, 0), params)


def test_is_proximal_gradient_descent():
    """Least squares with an l1 penalty: the fixed point satisfies the optimality condition, with exact zeros."""
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.standard_normal((20, 8)), jnp.float32), jnp.asarray(rng.standard_normal(20), jnp.float32)
    gradient = jax.grad(lambda w: 0.5 * jnp.sum((a @ w - b) ** 2))
    lr, lam = 0.02, 4.0
    tx = optax.chain(optax.sgd(lr), apply_prox(lambda w, step: soft(w, lam * step), lr))

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(gradient(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    w = jax.jit(lambda w: jax.lax.scan(step, (w, tx.init(w)), length=400)[0][0])(jnp.ones(8))
    g = gradient(w)
    zero = w == 0
    assert 0 < int(zero.sum()) < 8
    assert (jnp.abs(g[zero]) <= lam * (1 + 1e-4)).all()
    np.testing.assert_allclose(g[~zero], -lam * jnp.sign(w[~zero]), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_projection_holds_exactly_and_dtypes_stay(dtype):
    params = {"w": jnp.asarray([0.3, -0.7, 0.1], dtype)}
    tx = apply_prox(lambda p, _: jax.tree.map(lambda x: jnp.maximum(x, 0), p), 1.0)
    updates, state = tx.update({"w": jnp.asarray([-0.1, 0.2, -0.4], dtype)}, tx.init(params), params)
    assert updates["w"].dtype == dtype
    new = optax.apply_updates(params, updates)["w"]
    assert (new[1:] == 0).all()
    assert new[0] > 0
    assert int(state.count) == 1


def test_step_size_follows_the_schedule():
    tx = apply_prox(soft, lambda count: 0.5**count)
    params = jnp.array([10.0])
    state = tx.init(params)
    for expected in (-1.0, -0.5, -0.25):
        updates, state = tx.update(jnp.zeros(1), state, params)
        assert float(updates[0]) == expected


def test_leaves_without_updates_are_left_alone():
    params = {"a": jnp.array([3.0]), "b": jnp.array([3.0])}
    tx = apply_prox(soft, 1.0)
    updates, _ = tx.update({"a": None, "b": jnp.array([0.5])}, tx.init(params), params)
    assert updates["a"] is None
    assert float(updates["b"][0]) == -0.5
    masked = optax.masked(tx, {"a": False, "b": True})
    updates, _ = masked.update({"a": jnp.array([0.5]), "b": jnp.array([0.5])}, masked.init(params), params)
    assert (float(updates["a"][0]), float(updates["b"][0])) == (0.5, -0.5)


def test_bad_input():
    with pytest.raises(ValueError, match="learning_rate must lie"):
        apply_prox(soft, -1.0)
    tx = apply_prox(soft, 1.0)
    state = tx.init(jnp.ones(2))
    with pytest.raises(ValueError, match="params=None"):
        tx.update(jnp.ones(2), state)
