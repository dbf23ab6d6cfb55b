"""Which devices a run uses and how its arrays lie on them."""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from poise.launch.config import ConfigError
from poise.launch.errors import LaunchError
from poise.launch.leaves import Layout, is_key
from poise.launch.sharding import DATA, FSDP, LeafSpecs, Rules, parse_mesh, parse_rules

PARALLEL = ("jit", "pmap")
_OPTIMIZER = re.compile(r"^([a-z]+_)?opt(imizer)?(_state)?(/|$)")  # a field of the state


class DeviceError(LaunchError, ValueError):
    """A batch that the devices can't share."""


class Placement:
    """A mesh of devices: batches are split over its axes ``data`` and ``fsdp``, parameters over ``fsdp`` and ``model``.

    Args:
      devices: the devices, all of one kind; None for all there are.
      parallel: ``"jit"``: one program over all devices, in which a mean over the batch is one over the global batch;
        ``"pmap"``: the same program on every device, whose means are taken by the algorithm, over the axis ``data``.
      mesh: sizes of the axes, see :func:`poise.launch.sharding.parse_mesh`; empty for all devices on ``data``.
      sharding: rules for the leaves of the state, as text or as pairs, see
        :class:`poise.launch.sharding.LeafSpecs`; without, only ``fsdp`` splits leaves, by their size.

    Raises:
      ValueError: for another ``parallel`` or no devices.
      ConfigError: if the mesh doesn't take all devices, or doesn't fit the rules or ``parallel``.

    Example:
      >>> import jax
      >>> from poise.launch.devices import Placement
      >>> Placement(jax.devices()[:1]).num_devices
      1
    """

    def __init__(
        self,
        devices: Sequence[jax.Device] | None = None,
        parallel: str = "jit",
        mesh: str = "",
        sharding: str | Rules = "",
    ):
        if parallel not in PARALLEL:
            raise ValueError(f"parallel must be one of {', '.join(PARALLEL)}, got {parallel!r}")
        chosen = jax.devices() if devices is None else list(devices)
        if not chosen:
            raise ValueError("devices must name at least one device, got none")
        sizes = parse_mesh(mesh, len(chosen))
        rules = parse_rules(sharding) if isinstance(sharding, str) else sharding
        if parallel == "pmap" and (rules or sizes[DATA] < len(chosen)):
            raise ConfigError(f"parallel=pmap splits nothing but batches, got mesh {mesh!r} and sharding {sharding!r}")
        # Auto: the compiler decides how values between are laid out; algorithms say nothing about devices.
        types = (AxisType.Auto,) * len(sizes)
        self.mesh = Mesh(np.array(chosen).reshape(tuple(sizes.values())), tuple(sizes), axis_types=types)
        self.devices, self.num_devices, self.parallel = chosen, len(chosen), parallel
        self.platform = chosen[0].platform
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.specs = LeafSpecs(sizes, rules)
        self._batch_axes = [axis for axis in (DATA, FSDP) if axis in sizes]
        self.batch_shards = math.prod(sizes[axis] for axis in self._batch_axes)

    def batch_sharding(self, batch_axis: int) -> NamedSharding:
        """How the leaves of a batch lie: split along one axis."""
        axes = tuple(self._batch_axes) if len(self._batch_axes) > 1 else self._batch_axes[0]
        return NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis, axes))

    def leaf_shardings(self, layout: Layout) -> tuple[tuple[NamedSharding, ...], tuple[NamedSharding, ...]]:
        """How the live and the frozen leaves of a state lie.

        Raises:
          ConfigError: if the rules don't fit a leaf.
        """

        def of(names: Sequence[str], leaves: Sequence[Any]) -> tuple[NamedSharding, ...]:
            specs = (self.specs.spec(name, leaf, is_key(leaf)) for name, leaf in zip(names, leaves, strict=True))
            return tuple(NamedSharding(self.mesh, spec) for spec in specs)

        return of(layout.live_names, layout.abstract_live), of(layout.frozen_names, layout.abstract_frozen)

    def together(self, names: Sequence[str], shardings: Sequence[NamedSharding]) -> tuple[NamedSharding, ...]:
        """How leaves lie while they are used: what is split over ``fsdp`` is put together again.

        An optimizer's leaves (under a name such as ``optimizer``, ``opt_state`` or ``student_opt``) stay split, since
        they are only met by their like. Weights must not: XLA's partitioner gives wrong gradients, without a word, for
        some programs in which a product's inner dimension is split over an axis of the batch (jax 0.10).
        """

        def of(name: str, sharding: NamedSharding) -> NamedSharding:
            if FSDP not in sharding.spec or _OPTIMIZER.search(name):
                return sharding
            return NamedSharding(self.mesh, PartitionSpec(*(None if axis == FSDP else axis for axis in sharding.spec)))

        return tuple(of(name, sharding) for name, sharding in zip(names, shardings, strict=True))

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
            if leaf.shape[batch_axis] % self.batch_shards:
                raise DeviceError(
                    f"{where} has {leaf.shape[batch_axis]} examples, which {self.batch_shards} devices can't share"
                )

    def place_batch(self, batch: Any, batch_axis: int) -> PyTree:
        """A batch on the devices; returns before the copies are done."""
        return jax.device_put(batch, self.batch_sharding(batch_axis))


def check_devices(config: Any, *batch_sizes: str) -> None:
    """Makes sure, before a run begins, that the devices fit a launcher's flags and can share its batches.

    Args:
      config: a launcher's configuration, with fields ``parallel``, ``mesh`` and ``sharding`` or without.
      *batch_sizes: names of its fields that count the examples of a batch.

    Raises:
      ConfigError: naming the flag.
    """
    flags = {name: getattr(config, name) for name in ("parallel", "mesh", "sharding") if hasattr(config, name)}
    shards = Placement(**flags).batch_shards
    for name in batch_sizes:
        size = getattr(config, name)
        if size % shards:
            raise ConfigError(f"{name} must be a multiple of {shards}, the devices that share a batch, got {size}")
