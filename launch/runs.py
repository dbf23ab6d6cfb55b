"""What a finished run left, for the launchers that look at it: its student, its teacher, its configuration."""

import json
import pathlib
from typing import Any, NamedTuple

from poise.launch.config import ConfigError
from poise.launch.drawing import Generate, many_steps_generate, one_step_generate
from poise.launch.errors import LaunchError
from poise.launch.networks import NetworkConfig
from poise.launch.pixels import PixelScale


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
      workdir: the folder of a finished run, or of a converted teacher.
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


def read_config(workdir: str) -> dict[str, Any]:
    """The run's ``config.json``; empty where there is none."""
    path = pathlib.Path(workdir).expanduser() / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return content if isinstance(content, dict) else {}
