"""A checkpoint as nested dictionaries, read without the run that made it."""

import os
import pathlib

import jax
from jaxtyping import PyTree

from poise.launch.leaves import dtype_named, nest
from poise.launch.local_copy import local_copy
from poise.launch.manifest import (
    CheckpointError,
    Damaged,
    checkpoints_at,
    frozen_home,
    quiet_orbax,
    read_frozen_manifest,
    read_leaves,
    read_meta,
    reading,
)


def restore_tree(path: str | os.PathLike[str]) -> PyTree:
    """Reads a checkpoint without knowing what is in it: nested dictionaries of arrays on the first device.

    Fields of named tuples and dataclasses become keys, places in tuples become ``"0"``, ``"1"``, ... Every array is
    compared with its checksum. The machine needs neither the devices nor the code that the checkpoint was made with.

    Args:
      path: a checkpoint (``<workdir>/checkpoints/00_teacher/300``), a phase's folder, or a run's; of several
        checkpoints the newest is read. An address in an object store is one, too.

    Returns:
      The state as nested dictionaries, with its frozen part.

    Raises:
      CheckpointError: if there is no checkpoint, or it is damaged, or the system doesn't let it be read.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> from poise.core import Algorithm
      >>> from poise.launch import NoData, Phase, fit, restore_tree
      >>> def step(state, batch, key):
      ...     return {"count": state["count"] + 1}, {}
      >>> count = Algorithm(lambda key, batch: {"count": jnp.zeros(())}, step)
      >>> with tempfile.TemporaryDirectory() as workdir:
      ...     _ = fit([Phase("count", lambda previous: count, NoData(), num_steps=3)], workdir=workdir, seed=0)
      ...     tree = restore_tree(workdir)
      >>> float(tree["count"])
      3.0
    """
    origin = local_copy(path, "").absolute()
    checkpoint = next(checkpoints_at(origin), None)
    if checkpoint is None:
        raise CheckpointError(f"there is no checkpoint in {origin}")
    with quiet_orbax(), reading(checkpoint):
        return _restore_tree(checkpoint)


def _restore_tree(checkpoint: pathlib.Path) -> PyTree:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        meta = read_meta(checkpoint)
        parts = [(checkpoint, meta["leaves"])]
        if meta["frozen"] is not None:
            home = frozen_home(checkpoint.parent.parent, meta)
            parts.append((home, read_frozen_manifest(home)))
        paths: list[tuple[str, ...]] = []
        leaves: list[jax.Array] = []
        for home, manifest in parts:
            abstract = [jax.ShapeDtypeStruct(tuple(entry["shape"]), dtype_named(entry["dtype"])) for entry in manifest]
            leaves += read_leaves(home, manifest, abstract, [sharding] * len(abstract))
            paths += [tuple(entry["path"]) for entry in manifest]
    except Damaged as error:
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged: {error}") from error
    return nest(paths, leaves)
