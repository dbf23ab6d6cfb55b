"""What a finished run left, for the launchers that look at it: its student, its teacher, its configuration."""

import json
import os
import pathlib
from typing import Any, NamedTuple, TypeVar

from poise.launch.config import TUPLE, ConfigError, config_fields, nearest
from poise.launch.drawing import Generate, many_steps_generate, one_step_generate
from poise.launch.errors import LaunchError
from poise.launch.local_copy import local_copy
from poise.launch.networks import NetworkConfig
from poise.launch.pixels import PixelScale
from poise.launch.workdir import CONFIG_FILE

Config = TypeVar("Config")


class Generator(NamedTuple):
    """Something that draws images.

    Attributes:
      generate: ``(variables, latents, labels) -> images`` in the network's scale.
      variables: the network's variables.
      network: its settings.
      scale: what turns images into pixel values.
    """

    generate: Generate
    variables: Any
    network: NetworkConfig
    scale: PixelScale


def open_generator(workdir: str, nfe: int) -> Generator:
    """A run's student (one evaluation) or its teacher (any odd number: ``(nfe + 1) / 2`` Heun steps).

    Args:
      workdir: the folder or address of a finished run, or of a converted teacher.
      nfe: network evaluations per image.

    Raises:
      ConfigError: if there is no such generator.
    """
    from poise.launch.export import load_student
    from poise.launch.teachers import load_teacher

    if nfe == 1:
        try:
            student = load_student(workdir)
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(str(error)) from error
        once = one_step_generate(student.network, student.sigma_init)
        return Generator(once, student.variables, student.network, student.scale)
    if nfe % 2 == 0 or nfe < 3:
        raise ConfigError(f"nfe must be 1 for the student, or odd and at least 3 for the teacher, got {nfe}")
    folder = read_config(workdir).get("teacher") or workdir
    try:
        teacher = load_teacher(folder)
    except LaunchError as error:
        raise ConfigError(str(error)) from error
    steps = many_steps_generate(teacher.network, (nfe + 1) // 2)
    return Generator(steps, teacher.variables, teacher.network, teacher.scale)


def config_of(cls: type[Config], workdir: str | os.PathLike[str]) -> Config:
    """The configuration of a run that is there; settings that its file does not know are the defaults.

    Args:
      cls: the launcher's configuration, whose fields are declared with :func:`poise.launch.config.field`.
      workdir: the run's folder.

    Raises:
      ConfigError: if there is no ``config.json``, or it is damaged or another launcher's.

    Example:
      >>> from poise.launch.qat import QATConfig
      >>> from poise.launch.runs import config_of
      >>> config_of(QATConfig, "nowhere")
      Traceback (most recent call last):
      ...
      poise.launch.config.ConfigError: there is no run of poise.launch.qat in nowhere: it has no config.json
    """
    path, launcher = _config_file(workdir), cls.__module__
    found = _read(path)
    if found is None:
        raise ConfigError(f"there is no run of {launcher} in {workdir}: it has no {path.name}")
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged (it holds no JSON object)")
    fields = config_fields(cls)
    unknown = [name for name in found if name not in fields]
    if unknown:
        raise ConfigError(
            f"{path} is of no run of {launcher}: it sets {', '.join(unknown)}{nearest(unknown[0], tuple(fields))}"
        )
    plain = {
        name: tuple(value) if fields[name][1] == TUPLE and isinstance(value, list) else value
        for name, value in found.items()
    }
    try:
        return cls(**plain)
    except ConfigError as error:
        raise ConfigError(f"{path} is of no run of {launcher}: {error}") from error


def read_config(workdir: str) -> dict[str, Any]:
    """The run's ``config.json``; empty where there is none."""
    content = _read(_config_file(workdir))
    return content if isinstance(content, dict) else {}


def _config_file(workdir: str | os.PathLike[str]) -> pathlib.Path:
    return local_copy(workdir) / CONFIG_FILE


def _read(path: pathlib.Path) -> Any:
    """What the file holds; None where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
