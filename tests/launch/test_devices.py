"""Batches split over devices, and the messages where they can't be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.launch.devices import DeviceError, Placement


@pytest.mark.parametrize(("axis", "shape"), [(0, (2, 3)), (1, (5, 2))])
def test_batches_are_split_along_their_axis(axis, shape):
    placement = Placement(jax.devices()[:8])
    full = (16, 3) if axis == 0 else (5, 16)
    array = np.arange(np.prod(full), dtype=np.float32).reshape(full)
    placed = placement.place_batch({"x": array}, axis)["x"]
    assert len(placed.addressable_shards) == 8
    assert {shard.data.shape for shard in placed.addressable_shards} == {shape}
    np.testing.assert_array_equal(placed, array)


def test_a_batch_that_does_not_fit_is_named_with_both_numbers():
    placement = Placement(jax.devices()[:8])
    with pytest.raises(DeviceError, match=r"'teacher'.*\['x'\] has 12 examples, which 8 devices can't share"):
        placement.check_batch({"x": jnp.zeros((12, 3))}, 0, "teacher")
    with pytest.raises(DeviceError, match=r"\['x'\] has shape \(16,\), which has no axis 1"):
        placement.check_batch({"x": jnp.zeros(16)}, 1, "teacher")
    placement.check_batch({"x": jnp.zeros((3, 16))}, 1, "teacher")
    placement.check_batch((), 0, "teacher")


def test_bad_arguments():
    with pytest.raises(ValueError, match="parallel must be one of jit, pmap, got 'xmap'"):
        Placement(parallel="xmap")
    with pytest.raises(ValueError, match="at least one device"):
        Placement([])
    assert Placement().num_devices == len(jax.devices())
