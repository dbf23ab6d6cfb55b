"""Which devices a run uses and how its arrays lie on them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from poise.launch.errors import LaunchError

PARALLEL = ("jit",)
AXIS = "data"


class DeviceError(LaunchError, ValueError):
    """A batch that the devices can't share."""


class Placement:
    """One mesh axis ``data``: batches are split over it, states lie whole on every device.

    Args:
      devices: the devices, all of one kind; None for all there are.
      parallel: ``"jit"``: one program over all devices, in which a mean over the batch is one over the global batch.

    Raises:
      ValueError: for another ``parallel`` or no devices.

    Example:
      >>> import jax
      >>> from poise.launch.devices import Placement
      >>> Placement(jax.devices()[:1]).num_devices
      1
    """

    def __init__(self, devices: Sequence[jax.Device] | None = None, parallel: str = "jit"):
        if parallel not in PARALLEL:
            raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
        chosen = jax.devices() if devices is None else list(devices)
        if not chosen:
            raise ValueError("devices must name at least one device, got none")
        # Auto: the compiler decides how values between are laid out; algorithms say nothing about devices.
        self.mesh = Mesh(np.array(chosen), (AXIS,), axis_types=(AxisType.Auto,))
        self.num_devices = len(chosen)
        self.platform = chosen[0].platform
        self.replicated = NamedSharding(self.mesh, PartitionSpec())

    def batch_sharding(self, batch_axis: int) -> NamedSharding:
        """How the leaves of a batch lie: split along one axis."""
        return NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis, AXIS))

    def check_batch(self, batch: PyTree, batch_axis: int, name: str) -> None:
        """Makes sure that every leaf of a batch can be split.

        Raises:
          DeviceError: naming the phase, the leaf, the size and the number of devices.
        """
        for path, leaf in jax.tree.leaves_with_path(batch):
            where = f"phase {name!r}: the batch's leaf {jax.tree_util.keystr(path) or '()'}"
            if leaf.ndim <= batch_axis:
                raise DeviceError(
                    f"{where} has shape {leaf.shape}, which has no axis {batch_axis} that counts examples"
                )
            if leaf.shape[batch_axis] % self.num_devices:
                raise DeviceError(
                    f"{where} has {leaf.shape[batch_axis]} examples, which {self.num_devices} devices can't share"
                )

    def place_batch(self, batch: Any, batch_axis: int) -> PyTree:
        """A batch on the devices; returns before the copies are done."""
        return jax.device_put(batch, self.batch_sharding(batch_axis))
