"""A whole cycle of f-distill whose weights are split over an axis of the batch gives what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from poise.fdistill import FDistillConfig, Optimizers, f_distill
from poise.launch.devices import Placement
from poise.launch.phase import Phase, Program
from poise.nets import RatioHead, edm_network

ARCHITECTURE = {
    "model_type": "SongUNet", "img_resolution": 8, "img_channels": 1, "label_dim": 10, "model_channels": 8,
    "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "dropout": 0.0,
}  # fmt: skip


class OneBatch:
    batch_axis, batch_size = 1, 8

    def batch(self, step):
        rng = np.random.default_rng(step)
        return {"image": rng.normal(size=(1, 8, 8, 8, 1)).astype(np.float32), "label": np.arange(8)[None]}


def gradients_kept():
    """An optimizer that moves nothing and keeps the gradient in its state."""
    zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
    return optax.GradientTransformation(zeros, lambda updates, state, params=None: (zeros(updates), updates))


@pytest.mark.slow
def test_a_cycle_on_a_mesh_with_fsdp():
    net = edm_network(ARCHITECTURE, None)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.ones(1), jnp.zeros(1, jnp.int32))
    rng = np.random.default_rng(0)
    teacher = jax.tree.map(lambda leaf: jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype), shapes)
    config = FDistillConfig(
        sigma_min=0.02, sigma_max=5.0, gan_weight=1.0, ratio_range=None, ema_decays=(0.98,), fake_updates=1
    )
    optimizers = Optimizers(student=gradients_kept(), fake=gradients_kept(), head=gradients_kept())
    algorithm = f_distill(net, RatioHead(label_dim=10), config, optimizers, teacher=teacher)
    state = jax.device_get(jax.jit(algorithm.init)(jax.random.key(2), OneBatch().batch(0)))

    def cycle(placement):
        program = Program(Phase("distill", lambda _: algorithm, OneBatch(), 1), None, placement)
        program.compile()
        live, frozen = (
            jax.device_put(leaves, shardings)
            for leaves, shardings in zip(program.layout.split(state), program.shardings, strict=True)
        )
        split = sum("fsdp" in leaf.sharding.spec for leaf in (*live, *frozen))
        live, metrics = program.step(live, frozen, program.place(0), jax.random.key(3), 0)
        assert program.look(live).all()
        return jax.device_get((program.layout.merge(live, frozen), metrics)), split

    (alone, metrics), _ = cycle(Placement(jax.devices()[:1]))
    (shared, shared_metrics), split = cycle(Placement(jax.devices()[:4], mesh="data:2,fsdp:2"))
    assert split > 4
    for name in ("student_opt", "fake_opt", "head_opt"):
        gradients = jax.tree.leaves_with_path(getattr(alone, name))
        for (path, one), many in zip(gradients, jax.tree.leaves(getattr(shared, name)), strict=True):
            scale = np.abs(one).max() + 1e-12
            np.testing.assert_allclose(many, one, atol=1e-3 * scale, err_msg=f"{name}{jax.tree_util.keystr(path)}")
    for name, value in metrics.items():
        np.testing.assert_allclose(shared_metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
