"""Both ways of finding an update's radial part: all sums at once, and in stages that end when the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.optim import ChannelAxes, scale_by_adamp
from poise.optim import radial as module
from poise.optim.channel_axes import row_geometry
from poise.optim.radial import CHANNEL_VIEW, LAYER_VIEW, NOT_PROJECTED, radial_at_once, radial_in_stages

SHAPES = [
    ((40, 24), ChannelAxes()),
    ((24, 40), ChannelAxes((0,))),
    ((6, 8, 5, 16), ChannelAxes((-2, -1))),
    ((9, 3), ChannelAxes()),
]


def drawn(shape, spec, view, seed=0):
    """A weight, an update, and a gradient for which the given view holds."""
    weight, grad, update = np.random.default_rng(seed).standard_normal((3, *shape))
    geometry = row_geometry(shape, spec)
    slices = (*geometry.within, *geometry.channel)
    if view == NOT_PROJECTED:
        grad = grad + weight
    axes = {NOT_PROJECTED: None, CHANNEL_VIEW: geometry.within, LAYER_VIEW: slices}[view]
    if axes is not None:
        share = np.sum(weight * grad, axes, keepdims=True) / np.sum(weight * weight, axes, keepdims=True)
        grad = grad - share * weight
    return geometry, jnp.asarray(weight), jnp.asarray(grad), jnp.asarray(update)


def both(geometry, weight, grad, update):
    delta, eps = jnp.asarray(0.1), jnp.asarray(1e-8)
    return [
        jax.jit(way, static_argnums=(2, 3))(weight, grad, lambda: update, geometry, delta, eps)
        for way in (radial_at_once, radial_in_stages)
    ]


@pytest.mark.parametrize("view", [NOT_PROJECTED, CHANNEL_VIEW, LAYER_VIEW])
@pytest.mark.parametrize(("shape", "spec"), SHAPES)
def test_stages_find_the_same(shape, spec, view):
    at_once, in_stages = both(*drawn(shape, spec, view))
    assert np.all(at_once.view == view)
    np.testing.assert_array_equal(in_stages.view, at_once.view)
    np.testing.assert_allclose(in_stages.coefficient, at_once.coefficient, rtol=1e-5, atol=1e-7)
    assert np.any(at_once.coefficient != 0) == (view != NOT_PROJECTED)


def test_every_slice_of_a_stack_has_a_view_of_its_own():
    views = (NOT_PROJECTED, CHANNEL_VIEW, LAYER_VIEW, CHANNEL_VIEW)
    spec = ChannelAxes((-1,), (0,))
    slices = [drawn((30, 12), ChannelAxes(), view, seed)[1:] for seed, view in enumerate(views)]
    stack = [jnp.stack(parts) for parts in zip(*slices, strict=True)]
    at_once, in_stages = both(row_geometry(stack[0].shape, spec), *stack)
    for found in (at_once, in_stages):
        assert tuple(found.view.ravel().tolist()) == views
    np.testing.assert_allclose(in_stages.coefficient, at_once.coefficient, rtol=1e-5, atol=1e-7)


def test_one_late_channel_rules_out_the_channel_view():
    geometry, weight, grad, update = drawn((50, 40), ChannelAxes(), CHANNEL_VIEW)
    grad = grad.at[:, -1].add(weight[:, -1])
    for found in both(geometry, weight, grad, update):
        assert found.view.item() != CHANNEL_VIEW


@pytest.mark.parametrize("view", [NOT_PROJECTED, CHANNEL_VIEW, LAYER_VIEW])
def test_large_leaves_take_the_stages_and_their_steps_are_the_same(monkeypatch, view):
    _, weight, grad, _ = drawn((64, 48), ChannelAxes(), view)
    tx = scale_by_adamp(weight_decay=0.1)

    def step():
        return jax.jit(tx.update)(grad, tx.init(weight), weight)

    def stages():
        jax.clear_caches()
        return str(jax.make_jaxpr(tx.update)(grad, tx.init(weight), weight)).count("cond[")

    small, without = step(), stages()
    monkeypatch.setattr(module, "STAGED_SIZE", 1)
    assert stages() > without == 0
    for one, other in zip(jax.tree.leaves(step()), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_stages_under_vmap_and_grad_are_those_of_the_sums():
    geometry, weight, grad, update = drawn((30, 12), ChannelAxes(), CHANNEL_VIEW)
    delta, eps = jnp.asarray(0.1), jnp.asarray(1e-8)

    def length(way, update):
        return jnp.sum(way(weight, grad, lambda: update, geometry, delta, eps).coefficient ** 2)

    updates = jnp.stack([update, 2 * update])
    for transform in (jax.grad, lambda f: f):
        one, other = (
            jax.vmap(transform(lambda u, way=way: length(way, u)))(updates)
            for way in (radial_at_once, radial_in_stages)
        )
        np.testing.assert_allclose(other, one, rtol=1e-5)


@pytest.mark.parametrize("split", [(True, True, True), (True, False, False), (False, False, True)])
def test_leaves_that_vary_under_shard_map_are_looked_at_at_once(monkeypatch, split):
    monkeypatch.setattr(module, "STAGED_SIZE", 1)
    jax.clear_caches()
    tx = scale_by_adamp()
    _, weight, grad, momentum = drawn((64, 48), ChannelAxes(), CHANNEL_VIEW)
    devices = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    over, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def update(grad, weight, momentum):
        return tx.update(grad, tx.init(weight)._replace(mu=momentum), weight)[0]

    inputs = [jnp.tile(x, (4, 1)) if apart else x for x, apart in zip((grad, weight, momentum), split, strict=True)]
    specs = tuple(over if apart else whole for apart in split)
    found = jax.jit(jax.shard_map(update, mesh=devices, in_specs=specs, out_specs=over))(*inputs)
    np.testing.assert_allclose(found, jnp.tile(update(grad, weight, momentum), (4, 1)), rtol=1e-4, atol=1e-4)
