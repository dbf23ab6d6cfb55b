"""Confidence-guided annealing: the official trace, frozen weights bit for bit, the inner optimizer, nnx, bad input."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.quant import confidence_guided_annealing, high_confidence_mask

FROZEN = jnp.array([[1.0, -1.0], [3.0, 3.0]])  # a scale of 4 for each column: halfway between two thresholds at 2 bits


def run(tx, params, grads):
    """Weights after each of a row of given gradients."""

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@pytest.mark.golden
@pytest.mark.golden_pattern("quant", "cga*.npz")
def test_official_trajectory(golden_file):
    data = np.load(golden_file)
    options = {"bits": int(data["ft_bits"]), "boundary_range": float(data["ft_br"]), "axis": 1}
    adamw = optax.adamw(float(data["ft_lr"]), weight_decay=float(data["ft_wd"]))
    tx = confidence_guided_annealing(adamw, **options)
    weights = jax.jit(lambda w, g: run(tx, w, g))(data["ft_w0"], data["ft_grads"])
    np.testing.assert_allclose(weights, data["ft_w"], rtol=0, atol=1e-6)
    weights = np.asarray(weights)
    before = np.concatenate([data["ft_w0"][None], weights[:-1]])
    frozen = data["ft_frozen"].astype(bool)
    for w, mask in zip(before, frozen, strict=True):
        np.testing.assert_array_equal(high_confidence_mask(w, **options), mask)
    np.testing.assert_array_equal(weights[frozen], before[frozen])


BAND = {"bits": 2, "boundary_range": 0.05, "axis": 0}


@jax.jit
def annealed(w, grads):
    """The weights before and after each step, and which were frozen in it."""
    tx = confidence_guided_annealing(optax.adamw(0.01, weight_decay=1.0), **BAND)

    def step(carry, g):
        w, state = carry
        updates, state = tx.update(g, state, w)
        return (optax.apply_updates(w, updates), state), (w, high_confidence_mask(w, **BAND))

    (last, _), (before, frozen) = jax.lax.scan(step, (w, tx.init(w)), grads)
    return before, jnp.concatenate([before[1:], last[None]]), frozen


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_frozen_weights_keep_every_bit_whatever_momentum_and_decay_want(seed, dtype):
    rng = np.random.default_rng(seed)
    w, grads = rng.standard_normal((12, 8)), rng.standard_normal((40, 12, 8))
    before, after, frozen = map(np.asarray, annealed(jnp.asarray(w, dtype), jnp.asarray(grads, dtype)))
    assert 0.5 < frozen.mean() < 1
    np.testing.assert_array_equal(after[frozen], before[frozen])
    assert (after[~frozen] != before[~frozen]).mean() > 0.5


def test_with_nothing_frozen_it_is_the_inner_optimizer():
    """A mask of False: all leaves, states included, are those of AdamW."""
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32), "bias": jnp.ones(3)}
    grads = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((7, *p.shape)), jnp.float32), params)
    adamw = optax.adamw(0.01)
    tx = confidence_guided_annealing(adamw, bits=2, axis=0, mask=False)
    for ours, theirs in zip(
        jax.tree.leaves((run(tx, params, grads), tx.init(params))),
        jax.tree.leaves((run(adamw, params, grads), adamw.init(params))),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_vectors_train_as_ever_and_masks_choose_leaves():
    params = {"a": {"kernel": FROZEN, "bias": jnp.ones(2)}, "b": {"kernel": FROZEN}}
    grads = jax.tree.map(jnp.ones_like, params)

    def moved(mask):
        tx = confidence_guided_annealing(optax.sgd(1.0), bits=2, axis=0, mask=mask)
        updates, _ = tx.update(grads, tx.init(params), params)
        return [
            path
            for path, u in zip(("a/bias", "a/kernel", "b/kernel"), jax.tree.leaves(updates), strict=True)
            if u.any()
        ]

    assert moved(None) == ["a/bias"]
    chosen = {"a": {"kernel": True, "bias": False}, "b": False}  # a prefix of the parameters' tree
    assert moved(chosen) == moved(lambda _: chosen) == ["a/bias", "b/kernel"]


def test_layers_of_different_bits_nest():
    """At 1 bit only 0 is a threshold, at 2 bits half the scale is one too."""
    params = {"one": jnp.array([[1.0, 0.0, -0.5, 0.5]]), "two": jnp.array([[1.0, 0.0, -0.5, 0.5]])}
    tx = optax.sgd(1.0)
    for name, bits in (("one", 1), ("two", 2)):
        mask = {key: key == name for key in params}
        tx = confidence_guided_annealing(tx, bits=bits, axis=1, mask=mask)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert (updates["one"] != 0).tolist() == [[False, True, False, False]]
    assert (updates["two"] != 0).tolist() == [[False, True, True, True]]


def test_leaves_that_are_not_there_pass():
    params = {"kernel": FROZEN, "other": None}
    tx = confidence_guided_annealing(optax.adam(0.1), bits=2, axis=0)
    updates, _ = tx.update({"kernel": jnp.ones((2, 2)), "other": None}, tx.init(params), params)
    assert updates["other"] is None
    assert not updates["kernel"].any()


def test_an_nnx_module_with_its_optimizer():
    model = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    tx = confidence_guided_annealing(optax.adamw(0.01, weight_decay=0.5), bits=2, boundary_range=0.1, axis=0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (5, 8))

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)

    for _ in range(4):
        before, bias = np.array(model.kernel[...]), np.array(model.bias[...])
        frozen = np.asarray(high_confidence_mask(before, bits=2, boundary_range=0.1, axis=0))
        step(model, optimizer)
        kernel = np.asarray(model.kernel[...])
        np.testing.assert_array_equal(kernel[frozen], before[frozen])
        assert (kernel != before)[~frozen].all()
        assert (np.asarray(model.bias[...]) != bias).all()


def test_bad_input():
    with pytest.raises(ValueError, match=r"bits must be in \[1, 8\], got 0"):
        confidence_guided_annealing(optax.sgd(1.0), bits=0, axis=0)
    with pytest.raises(ValueError, match=r"boundary_range must lie in \[0, 0.5\], got 0.6"):
        confidence_guided_annealing(optax.sgd(1.0), bits=2, boundary_range=0.6, axis=0)
    tx = confidence_guided_annealing(optax.sgd(1.0), bits=2, axis=0)
    w = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(w, tx.init(w))
    with pytest.raises(ValueError, match=r"params must hold floats, got int32 at \['w'\]"):
        tx.init({"w": jnp.ones(2, jnp.int32)})
    with pytest.raises(ValueError, match="axis must lie in"):
        confidence_guided_annealing(optax.sgd(1.0), bits=2, axis=2).update(w, tx.init(w), w)


@pytest.mark.effects
def test_annealing_stops_the_jumps_on_digits():
    """Over five seeds at least ten times fewer codes change, and the accuracy does not fall."""
    script = pathlib.Path(__file__).parents[2] / "docs" / "effects" / "oscillation_digits.py"
    spec = importlib.util.spec_from_file_location("oscillation_digits", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runs = module.summary(module.experiment())
    free, annealed, wider = (runs[name] for name in ("StatsQ", "StatsQ, range 0.005", "StatsQ, range 0.02"))
    ratio = np.array(free["flips"]) / np.array(annealed["flips"])
    print("flips without over with annealing, by seed:", ratio)
    assert (ratio > 10).all()
    assert (np.array(wider["flips"]) < np.array(free["flips"])).all()
    assert np.mean(annealed["accuracy"]) > np.mean(free["accuracy"]) - 0.005
    assert np.mean(annealed["oscillating"]) < 0.1 * np.mean(free["oscillating"])
