"""Quantization-aware training on 8 devices: sharded parameters and pmap give what one device gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from poise.quant import (
    QuantRule,
    apply_weight_quant,
    confidence_guided_annealing,
    init_weight_qparams,
    oscillation_init,
    oscillation_update,
    statsq_codes,
)

RULES = [QuantRule("out", weight_bits=4, method="lsq"), QuantRule("hidden", weight_bits=2)]
MASK = {"weights": {"hidden": True, "out": False}, "steps": False}
TX = confidence_guided_annealing(optax.adamw(1e-2), bits=2, boundary_range=0.1, axis=0, mask=MASK)


@functools.cache
def start():
    rng = np.random.default_rng(0)
    weights = {"hidden": rng.standard_normal((12, 16)), "out": rng.standard_normal((16, 8))}
    weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), weights)
    params = {"weights": weights, "steps": init_weight_qparams(weights, RULES)}
    return (params, TX.init(params), oscillation_init(statsq_codes(weights["hidden"], bits=2, axis=0)[0]))


def step(carry, x, axis_name=None):
    """One step of a two-layer network with everything in it: rules, annealing, oscillation."""
    params, state, oscillation = carry

    def loss(params):
        weights = apply_weight_quant(params["weights"], params["steps"], RULES)
        return jnp.mean((jnp.tanh(x @ weights["hidden"]) @ weights["out"] - x[:, :8]) ** 2)

    value, grads = jax.value_and_grad(loss)(params)
    if axis_name is not None:
        value, grads = jax.lax.pmean((value, grads), axis_name)
    updates, state = TX.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    codes = statsq_codes(params["weights"]["hidden"], bits=2, axis=0)[0]
    return (params, state, oscillation_update(oscillation, codes)), value


def batches():
    return jnp.asarray(np.random.default_rng(1).standard_normal((3, 16, 12)), jnp.float32)


@pytest.fixture(scope="module")
def expected(quick_jit):
    carry, one = start(), quick_jit(step)
    for x in batches():
        carry, _ = one(carry, x)
    assert (carry[0]["weights"]["hidden"] != start()[0]["weights"]["hidden"]).any()
    return jax.device_get(carry)


def check(ours, expected):
    for a, b in zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_sharded_parameters(expected, quick_jit):
    """Weights by output or by input, with the scales of groups that lie on several devices."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "model"))

    def place(leaf):
        by = {(12, 16): PartitionSpec("data", "model"), (16, 8): PartitionSpec("model", None)}
        return jax.device_put(leaf, NamedSharding(mesh, by.get(leaf.shape, PartitionSpec())))

    carry, one = jax.tree.map(place, start()), quick_jit(step)
    for x in batches():
        carry, _ = one(carry, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert not carry[0]["weights"]["hidden"].sharding.is_fully_replicated
    check(carry, expected)


def test_pmap(expected):
    devices = jax.devices()[:8]
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (8, *leaf.shape)), start())
    one = jax.pmap(lambda carry, x: step(carry, x, "data"), axis_name="data", devices=devices)
    for x in batches():
        carry, _ = one(carry, x.reshape(8, 2, 12))
    check(jax.tree.map(lambda leaf: leaf[3], carry), expected)


def test_vmap_over_seeds(expected, quick_jit):
    carry = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), start())
    one = quick_jit(jax.vmap(step, (0, None)))
    for x in batches():
        carry, _ = one(carry, x)
    check(jax.tree.map(lambda leaf: leaf[1], carry), expected)
