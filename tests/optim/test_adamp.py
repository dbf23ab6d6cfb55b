"""AdamP: the official trajectories, AdamW as a special case, dtypes, masks, bad input, norm growth."""

import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.optim import ChannelAxes, ScaleByAdamPState, adamp, flax_channel_axes, scale_by_adamp

quick = settings(max_examples=10, deadline=None)


@functools.partial(jax.jit, static_argnames="nesterov")
def trajectory(params, grads, lrs, nesterov, **options):
    """The weights after each of a row of given gradients, and the final state."""
    tx = adamp(lambda count: lrs[count], nesterov=nesterov, channel_axes=flax_channel_axes, **options)

    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), weights = jax.lax.scan(step, (params, tx.init(params)), grads)
    return weights, state


@pytest.mark.golden
@pytest.mark.golden_pattern("optim", "adamp_*.npz")
def test_official_trajectory(golden_file, both_layouts):
    """All parameters, some in each layout: weights after every step and moments at the end."""
    data = np.load(golden_file)
    hparams = json.loads(str(data["hparams"]))
    count, steps = hparams["num_params"], len(data["p0_grads"])
    lrs = data["lr_per_step"] if "lr_per_step" in data else np.full(steps, hparams["lr"])
    b1, b2 = hparams.get("betas", (0.9, 0.999))
    defaults = {"eps": 1e-8, "weight_decay": 0.0, "delta": 0.1, "wd_ratio": 0.1}
    options = {name: hparams.get(name, value) for name, value in defaults.items()}
    tolerance = 3e-6 if data["p0_init"].dtype == np.float32 else 1e-12
    with jax.enable_x64():
        params, grads = both_layouts(data, "init", count, 0), both_layouts(data, "grads", count, 1)
        weights, state = trajectory(params, grads, lrs, hparams.get("nesterov", False), b1=b1, b2=b2, **options)
    results = (weights, optax.tree.get(state, "mu"), optax.tree.get(state, "nu"))
    for ours, key, lead in zip(results, ("params", "exp_avg", "exp_avg_sq"), (1, 0, 0), strict=True):
        expected = both_layouts(data, key, count, lead)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@jax.jit
def adamw(params, grads, lrs, **options):
    tx = optax.adamw(lambda count: lrs[count], **options)

    def step(carry, g):
        updates, state = tx.update(g, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    return jax.lax.scan(step, (params, tx.init(params)), grads)[1]


@quick
@given(st.integers(0, 10**6))
def test_without_threshold_is_adamw(seed):
    with jax.enable_x64():
        rng = np.random.default_rng(seed)
        params, grads = rng.standard_normal((3, 4)), rng.standard_normal((6, 3, 4))
        lrs = rng.uniform(0, 0.05, 6)
        options = dict(zip(("b1", "b2", "weight_decay"), rng.uniform(0, 0.99, 3), strict=True))
        ours, _ = trajectory(params, grads, lrs, False, delta=0.0, **options)
        np.testing.assert_allclose(ours, adamw(params, grads, lrs, **options), rtol=0, atol=1e-13)


def test_radial_gradients_are_adamw_and_vectors_always():
    """Gradients along the weight are far above the threshold; vectors are never projected, even by zero gradients."""
    with jax.enable_x64():
        params = {"w": np.ones((3, 4)), "b": np.arange(4.0)}
        grads = {"w": np.ones((3, 3, 4)) * np.array([1.0, -2.0, 0.5])[:, None, None], "b": np.zeros((3, 4))}
        ours, _ = trajectory(params, grads, np.full(3, 1e-3), False, weight_decay=0.1)
        theirs = adamw(params, grads, np.full(3, 1e-3), weight_decay=0.1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-14), ours, theirs)


def test_zero_gradient_decays_by_the_ratio():
    """A zero gradient counts as orthogonal, so only a tenth of the decay is left."""
    params = jnp.ones((3, 4))
    state = scale_by_adamp().init(params)
    updates, _ = jax.jit(scale_by_adamp(weight_decay=0.5).update)(jnp.zeros((3, 4)), state, params)
    np.testing.assert_allclose(updates, 0.05, rtol=1e-6)
    updates, _ = jax.jit(scale_by_adamp(eps=0.0).update)(jnp.zeros((3, 4)), state, params)
    assert not np.any(updates)


def test_decay_mask_exempts_from_decay_but_not_from_projection():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((3, 4))}
    grads = jax.tree.map(lambda x: x.at[0].set(-2.0), params)  # orthogonal to every column
    for mask in ({"a": False, "b": True}, lambda p: {"a": False, "b": True}):
        tx = scale_by_adamp(weight_decay=0.5, mask=mask)
        updates, _ = jax.tree.map(np.asarray, jax.jit(tx.update)(grads, tx.init(params), params))
        np.testing.assert_allclose(updates["b"] - updates["a"], 0.05, atol=1e-6)
        np.testing.assert_allclose(updates["a"].sum(0), 0.0, atol=1e-6)


def test_weight_decay_takes_a_schedule():
    params = jnp.ones((3, 4))
    tx = scale_by_adamp(weight_decay=lambda count: 0.1 * (count + 1.0), wd_ratio=1.0)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(jnp.zeros((3, 4)), state, params)
        np.testing.assert_allclose(updates, 0.1 * (step + 1), rtol=1e-6)


def test_none_gradients_leave_the_state_alone():
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(2)}
    tx = scale_by_adamp()
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    updates, after = jax.jit(tx.update)({"a": None, "b": jnp.ones(2)}, state, params)
    assert updates["a"] is None
    assert (after.mu["a"] == state.mu["a"]).all()
    assert (after.nu["a"] == state.nu["a"]).all()
    assert (after.mu["b"] != state.mu["b"]).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("mu_dtype", [None, jnp.float32])
def test_dtypes_are_kept(dtype, mu_dtype):
    params = {"w": jnp.ones((3, 4), dtype), "b": jnp.zeros(4, dtype)}
    tx = adamp(1e-2, weight_decay=0.1, mu_dtype=mu_dtype)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.map(lambda x: (x.dtype, x.shape), state) == jax.tree.map(lambda x: (x.dtype, x.shape), after)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert after[0].mu["w"].dtype == (mu_dtype or dtype)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(updates))


def test_init_takes_shapes_only():
    shapes = {"w": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}
    state = scale_by_adamp(mu_dtype=jnp.float32).init(shapes)
    assert isinstance(state, ScaleByAdamPState)
    assert (state.mu["w"].dtype, state.nu["w"].dtype, state.mu["w"].shape) == (jnp.float32, jnp.bfloat16, (3, 4))


def test_unrolled_optimizer_has_finite_gradients():
    """Zero weights, zero gradients, zero second moments: every root is differentiated at zero."""

    def loss(start):
        params, tx = {"w": start, "v": jnp.zeros((2, 2))}, adamp(1e-2, weight_decay=0.1)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update({"w": params["w"] * 2, "v": jnp.zeros((2, 2))}, state, params)
            params = optax.apply_updates(params, updates)
        return sum(x.sum() for x in jax.tree.leaves(params))

    assert bool(jnp.isfinite(jax.jit(jax.grad(loss))(jnp.zeros((3, 2)))).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"b1": 1.0}, ValueError, r"b1 must lie in \[0, 1\), got 1.0"),
        ({"b1": -0.1}, ValueError, "b1 must"),
        ({"b2": 1.5}, ValueError, "b2 must"),
        ({"eps": -1.0}, ValueError, "eps must"),
        ({"weight_decay": -1e-3}, ValueError, "weight_decay must"),
        ({"delta": -1.0}, ValueError, "delta must"),
        ({"wd_ratio": 2.0}, ValueError, r"wd_ratio must lie in \[0, 1\], got 2.0"),
        ({"channel_axes": ChannelAxes(())}, ValueError, "channel_axes must"),
    ],
)
def test_bad_input(options, error, message):
    for make in (scale_by_adamp, lambda **kw: adamp(1e-3, **kw)):
        with pytest.raises(error, match=message):
            make(**options)
    with pytest.raises(ValueError, match="learning_rate must"):
        adamp(-1e-3)


def test_parameters_are_needed():
    tx = scale_by_adamp()
    state = tx.init(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match="params=None"):
        tx.update(jnp.ones((2, 2)), state)


def test_slows_the_growth_of_scale_invariant_weights():
    """On a loss of the weight's direction alone, with gradient noise, Adam lengthens the weight, AdamP hardly does."""
    rng = np.random.default_rng(0)
    starts = rng.standard_normal((5, 50, 1)).astype(np.float32)
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    shifts = (50**-0.5 * (1 + rng.standard_normal((5, 200, 50)))).astype(np.float32)

    @jax.jit
    def final_norms(delta):
        tx = adamp(0.01, delta=delta)

        def step(carry, shift):
            w, state = carry
            g = jax.grad(lambda w: -(shift @ w)[0] / jnp.linalg.norm(w))(w)
            updates, state = tx.update(g, state, w)
            return (optax.apply_updates(w, updates), state), None

        final = jax.vmap(lambda w, shift: jax.lax.scan(step, (w, tx.init(w)), shift)[0][0])(starts, shifts)
        return jnp.linalg.norm(final, axis=(1, 2))

    plain, projected = final_norms(0.0), final_norms(0.1)
    print("norms from 1:", plain, projected)
    assert projected.max() < plain.min()
    assert (projected.mean() - 1) < 0.5 * (plain.mean() - 1)


@pytest.mark.effects
def test_effect_on_normalized_kernels_of_the_digits():
    """Five seeds: momentum and Adam lengthen kernels before batch normalization, their projected forms hardly do."""
    script = pathlib.Path(__file__).parents[2] / "docs" / "effects" / "adamp_norms.py"
    spec = importlib.util.spec_from_file_location("adamp_norms", script)
    norms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(norms)
    runs = norms.experiment()
    growth = {name: run["norms"][:, -1] / run["norms"][:, 0] for name, run in runs.items()}  # [seed, kernel]
    for name in ("SGDP", "SGDP, momentum projected", "SGDP, Nesterov"):
        assert growth[name].max() < 1.04
        assert (growth[name] - 1).mean() < 0.15 * (growth["SGD"] - 1).mean()
    assert growth["SGD"].min() > 1.15
    assert growth["Adam"].min() > 1.4
    assert growth["AdamP"].max() < 1.1
    assert (growth["AdamP"] - 1).mean() < 0.15 * (growth["Adam"] - 1).mean()
    for run in runs.values():
        assert (run["by_channel"][:, :2] == 1).all()  # both kernels are seen to be invariant, channel by channel,
        assert (run["by_channel"][:, 2] < 0.01).all()  # and the last one, which is not normalized, hardly ever
        assert run["test_accuracy"].min() > 0.9
