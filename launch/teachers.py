"""A teacher in a folder: a checkpoint of its averaged parameters, and ``teacher.json``, which describes its network."""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from poise.launch.checkpoint import CheckpointStore
from poise.launch.checkpoint_tree import restore_tree
from poise.launch.errors import LaunchError
from poise.launch.files import atomic_path
from poise.launch.leaves import Layout
from poise.launch.local_copy import local_copy
from poise.launch.networks import NetworkConfig, check_variables
from poise.launch.pixels import PixelScale

DESCRIPTION = "teacher.json"
PHASE = "teacher"
_FORMAT, _VERSION = "poise-teacher", 1


class TeacherError(LaunchError, ValueError):
    """A folder that holds no teacher that can be used; the message names it and says why."""


class Teacher(NamedTuple):
    """A trained denoiser.

    Attributes:
      network: its settings.
      variables: its variables, for ``build_network(network).apply``.
      scale: what turns pixel values into its inputs.
      class_names: in the order of the labels; empty where they are unknown or there are none.
    """

    network: NetworkConfig
    variables: PyTree
    scale: PixelScale
    class_names: tuple[str, ...]


def describe_teacher(
    directory: str | os.PathLike[str],
    network: NetworkConfig,
    scale: PixelScale,
    class_names: Sequence[str],
    num_steps: int,
) -> None:
    """Writes ``teacher.json`` beside the checkpoints of a run whose first phase trains the teacher.

    Args:
      directory: the run's folder.
      network: the teacher's settings.
      scale: of its images.
      class_names: in the order of the labels.
      num_steps: updates after which it is finished.
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "network": network.to_json(),
        "scale": scale._asdict(),
        "class_names": list(class_names),
        "num_steps": num_steps,
    }
    with atomic_path(pathlib.Path(directory) / DESCRIPTION) as temporary:
        temporary.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_teacher(directory: str | os.PathLike[str], teacher: Teacher) -> None:
    """Writes a teacher as a run leaves it, such as one whose weights were trained elsewhere.

    Args:
      directory: an existing folder; its description comes last, so that a folder with one is whole.
      teacher: the teacher.

    Raises:
      ValueError: if the variables are not those of the network.
      CheckpointError: if it can't be written.
    """
    check_variables(teacher.network, teacher.variables)
    constants = dict(teacher.variables)
    state = {"ema": constants.pop("params"), "constants": constants}
    layout = Layout(jax.tree.map(jax.numpy.asarray, state))
    live, frozen = layout.split(jax.tree.map(jax.numpy.asarray, state))
    store = CheckpointStore(pathlib.Path(directory) / "checkpoints", [(PHASE, 0)], 0, 1, print)
    store.save(0, 0, layout, live, frozen, {})
    store.close()
    describe_teacher(directory, teacher.network, teacher.scale, teacher.class_names, num_steps=0)


def read_description(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """What ``teacher.json`` says: ``network``, ``scale`` and ``class_names``, and where the ``checkpoint`` is.

    Raises:
      TeacherError: if there is none, it is damaged, or the teacher isn't finished.
    """
    path = local_copy(directory, f"00_{PHASE}").absolute() / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise TeacherError(
            f"there is no teacher in {path.parent}: it needs {DESCRIPTION}, as poise.launch.distill and "
            "poise.launch.convert_edm write it"
        ) from error
    except (OSError, ValueError) as error:
        raise TeacherError(f"{path} cannot be read: {error}") from error
    try:
        if content["format"] != _FORMAT or content["version"] != _VERSION:
            raise ValueError(f"its format is {content['format']!r}, version {content['version']}")
        network, scale = NetworkConfig.from_json(content["network"]), PixelScale(**content["scale"])
        last = path.parent / "checkpoints" / f"00_{PHASE}" / str(content["num_steps"])
        found = {"network": network, "scale": scale, "class_names": tuple(content["class_names"]), "checkpoint": last}
    except (KeyError, TypeError, ValueError) as error:
        raise TeacherError(f"{path} describes no teacher that this release reads: {error}") from error
    if not last.is_dir():
        raise TeacherError(f"the teacher in {path.parent} isn't finished: there is no checkpoint {last}")
    return found


def load_teacher(directory: str | os.PathLike[str]) -> Teacher:
    """Loads a finished teacher.

    Args:
      directory: the folder of a run of ``poise.launch.distill``, or what ``poise.launch.convert_edm`` wrote.

    Returns:
      The teacher. Every array is compared with its checksum, nothing in the folder is executed.

    Raises:
      TeacherError: if there is none, it isn't finished, or its parameters are not those of its network; the message
        names the first that differs.
      CheckpointError: if it is damaged.
    """
    content = read_description(directory)
    tree = restore_tree(content["checkpoint"])
    variables = {**tree.get("constants", {}), "params": tree["ema"]}
    try:
        check_variables(content["network"], variables)
    except ValueError as error:
        raise TeacherError(f"the teacher in {directory} does not fit its network: {error}") from error
    return Teacher(content["network"], variables, content["scale"], content["class_names"])
