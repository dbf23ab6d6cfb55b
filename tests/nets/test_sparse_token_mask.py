"""Learned masks of tokens: the formula by hand, a live start, dropout, no gradient into the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import SparseTokenMask

HIDDEN = jax.random.normal(jax.random.key(0), (3, 2, 5, 8))


def test_by_hand():
    module = SparseTokenMask(3)
    params = module.init(jax.random.key(1), HIDDEN)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    weights = jax.jit(module.apply)({"params": params}, HIDDEN)
    h = np.asarray(HIDDEN, np.float64)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * params["norm"]["scale"] + params["norm"]["bias"]
    layers = np.maximum(np.einsum("lbtd,ld->lbt", h, params["kernel"]) + np.asarray(params["bias"])[:, None, None], 0)
    expected = np.maximum(np.einsum("lbt,l->bt", layers, params["mixer"]), 0)
    np.testing.assert_allclose(weights, expected, rtol=0, atol=2e-5)
    assert (expected == 0).any()
    assert (expected > 0).any()


def test_it_starts_alive_whatever_the_seed():
    module = SparseTokenMask(3)

    def start(key):
        variables = module.init(key, HIDDEN)
        loss = lambda params: module.apply({"params": params}, HIDDEN).sum()  # noqa: E731
        weights = module.apply(variables, HIDDEN)
        return jnp.mean(weights > 0), jnp.abs(jax.grad(loss)(variables["params"])["kernel"]).max()

    alive, slope = jax.jit(jax.vmap(start))(jax.random.split(jax.random.key(2), 20))
    assert np.all(np.asarray(alive) == 1)
    assert np.all(np.asarray(slope) > 0)


def test_no_gradient_into_the_reference():
    module = SparseTokenMask(3)
    variables = module.init(jax.random.key(1), HIDDEN)
    assert not np.any(jax.grad(lambda h: module.apply(variables, h).sum())(HIDDEN))


def test_dropout_only_while_training():
    module = SparseTokenMask(3, dropout=0.5)
    variables = module.init(jax.random.key(1), HIDDEN)
    plain = module.apply(variables, HIDDEN)
    noisy = [module.apply(variables, HIDDEN, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)]
    assert np.any(noisy[0] != noisy[1])
    np.testing.assert_array_equal(plain, module.apply(variables, HIDDEN))


def test_half_precision():
    module = SparseTokenMask(3)
    hidden = HIDDEN.astype(jnp.bfloat16)
    variables = module.init(jax.random.key(1), hidden)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    weights = module.apply(variables, hidden)
    assert weights.dtype == jnp.bfloat16
    np.testing.assert_allclose(weights.astype(jnp.float32), module.apply(variables, HIDDEN), rtol=0, atol=0.1)


def test_bad_settings():
    with pytest.raises(ValueError, match="hidden must hold 2 layers, got shape"):
        SparseTokenMask(2).init(jax.random.key(0), HIDDEN)
    with pytest.raises(ValueError, match="dropout must lie in"):
        SparseTokenMask(3, dropout=1.0).init(jax.random.key(0), HIDDEN)
