"""SGDP: the official trajectories, SGD as a special case, the closed form of the norm's growth, bad input."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import ChannelAxes, ScaleBySgdpState, flax_channel_axes, scale_by_sgdp, sgdp

quick = settings(max_examples=10, deadline=None)


@functools.partial(jax.jit, static_argnames=("nesterov", "project_momentum"))
def trajectory(params, grads, lrs, nesterov=False, project_momentum=False, **options):
    """The weights after each of a row of given gradients, and the final state."""
    tx = sgdp(
        lambda count: lrs[count],
        nesterov=nesterov,
        project_momentum=project_momentum,
        channel_axes=flax_channel_axes,
        **options,
    )

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), weights = jax.lax.scan(step, (params, tx.init(params)), grads)
    return weights, state


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "sgdp_*.npz")
def test_official_trajectory(golden_file, both_layouts):
    """All parameters, some in each layout: weights after every step, momentum at the end.

    Files called `unaliased` come from code that keeps the momentum as it is; the official code projects it in place.
    """
    data = np.load(golden_file)
    hparams = json.loads(str(data["hparams"]))
    count, steps = hparams["num_params"], len(data["p0_grads"])
    lrs = data["lr_per_step"] if "lr_per_step" in data else np.full(steps, hparams["lr"])
    defaults = {"momentum": 0.0, "dampening": 0.0, "eps": 1e-8, "weight_decay": 0.0, "delta": 0.1, "wd_ratio": 0.1}
    options = {name: hparams.get(name, value) for name, value in defaults.items()}
    tolerance = 3e-6 if data["p0_init"].dtype == np.float32 else 1e-12
    in_place = "unaliased" not in golden_file.stem
    with jax.enable_x64():
        params, grads = both_layouts(data, "init", count, 0), both_layouts(data, "grads", count, 1)
        weights, state = trajectory(params, grads, lrs, hparams.get("nesterov", False), in_place, **options)
    for ours, key, lead in ((weights, "params", 1), (optax.tree.get(state, "momentum"), "momentum", 0)):
        expected = both_layouts(data, key, count, lead)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@functools.partial(jax.jit, static_argnames="nesterov")
def decoupled_sgd(params, grads, lrs, momentum, decay, nesterov):
    tx = optax.chain(
        optax.trace(momentum, nesterov),
        optax.add_decayed_weights(decay / (1 - momentum)),
        optax.scale_by_learning_rate(lambda count: lrs[count]),
    )

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@quick
@given(st.integers(0, 10**6), st.booleans())
def test_without_threshold_is_sgd_with_decoupled_decay(seed, nesterov):
    with jax.enable_x64():
        rng = np.random.default_rng(seed)
        params, grads = rng.standard_normal((3, 4)), rng.standard_normal((6, 3, 4))
        lrs = rng.uniform(0, 0.05, 6)
        beta, decay = rng.uniform(0, 0.95, 2)
        ours, _ = trajectory(params, grads, lrs, nesterov, momentum=beta, weight_decay=decay, delta=0.0)
        theirs = decoupled_sgd(params, grads, lrs, beta, decay, nesterov)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-13)


def test_projected_momentum_matters_only_without_nesterov():
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        params, grads = rng.standard_normal((6, 4)), rng.standard_normal((20, 6, 4))
        grads -= params * (grads * params).sum(1, keepdims=True) / (params * params).sum(0)

        def final(nesterov, project_momentum):
            lrs = np.full(20, 0.01)
            return trajectory(params, grads, lrs, nesterov, project_momentum, momentum=0.9, delta=0.5)[0][-1]

        assert np.abs(final(False, True) - final(False, False)).max() > 1e-5
        np.testing.assert_array_equal(final(True, True), final(True, False))


def direction_loss_gradient(w, shift):
    """The gradient of -<shift, w>/|w|, which is orthogonal to w."""
    return jax.grad(lambda w: -(shift @ w)[0] / jnp.linalg.norm(w))(w)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_norm_growth_in_closed_form(beta):
    r"""Momentum: |w_t+1|^2 = |w_t|^2 + lr^2 |m_t|^2 + 2 lr^2 sum_{k<t} beta^(t-k) |m_k|^2; SGDP: only the first two."""
    lr, steps = 0.05, 12
    with jax.enable_x64():
        shift = np.random.default_rng(1).standard_normal((steps, 6))

        gradient = jax.jit(direction_loss_gradient)

        def squares(tx):
            w = jnp.ones((6, 1))
            state, weights, directions = tx.init(w), [w], []
            update = jax.jit(tx.update)
            for t in range(steps):
                d, state = update(gradient(w, shift[t]), state, w)
                w = w - lr * d
                weights.append(w)
                directions.append(d)
            return [float((x**2).sum()) for x in weights], [float((x**2).sum()) for x in directions]

        w2, d2 = squares(scale_by_sgdp(beta, delta=0.0))
        for t in range(steps):
            cross = sum(beta ** (t - k) * d2[k] for k in range(t))
            assert w2[t + 1] == pytest.approx(w2[t] + lr**2 * (d2[t] + 2 * cross), rel=1e-13)
        w2, d2 = squares(scale_by_sgdp(beta, eps=0.0))
        for t in range(steps):
            assert w2[t + 1] == pytest.approx(w2[t] + lr**2 * d2[t], rel=1e-13)


def test_slows_the_growth_of_scale_invariant_weights():
    """In 50 dimensions with gradient noise: momentum lengthens the weight most, the two forms of SGDP hardly."""

    rng = np.random.default_rng(0)
    starts = rng.standard_normal((5, 50, 1)).astype(np.float32)
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    shifts = (50**-0.5 + 0.3 * rng.standard_normal((5, 300, 50))).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="project_momentum")
    def squared_growth(delta, project_momentum):
        tx = sgdp(0.01, 0.9, delta=delta, project_momentum=project_momentum)

        def step(carry, shift):
            updates, state = tx.update(direction_loss_gradient(carry[0], shift), carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        final = jax.vmap(lambda w, shift: jax.lax.scan(step, (w, tx.init(w)), shift)[0][0])(starts, shifts)
        return jnp.sum(final**2, (1, 2)) - 1

    growth = squared_growth(0.0, False), squared_growth(0.1, False), squared_growth(0.1, True)
    print("growth of the squared norm:", *growth)
    assert growth[1].max() < 0.5 * growth[0].min()
    assert growth[2].max() < 0.5 * growth[0].min()


def test_dampening_holds_from_the_first_step():
    w = jnp.ones((3, 4))
    g = w.at[0].set(5.0)
    tx = scale_by_sgdp(0.9, dampening=0.25, delta=0.0)
    updates, _ = jax.jit(tx.update)(g, tx.init(w), w)
    np.testing.assert_allclose(updates, 0.75 * g, rtol=1e-7)


def test_decay_is_divided_by_the_missing_momentum_and_scaled_by_the_ratio():
    w = jnp.ones((3, 4))
    tx = scale_by_sgdp(0.75, weight_decay=0.1, wd_ratio=0.5)
    updates, _ = jax.jit(tx.update)(jnp.zeros((3, 4)), tx.init(w), w)
    np.testing.assert_allclose(updates, 0.1 / 0.25 * 0.5, rtol=1e-6)
    tx = scale_by_sgdp(0.75, weight_decay=lambda count: 0.1 * (count + 1.0), mask={"w": True, "b": False})
    params = {"w": w, "b": jnp.ones(2)}
    updates, _ = jax.jit(tx.update)({"w": w, "b": jnp.zeros(2)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], 1 + 0.4, rtol=1e-6)  # a radial gradient: the full decay
    assert (updates["b"] == 0).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_and_none(dtype):
    params = {"w": jnp.ones((3, 4), dtype), "b": jnp.zeros(4, dtype)}
    tx = scale_by_sgdp(0.9, weight_decay=0.1, accumulator_dtype=jnp.float32)
    state = tx.init(params)
    assert isinstance(state, ScaleBySgdpState)
    updates, after = jax.jit(tx.update)({"w": params["w"], "b": None}, state, params)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), state) == jax.tree.map(lambda x: (x.dtype, x.shape), after)
    assert updates["b"] is None
    assert updates["w"].dtype == dtype
    assert (after.momentum["b"] == 0).all()
    assert (after.momentum["w"] == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.5}, "momentum must"),
        ({"dampening": 1.5}, "dampening must"),
        ({"weight_decay": -1.0}, "weight_decay must"),
        ({"delta": -1.0}, "delta must"),
        ({"wd_ratio": -0.1}, "wd_ratio must"),
        ({"channel_axes": ChannelAxes((0, 0))}, "channel_axes must"),
    ],
)
def test_bad_input(options, message):
    for make in (scale_by_sgdp, lambda **kw: sgdp(1e-3, **kw)):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="learning_rate must"):
        sgdp(-0.1)


def test_parameters_are_needed():
    tx = scale_by_sgdp()
    state = tx.init(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="params=None"):
        tx.update(jnp.ones((2, 2)), state)
