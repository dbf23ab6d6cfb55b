import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from poise.attention import dot_product_attention, sharded_attention, softplus_attention

WEIGHTINGS = {
    "lssar": ("softplus", softplus_attention, {"power": 3}),
    "lssa": ("softplus", softplus_attention, {"reweight": False}),
    "softmax": ("softmax", dot_product_attention, {}),
}


def mesh_of(*sizes):
    names = ("sequence", "data")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("case", ["causal", "masks", "batch"])
def test_keys_on_eight_devices_give_the_same(name, case, draw, quick_jit):
    weighting, function, options = WEIGHTINGS[name]
    arrays = draw(queries=11, keys=19)  # no multiples of the devices
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, 4, 3)), jnp.float32)
    rng = np.random.default_rng(2)
    arguments = {
        "causal": {"is_causal": True},
        "masks": {
            "mask": rng.random((2, 1, 11, 19)) < 0.7,
            "segment_ids": (rng.integers(0, 2, (2, 11)), rng.integers(0, 2, (2, 19))),
            "key_value_seq_lengths": np.array([12, 19]),
            "local_window_size": (6, 9),
        },
        "batch": {"is_causal": True},
    }[case]
    spread = functools.partial(
        sharded_attention,
        mesh=mesh_of(4, 2) if case == "batch" else mesh_of(8),
        axis_name="sequence",
        batch_axis="data" if case == "batch" else None,
        weighting=weighting,
        block_size=(4, 2),
        **arguments,
        **options,
    )
    single = functools.partial(function, implementation="xla", **arguments, **options)

    def both(function):
        def total(arrays):
            out = function(*arrays)
            return jnp.vdot(out, cotangent), out

        return quick_jit(jax.grad(total, has_aux=True))(arrays)

    (gradients, out), (others, expected) = both(spread), both(single)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
    for gradient, other in zip(gradients, others, strict=True):
        np.testing.assert_allclose(gradient, other, rtol=1e-3, atol=1e-4 * np.abs(other).max())


def test_bad_input(draw):
    query, key, value = draw()
    spread = functools.partial(sharded_attention, query, key, value)
    with pytest.raises(ValueError, match="axis_name must be one of sequence, got 'rows'"):
        spread(mesh=mesh_of(8), axis_name="rows")
    with pytest.raises(ValueError, match="axis_name must be a mesh axis other than batch_axis"):
        spread(mesh=mesh_of(8), axis_name="sequence", batch_axis="sequence")
    with pytest.raises(ValueError, match="batch of query must be a multiple of the 4 devices of batch_axis, got 2"):
        spread(mesh=mesh_of(2, 4), axis_name="sequence", batch_axis="data")
    with pytest.raises(ValueError, match="weighting must be one of softplus, softmax, got 'relu'"):
        spread(mesh=mesh_of(8), axis_name="sequence", weighting="relu")


def test_a_mesh_of_explicit_axes(draw, quick_jit):
    arrays = draw(queries=8, keys=8)
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Explicit,))
    spread = functools.partial(sharded_attention, mesh=mesh, axis_name="sequence", is_causal=True)
    expected = quick_jit(functools.partial(softplus_attention, is_causal=True))(*arrays)
    np.testing.assert_allclose(quick_jit(spread)(*arrays), expected, rtol=1e-4, atol=1e-5)
    placed = [jax.device_put(x, NamedSharding(mesh, P(None, "sequence"))) for x in arrays]
    with jax.set_mesh(mesh):
        out = quick_jit(jax.sharding.auto_axes(spread, out_sharding=P()))(*placed)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
