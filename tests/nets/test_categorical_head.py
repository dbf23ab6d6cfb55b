"""Heads with several numbers per action: shapes, layout of the logits, dtypes, refused settings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import CategoricalHead, ValueMLP


def test_logits_are_actions_then_bins():
    head, features = CategoricalHead(3, 5), jax.random.normal(jax.random.key(0), (4, 2, 7))
    variables = head.init(jax.random.key(1), features)
    logits = head.apply(variables, features)
    assert logits.shape == (4, 2, 3, 5)
    dense = variables["params"]["dense"]
    by_hand = features[1, 0] @ dense["kernel"][:, 2 * 5 : 3 * 5] + dense["bias"][2 * 5 : 3 * 5]
    np.testing.assert_allclose(logits[1, 0, 2], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.uint8, jnp.int32, jnp.float32, jnp.bfloat16])
def test_observations_of_any_dtype(dtype):
    net = ValueMLP(2, 4, (8,))
    observation = jnp.ones((3, 2, 2), dtype)
    variables = net.init(jax.random.key(0), observation)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(net.apply)(variables, observation)
    assert logits.shape == (3, 2, 4)
    flat = net.apply(variables, observation.reshape(3, 4).astype(jnp.float32))
    np.testing.assert_allclose(logits.astype(jnp.float32), flat, rtol=1e-5, atol=1e-6)


def test_computation_in_half_precision():
    net = ValueMLP(2, 4, (8,), jnp.bfloat16)
    variables = net.init(jax.random.key(0), jnp.ones((3, 2)))
    assert net.apply(variables, jnp.ones((3, 2))).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (CategoricalHead(0, 5), "num_actions"),
        (CategoricalHead(3, 0), "num_bins"),
        (ValueMLP(3, 5, (0,)), "hidden"),
    ],
)
def test_bad_settings(module, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        module.init(jax.random.key(0), jnp.ones((2, 4)))
