"""Small networks with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.nets import DhariwalUNet, EDMPrecond, SongUNet


@pytest.fixture(scope="session")
def random_variables():
    """Variables of a module with every leaf drawn at random, those that start at zero included."""

    def draw(module, *args, seed=0, scale=0.2, **kwargs):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(functools.partial(module.init, **kwargs), jax.random.key(0), *args)

        def leaf(path, struct):
            noise = scale * rng.standard_normal(struct.shape)
            return jnp.asarray(noise + (path[-1].key == "scale"), struct.dtype)

        return jax.tree_util.tree_map_with_path(leaf, shapes)

    return draw


@pytest.fixture(scope="session")
def batch():
    """Images, noise levels, labels and augmentation labels for the small networks."""
    rng = np.random.default_rng(1)
    return (
        jnp.asarray(rng.standard_normal((3, 8, 8, 2)), jnp.float32),
        jnp.array([0.05, 0.7, 20.0]),
        jnp.array([2, 0, 1]),
        jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
    )


SMALL = {
    "label_dim": 3,
    "augment_dim": 4,
    "model_channels": 8,
    "channel_mult": (1, 2),
    "channel_mult_emb": 2,
    "num_blocks": 1,
    "attn_resolutions": (4,),
}


@pytest.fixture(scope="session", params=["song", "adm"])
def small(request, random_variables, batch):
    """A small denoiser of each kind and its variables."""
    if request.param == "song":
        model = SongUNet(8, 2, **SMALL)
    else:
        model = DhariwalUNet(8, 2, **SMALL, channels_per_head=8)
    module = EDMPrecond(model)
    return module, random_variables(module, *batch)


@pytest.fixture(scope="session")
def small_apply(small, quick_jit):
    """The small denoiser, compiled for all of its arguments."""
    module, _ = small
    return quick_jit(lambda *args: module.apply(*args, feature_levels=(0, 1)))
