"""The product of query and key weights: attention's scores, invariance, bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

from poise.quant import qk_product, statsq


def draw(seed, shape):
    return np.random.default_rng(seed).standard_normal(shape)


def test_scores_of_inputs_are_those_of_queries_and_keys():
    heads, width = 3, 12
    wq, wk, x = (draw(i, shape).astype(np.float32) for i, shape in enumerate([(12, 12), (12, 12), (5, 12)]))
    product = qk_product(jnp.asarray(wq), jnp.asarray(wk), heads).reshape(heads, width, width)
    query, key = ((x @ w.T).reshape(5, heads, -1) for w in (wq, wk))
    expected = np.einsum("nhd,mhd->hnm", query, key)
    np.testing.assert_allclose(jnp.einsum("nc,hce,me->hnm", x, product, x), expected, rtol=0, atol=1e-4)


def test_a_change_of_basis_in_a_head_changes_the_quantized_weights_but_not_the_product():
    wq, wk = (jnp.asarray(draw(i, (6, 4)), jnp.float32) for i in range(2))
    rotations = np.zeros((6, 6), np.float32)
    for head in range(2):
        rotations[3 * head : 3 * head + 3, 3 * head : 3 * head + 3] = np.linalg.qr(draw(head + 2, (3, 3)))[0]
    turned = qk_product(rotations @ wq, rotations @ wk, 2)
    np.testing.assert_allclose(turned, qk_product(wq, wk, 2), rtol=0, atol=1e-5)
    apart = [jnp.abs(statsq(rotations @ w, bits=2, axis=1) - rotations @ statsq(w, bits=2, axis=1)) for w in (wq, wk)]
    assert min(float(a.max()) for a in apart) > 0.1


def test_bad_input():
    w = jnp.ones((6, 4))
    with pytest.raises(ValueError, match="num_heads must divide the 6 rows of wq, got 4"):
        qk_product(w, w, 4)
    with pytest.raises(ValueError, match="num_heads must be at least 1"):
        qk_product(w, w, 0)
    with pytest.raises((ValueError, TypeError), match="wk"):
        qk_product(w, jnp.ones((5, 4)), 1)
