"""Attention on the product of query and key weights: the same as the reparameterized one that it comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import QKProductSelfAttention, QKReparamSelfAttention, integer_apply, qk_product_params
from poise.quant import QuantRule, apply_weight_quant, export

RULES = (QuantRule("kernel$", weight_bits=3),)
HEADS, WIDTH = 2, 6


@pytest.fixture(scope="module")
def trained():
    """A reparameterized attention's variables, with shifts and biases that are not zero, and tokens."""
    x = jax.random.normal(jax.random.key(0), (4, 5, WIDTH))
    attention = QKReparamSelfAttention(HEADS, weight_bits=3, act_bits=8)
    variables = jax.jit(attention.init)(jax.random.key(1), x)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + (0.1 if "shift" in str(path[-1]) or "bias" in str(path[-1]) else 0.0), variables
    )
    return attention, moved, x


def deployed(variables):
    return {**variables, "params": qk_product_params(variables["params"], HEADS)}


def test_it_is_the_reparameterized_attention(trained):
    attention, variables, x = trained
    weights = apply_weight_quant(deployed(variables), {}, RULES)
    out = jax.jit(QKProductSelfAttention(HEADS, act_bits=8).apply)(weights, x)
    expected = jax.jit(attention.apply)(variables, x)
    error = np.abs(out - expected)
    # An activation at a threshold may be rounded to the other side by sums in another order.
    assert np.median(error) < 1e-6
    assert error.max() < 0.02 * np.abs(expected).max()


def test_it_has_the_same_collection_of_steps(trained):
    _, variables, x = trained
    found = jax.eval_shape(QKProductSelfAttention(HEADS, act_bits=8).init, jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, found["quant"]) == jax.tree.map(jnp.shape, variables["quant"])
    assert jax.tree.map(jnp.shape, found["params"]) == jax.tree.map(jnp.shape, deployed(variables)["params"])


def test_it_runs_in_integers(trained):
    attention, variables, x = trained
    stored = export(deployed(variables), {}, RULES)
    assert sum(leaf.size * leaf.itemsize for leaf in jax.tree.leaves(stored.params["params"]["product"])) < 150
    out = jax.jit(lambda v, x: integer_apply(QKProductSelfAttention(HEADS, act_bits=8), v, x))(stored.params, x)
    expected = jax.jit(attention.apply)(variables, x)
    assert float(jnp.abs(out - expected).max() / jnp.abs(expected).max()) < 0.15  # 8 bits of 8-bit activations


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_heads must divide the width 6 of x, got 4"):
        QKProductSelfAttention(4, act_bits=8).init(jax.random.key(0), jnp.ones((1, 2, 6)))
    with pytest.raises(ValueError, match="act_bits"):
        QKProductSelfAttention(2, act_bits=1).init(jax.random.key(0), jnp.ones((1, 2, 6)))
