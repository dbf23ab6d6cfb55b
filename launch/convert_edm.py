"""Turns the weights of an official EDM network into a teacher for ``poise.launch.distill --teacher=DIR``.

``python -m poise.launch.convert_edm --input=edm.safetensors --recipe=cifar10-32x32-cond-vp --output=DIR``

What network the weights belong to is read from a ``.safetensors`` file's metadata (``class_name``, and ``init_kwargs``
as JSON) where it is there, else inferred from the weights, unless ``--recipe`` says it. Only ``.safetensors`` and
``.npz`` files are read: an official pickle would execute code. No weights come with poise; those that NVIDIA published
are CC BY-NC-SA 4.0, and so is what is converted from them.
"""

import dataclasses
import json
import pathlib
import sys
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from poise.launch.config import ConfigError, field, validate
from poise.launch.main import run_tool

INFER = "infer"
CHECKPOINTS = (
    "cifar10-32x32-cond-vp", "cifar10-32x32-uncond-vp", "cifar10-32x32-cond-ve", "cifar10-32x32-uncond-ve",
    "ffhq-64x64-uncond-vp", "ffhq-64x64-uncond-ve", "afhqv2-64x64-uncond-vp", "afhqv2-64x64-uncond-ve",
    "imagenet-64x64-cond-adm",
)  # fmt: skip
RECIPES = {INFER: {}, **{name: {} for name in CHECKPOINTS}}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """The settings of a conversion; every field is a flag of the same name."""

    input: str = field("", "the weights by official name: a .safetensors or .npz file")
    output: str = field("", "the folder that the teacher is written to")
    recipe: str = field(INFER, "the network that they belong to", role="execution")
    label_dim: int = field(-1, "checked against the weights' classes; -1: whatever they have", minimum=-1)
    lenient: bool = field(False, "leave out FastGen's additional logvar_linear; anything else unexpected is an error")

    def __post_init__(self):
        """Checks each field."""
        validate(self)
        if pathlib.PurePath(self.input).suffix not in (".safetensors", ".npz"):
            raise ConfigError(f"input must be a .safetensors or .npz file, got {self.input!r}")
        if not self.output:
            raise ConfigError("output must name a folder, got an empty text")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_tool(ConvertConfig, RECIPES, arguments, run, prog="poise.launch.convert_edm", description=__doc__ or "")


def run(config: ConvertConfig) -> None:
    """Reads and converts everything, then writes."""
    from poise.launch.mirror import claimed_workdir
    from poise.launch.teachers import DESCRIPTION, save_teacher
    from poise.launch.workdir import prepare_workdir

    teacher = convert(config)
    folder = prepare_workdir(config.output)
    with claimed_workdir(config.output):
        if (folder / DESCRIPTION).exists() or (folder / "checkpoints").exists():
            raise ConfigError(f"output must be a folder without a run or a teacher, but {folder} holds one")
        save_teacher(folder, teacher)
    kind, classes = teacher.network.architecture["model_type"], teacher.network.num_classes
    size, _, channels = teacher.network.image_shape
    print(
        f"{config.output}: {kind} for {size}x{size}x{channels} images, "
        f"{f'{classes} classes' if classes else 'no classes'}; poise.launch.distill --teacher={config.output} takes it"
    )


def convert(config: ConvertConfig) -> Any:
    """Reads the weights and makes a teacher of them.

    Args:
      config: the settings.

    Returns:
      A :class:`poise.launch.teachers.Teacher`, with EDM's scale of images, [-1, 1].

    Raises:
      ConfigError: if the file can't be read; or one that lists every key that doesn't fit.
    """
    from poise.launch.networks import NetworkConfig
    from poise.launch.pixels import PixelScale
    from poise.launch.teachers import Teacher
    from poise.nets import EDM_CHECKPOINTS, from_state_dict, infer_config

    weights, stored = read_weights(config.input)
    try:
        if config.recipe == INFER:
            architecture = infer_config(weights) if stored is None else stored
        else:
            architecture = dict(EDM_CHECKPOINTS[config.recipe])
            _check_agreement(config, architecture, stored or {})
        _, variables = from_state_dict(weights, architecture, strict=not config.lenient)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{config.input}: {error}") from error
    network = NetworkConfig(architecture)
    if config.label_dim not in (-1, network.num_classes):
        raise ConfigError(f"label_dim must be the weights' {network.num_classes} classes, got {config.label_dim}")
    return Teacher(network, variables, PixelScale.edm(network.sigma_data), ())


def _check_agreement(config: ConvertConfig, chosen: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    from poise.nets import preconditioning_of

    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}
    shared = (plain.keys() & stored.keys()) - {"dropout", "class_name"}
    different = [f"{name} is {stored[name]} there" for name in sorted(shared) if stored[name] != plain[name]]
    if stored and preconditioning_of(stored) != preconditioning_of(chosen):
        different.insert(0, f"the preconditioning is {preconditioning_of(stored)!r} there")
    if different:
        raise ConfigError(f"recipe {config.recipe} contradicts the metadata of {config.input}: {'; '.join(different)}")


def read_weights(path: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Arrays by name from a ``.safetensors`` or ``.npz`` file; nothing in it is executed.

    Returns:
      The arrays, and the official constructor's arguments where the file's metadata has them.

    Raises:
      ConfigError: naming the file and why it can't be read.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as reader:
                metadata = reader.metadata() or {}
                arrays = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
            if "init_kwargs" not in metadata:
                return arrays, None
            named = {"class_name": metadata["class_name"]} if "class_name" in metadata else {}
            return arrays, {**json.loads(metadata["init_kwargs"]), **named}
        with np.load(file, allow_pickle=False) as archive:
            return dict(archive), None
    except (SafetensorError, OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    sys.exit(main())
