"""Which devices a run uses and how its arrays lie on them."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from poise.launch.config import ConfigError
from poise.launch.errors import LaunchError
from poise.launch.leaves import Layout, from_data, is_key, to_data
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
        hosts = {device.process_index for device in chosen}
        if len(hosts) < jax.process_count():
            raise ValueError(f"devices must be of all {jax.process_count()} processes, got those of {sorted(hosts)}")
        if len(hosts) > 1:  # each process's devices follow one another, as its block of a batch does
            chosen = sorted(chosen, key=lambda device: (device.process_index, device.id))
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
        self.several = len(hosts) > 1
        self.block = self._own_block() if self.several else (0, 1)

    def _own_block(self) -> tuple[int, int]:
        parts: dict[int, set[int]] = {}
        for device, (index,) in self.batch_sharding(0).devices_indices_map((self.batch_shards,)).items():
            parts.setdefault(device.process_index, set()).add(index.start or 0)
        return block_of(parts, jax.process_index())

    def batch_sharding(self, batch_axis: int) -> NamedSharding:
        """How the leaves of a batch lie: split along one axis."""
        axes = tuple(self._batch_axes) if len(self._batch_axes) > 1 else self._batch_axes[0]
        return NamedSharding(self.mesh, PartitionSpec(*[None] * batch_axis, axes))

    def splits_seeds(self, num_seeds: int) -> bool:
        """Whether the devices that share a batch can share so many seeds; rules for leaves come first."""
        return num_seeds > 0 and num_seeds % self.batch_shards == 0 and not self.specs.has_rules

    def notice_of_seeds(self, num_seeds: int) -> str:
        """What is said of seeds that the devices can't share; nothing where they can, or rules say how leaves lie."""
        if num_seeds % self.batch_shards == 0 or self.specs.has_rules:
            return ""
        return (
            f"{num_seeds} seeds can't be shared evenly by {self.batch_shards} devices: each trains all of them; "
            f"a multiple of {self.batch_shards} would be split"
        )

    def leaf_shardings(
        self, layout: Layout, num_seeds: int = 0
    ) -> tuple[tuple[NamedSharding, ...], tuple[NamedSharding, ...]]:
        """How the live and the frozen leaves of a state lie.

        Args:
          layout: of the state.
          num_seeds: the size of every leaf's first axis, if that counts seeds: these are split as a batch is, where the
            devices can share them.

        Raises:
          ConfigError: if the rules don't fit a leaf.
        """
        if self.splits_seeds(num_seeds):
            seeds = self.batch_sharding(0)
            return (seeds,) * len(layout.live_names), (seeds,) * len(layout.frozen_names)

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

    def own_copy(self, tree: PyTree) -> PyTree:
        """A state on this process's devices alone, for those who use it without the other processes.

        What is split over processes is put together, which takes all of them. With one process it is the state itself.
        """
        if not self.several:
            return tree
        try:
            local = self.mesh.local_mesh
        except ValueError:  # this process's devices are no box of the mesh
            own_devices = [device for device in self.devices if device.process_index == jax.process_index()]
            local = Mesh(np.array(own_devices), (DATA,))

        leaves, treedef = jax.tree.flatten(tree)
        data = [to_data(leaf) for leaf in leaves]
        specs = [leaf.sharding.spec for leaf in data]
        inside = [all(local.shape.get(axis) == self.mesh.shape[axis] for axis in _axes(spec)) for spec in specs]
        specs = [spec if fits else PartitionSpec() for spec, fits in zip(specs, inside, strict=True)]
        data = self.laid(data, [NamedSharding(self.mesh, spec) for spec in specs])
        own = [
            jax.make_array_from_single_device_arrays(
                part.shape, NamedSharding(local, spec), [shard.data for shard in part.addressable_shards]
            )
            for part, spec in zip(data, specs, strict=True)
        ]
        return treedef.unflatten([from_data(part, leaf.dtype) for part, leaf in zip(own, leaves, strict=True)])

    def laid(self, leaves: Sequence[jax.Array], shardings: Sequence[NamedSharding]) -> tuple[jax.Array, ...]:
        """Leaves in these shardings. Those of several processes are moved by one program, not by one each."""
        if not self.several:
            return tuple(jax.device_put(tuple(leaves), tuple(shardings)))
        pairs = list(zip(leaves, shardings, strict=True))
        apart = [not leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf, sharding in pairs]
        moving = tuple(pair for pair, move in zip(pairs, apart, strict=True) if move)
        moved = iter(())
        if moving:  # waited for, since what a process does by itself afterwards may take all threads of its CPU client
            mover = _mover(tuple(sharding for _, sharding in moving))
            moved = iter(jax.block_until_ready(mover(tuple(leaf for leaf, _ in moving))))
        return tuple(next(moved) if move else leaf for leaf, move in zip(leaves, apart, strict=True))

    def everywhere(self, tree: PyTree) -> PyTree:
        """Arrays that every process holds, whole on every device."""
        if not self.several:
            return jax.device_put(tree, self.replicated)

        def spread(leaf: Any) -> jax.Array:
            leaf = jax.numpy.asarray(leaf)
            data = np.asarray(to_data(leaf))
            placed = jax.make_array_from_callback(data.shape, self.replicated, lambda index: data[index])
            return from_data(placed, leaf.dtype)

        return jax.tree.map(spread, tree)

    def check_batch(self, batch: PyTree, batch_axis: int, name: str, batch_size: int = 0) -> None:
        """Makes sure that every leaf of a batch can be split.

        Args:
          batch: the whole batch.
          batch_axis: the axis that counts examples.
          name: the phase's.
          batch_size: what its source says of it, which several processes rely on; 0: nothing.

        Raises:
          DeviceError: naming the phase, the leaf, the size and the number of devices.
        """
        for path, leaf in jax.tree.leaves_with_path(batch):
            where = f"phase {name!r}: the batch's leaf {jax.tree_util.keystr(path) or '()'}"
            if leaf.ndim <= batch_axis:
                raise DeviceError(
                    f"{where} has shape {leaf.shape}, which has no axis {batch_axis} that counts examples"
                )
            if self.several and batch_size and leaf.shape[batch_axis] != batch_size:
                raise DeviceError(
                    f"{where} has {leaf.shape[batch_axis]} examples, but its source speaks of {batch_size}; a source "
                    "without for_host gives the whole batch in every process"
                )
            if leaf.shape[batch_axis] % self.batch_shards:
                raise DeviceError(
                    f"{where} has {leaf.shape[batch_axis]} examples, which {self.batch_shards} devices can't share"
                )

    def place_batch(self, batch: Any, batch_axis: int) -> PyTree:
        """A batch, or this process's block of one, on the devices; returns before the copies are done."""
        sharding = self.batch_sharding(batch_axis)
        if not self.several:
            return jax.device_put(batch, sharding)

        def spread(leaf: Any) -> jax.Array:
            data = np.asarray(jax.numpy.asarray(leaf))  # with jax's types
            shape = list(data.shape)
            shape[batch_axis] *= self.block[1]
            return jax.make_array_from_process_local_data(sharding, data, tuple(shape))

        return jax.tree.map(spread, batch)


@functools.lru_cache(maxsize=16)
def _mover(shardings: tuple[NamedSharding, ...]) -> Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]]:
    return jax.jit(lambda leaves: leaves, out_shardings=shardings)


def block_of(parts: Mapping[int, set[int]], process: int) -> tuple[int, int]:
    """Which block of every batch a process reads, and how many blocks there are.

    Args:
      parts: of a batch that is cut into as many parts as devices share it, those on each process's devices.
      process: the process.

    Raises:
      ConfigError: if the mesh gives some process no block.

    Example:
      >>> from poise.launch.devices import block_of
      >>> block_of({0: {0, 1}, 1: {2, 3}}, process=1), block_of({0: {0, 1}, 1: {0, 1}}, process=1)
      ((1, 2), (0, 1))
    """
    number, share = 1 + max(map(max, parts.values())), len(parts[process])
    for other, own in parts.items():
        if sorted(own) != list(range(min(own), min(own) + share)) or min(own) % share or number % share:
            raise ConfigError(
                f"mesh gives process {other} the parts {sorted(own)} of the {number} of each batch, but every process "
                "reads one block of the same size; name the axes in another order"
            )
    return min(parts[process]) // share, number // share


def _axes(spec: PartitionSpec) -> set[str]:
    """The axes of the mesh that a leaf is split over."""
    return {axis for axes in spec if axes is not None for axis in (axes if isinstance(axes, tuple) else (axes,))}


def check_devices(config: Any, *batch_sizes: str) -> None:
    """Makes sure, before a run begins, that the devices fit a launcher's flags and can share its batches.

    Args:
      config: a launcher's configuration, with fields ``parallel``, ``mesh``, ``sharding`` and
        ``microbatches`` or without.
      *batch_sizes: names of its fields that count the examples of a batch.

    Raises:
      ConfigError: naming the flag.
    """
    flags = {name: getattr(config, name) for name in ("parallel", "mesh", "sharding") if hasattr(config, name)}
    shards, parts = Placement(**flags).batch_shards, getattr(config, "microbatches", 1)
    for name in batch_sizes:
        size = getattr(config, name)
        if size % (shards * parts):
            sharing = f"microbatches={parts} times {shards}, " if parts > 1 else ""
            raise ConfigError(
                f"{name} must be a multiple of {shards * parts}, {sharing}the devices that share a batch, got {size}"
            )
