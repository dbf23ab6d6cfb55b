"""A finished student as one safetensors file, and back: three lines in anybody's project."""

import json
import os
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from poise.launch.files import atomic_path
from poise.launch.local_copy import local_copy
from poise.launch.networks import NetworkConfig, build_network, check_variables
from poise.launch.pixels import PixelScale

_FORMAT = "poise-student"
_VERSION = 1


class Student(NamedTuple):
    """A one-step generator: parameters, the network's settings and the scale of its images.

    Attributes:
      network: the network's settings.
      variables: its variables, for ``build_network(network).apply``.
      sigma_init: the noise level at which it is called.
      scale: what turns its output into pixel values.
    """

    network: NetworkConfig
    variables: Any
    sigma_init: float
    scale: PixelScale

    def __call__(self, key: PRNGKeyArray, labels: Array | None = None, num_images: int | None = None) -> Array:
        """Draws images, each with one evaluation of the network.

        Args:
          key: a random key.
          labels: ``[N]`` integers below the number of classes; None for a student without classes.
          num_images: N, for a student without classes.

        Returns:
          Images ``[N, H, W, C]`` with values in [0, 1].

        Raises:
          ValueError: if labels are not a vector of integers in range, or there are none where the student has classes,
            or the other way round.
        """
        from poise.fdistill import one_step

        classes = self.network.num_classes
        if (labels is None) == bool(classes) or (num_images is None) != bool(classes):
            needed = f"labels in [0, {classes}) and no num_images" if classes else "num_images and no labels"
            raise ValueError(f"this student takes {needed}, got labels={labels} and num_images={num_images}")
        if labels is not None:
            labels = jnp.asarray(labels)
            if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
                raise ValueError(
                    f"labels must be a vector of integers, got shape {labels.shape} and dtype {labels.dtype}"
                )
            if not isinstance(labels, jax.core.Tracer) and labels.size:
                bad = labels[(labels < 0) | (labels >= classes)]
                if bad.size:
                    raise ValueError(f"labels must be in [0, {classes}), got {int(bad[0])}")
            num_images = labels.shape[0]
        assert num_images is not None
        latents = jax.random.normal(key, (num_images, *self.network.image_shape))
        x = one_step(build_network(self.network), self.variables, latents, labels, sigma_init=self.sigma_init)
        return self.scale.to_unit(x)


def save_student(path: str | os.PathLike, student: Student) -> None:
    """Writes a student as safetensors: parameters by path, everything else as JSON in the file's metadata.

    Args:
      path: the file, written atomically.
      student: the student.

    Example:
      >>> import jax, jax.numpy as jnp, pathlib, tempfile
      >>> from poise.launch import Student, load_student, save_student
      >>> from poise.launch.networks import NetworkConfig, abstract_variables
      >>> from poise.launch.pixels import PixelScale
      >>> unet = {"model_type": "SongUNet", "model_channels": 4, "channel_mult": (1,), "num_blocks": 1}
      >>> network = NetworkConfig({"img_resolution": 8, "img_channels": 1, "label_dim": 10, **unet})
      >>> variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_variables(network))
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "student.safetensors"
      >>> save_student(file, Student(network, variables, 80.0, PixelScale(4.9, 6.0, 16)))
      >>> load_student(file).network.num_classes
      10
    """
    from safetensors.numpy import save_file

    flat = flax.traverse_util.flatten_dict(flax.core.unfreeze(student.variables), sep="/")
    header = {
        "version": _VERSION,
        "network": student.network.to_json(),
        "sigma_init": student.sigma_init,
        "scale": student.scale._asdict(),
    }
    tensors = {name: np.ascontiguousarray(jax.device_get(value)) for name, value in flat.items()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": _FORMAT, "student": json.dumps(header, sort_keys=True)})


def load_student(path: str | os.PathLike) -> Student:
    """Loads a student from a finished run's folder or from its safetensors file.

    Args:
      path: the working directory of a run, an address as well, or the file ``student.safetensors`` in it.

    Returns:
      The student, to be called with a key and labels. Nothing in the file is executed.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file isn't a student of a version that this release reads, or doesn't fit its own settings.

    Example:
      >>> from poise.launch import load_student
      >>> def draw(workdir, key, labels):
      ...     student = load_student(workdir)
      ...     return student(key, labels)  # [N, H, W, C], values in [0, 1]
      >>> load_student("runs/none")
      Traceback (most recent call last):
      ...
      FileNotFoundError: no student at runs/none: is the run finished? (One of --recipe=mixture2d has none.)
    """
    from safetensors import SafetensorError, safe_open

    file = local_copy(path)
    file = file / "student.safetensors" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"no student at {file}: is the run finished? (One of --recipe=mixture2d has none.)")
    try:
        with safe_open(file, framework="numpy") as reader:
            metadata = reader.metadata() or {}
            flat = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{file} holds no student: its format is {metadata.get('format')!r}, not {_FORMAT!r}")
    header = json.loads(metadata["student"])
    if header["version"] != _VERSION:
        raise ValueError(f"{file} has version {header['version']}; this release reads version {_VERSION}")
    network = NetworkConfig.from_json(header["network"])
    variables = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(flat, sep="/"))
    try:
        check_variables(network, variables)
    except ValueError as error:
        raise ValueError(f"{file} does not fit its network: {error}") from error
    return Student(network, variables, header["sigma_init"], PixelScale(**header["scale"]))
