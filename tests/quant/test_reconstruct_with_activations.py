"""Rounding of weights that is learned together with the steps of activations, with and without dropping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.quant import (
    FlexRound,
    apply_quantizers,
    lsq,
    lsq_init,
    qdrop,
    reconstruct,
    reconstruct_with_activations,
    reconstruction_loss,
)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


PARAMS = {"a": draw((8, 8), 1), "b": draw((8, 4), 2)}
X = draw((48, 3), 3) @ draw((3, 8), 4) + 0.2 * draw((48, 8), 5)
RUN = {"steps": 40, "optimizer": optax.adam(optax.cosine_decay_schedule(1e-2, 40)), "key": jax.random.key(0)}
ADAM = optax.adam(optax.cosine_decay_schedule(1e-2, 40))
FROZEN = optax.set_to_zero()
FLEXROUND = FlexRound(bits=3, axis=None)


def float_block(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


TARGET = float_block(PARAMS, X)


@functools.cache
def block(drop):
    """Two layers, each with a quantizer of its input; what is dropped is drawn from the key."""

    def apply(params, x, activations, key):
        def quantized(x, name, signed):
            y = lsq(x, activations[name]["step"], bits=3, signed=signed, axis=None)
            return y if key is None else qdrop(jax.random.fold_in(key, ord(name)), x, y, drop)

        hidden = jax.nn.relu(quantized(x, "a", True) @ params["a"])
        return quantized(hidden, "b", False) @ params["b"]

    return apply


def first_steps(factor=1.0):
    hidden = jax.nn.relu(X @ PARAMS["a"])
    steps = {"a": lsq_init(X, bits=3, axis=None), "b": lsq_init(hidden, bits=3, signed=False, axis=None)}
    return {name: {"step": factor * step} for name, step in steps.items()}


def learned(drop=None, *, inner=0.5, x=X, activations=None, move=ADAM, **options):
    return reconstruct_with_activations(
        block(inner),
        PARAMS,
        first_steps() if activations is None else activations,
        x,
        TARGET,
        quantizer=FLEXROUND,
        activation_optimizer=move,
        drop=drop,
        **{**RUN, **options},
    )


def equal(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_with_steps_that_stay_it_is_reconstruct():
    """Of a block that quantizes its activations itself, batches and mixed inputs included."""
    start, noisy = first_steps(), X + 0.3 * draw(X.shape, 9)
    whole = lambda params, x: block(0.5)(params, x, start, None)  # noqa: E731
    qparams, activations, losses = learned(move=FROZEN)
    equal(activations, start)
    equal((qparams, losses), reconstruct(whole, PARAMS, X, TARGET, quantizer=FLEXROUND, **RUN))
    options = {"x_float": noisy, "batch_size": 16}
    found = learned(0.5, inner=1.0, move=FROZEN, **options)
    plain = reconstruct(whole, PARAMS, X, TARGET, quantizer=FLEXROUND, drop=0.5, **options, **RUN)
    np.testing.assert_allclose(found[2], plain[1], rtol=1e-5)


def test_quantizing_with_probability_1_drops_nothing():
    noisy = X + 0.3 * draw(X.shape, 9)
    one, two = learned(1.0, inner=1.0, x_float=noisy), learned(None)
    np.testing.assert_allclose(one[2], two[2], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one[:2], two[:2])


def test_with_probability_0_the_block_is_float_but_for_its_weights():
    noisy, start = X + 0.3 * draw(X.shape, 9), first_steps()
    qparams, activations, losses = learned(0.0, inner=0.0, x=noisy, x_float=X)
    equal(activations, start)  # which nothing depends on
    expected, plain = reconstruct(float_block, PARAMS, X, TARGET, quantizer=FLEXROUND, **RUN)
    np.testing.assert_allclose(losses, plain, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), qparams, expected)


def test_steps_are_learned_with_the_weights():
    start = first_steps(0.3)  # too short, so much is clipped
    quantized = block(0.5)

    def error(qparams, activations):
        out = quantized(apply_quantizers(PARAMS, qparams, FLEXROUND), X, activations, None)
        return float(reconstruction_loss(out, TARGET))

    fixed = learned(activations=start, move=FROZEN)
    for drop in (None, 0.5):
        qparams, activations, losses = learned(drop, activations=start)
        assert losses.shape == (40,)
        moved = jax.tree.map(lambda new, old: bool(new > old), activations, start)
        assert all(jax.tree.leaves(moved)), moved
        assert error(qparams, activations) < error(fixed[0], start)


def test_the_first_loss_is_that_of_the_start_and_keys_decide_what_is_dropped():
    start = first_steps()
    qparams = {name: FLEXROUND.init(weight, jax.random.key(0)) for name, weight in PARAMS.items()}
    first = block(0.5)(apply_quantizers(PARAMS, qparams, FLEXROUND), X, start, None)
    plain = learned()[2]
    np.testing.assert_allclose(plain[0], reconstruction_loss(first, TARGET), rtol=1e-5)
    dropped, again, other = (learned(0.5, key=jax.random.key(seed))[2] for seed in (0, 0, 1))
    equal(dropped, again)
    assert (dropped != other).any()
    assert dropped[0] < plain[0]  # half of the error of activations is not there


def test_bad_input_is_refused():
    for message, options in {
        "activations must hold at least one array": {"activations": {}},
        r"drop must lie in \[0": {"drop": 1.5},
        "steps must be at least 1": {"steps": 0},
        "the loss of fc7 became nan": {"activations": first_steps(jnp.nan), "name": "fc7"},
        "target must have the 3 examples of x": {"x": X[:3]},
    }.items():
        with pytest.raises(ValueError, match=message):
            learned(**options)
