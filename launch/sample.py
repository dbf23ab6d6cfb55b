"""Draws images from a finished run: ``python -m poise.launch.sample --workdir=runs/digits --num=64 --nfe=1``.

One evaluation of the network per image is the student, more are its teacher. The images go to a PNG, as a grid of up to
1,024, and to an ``.npz`` file with the arrays ``image`` (uint8) and, with classes, ``label``.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from poise.launch.config import ConfigError, field, validate
from poise.launch.main import run_tool
from poise.launch.object_store import delivered, settled

_SHOWN = 1024  # images in the grid, at most


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The settings of a drawing; every field is a flag of the same name."""

    workdir: str = field("", "folder of a finished run, or of a converted teacher")
    output: str = field("", "files that are written: OUTPUT.png and OUTPUT.npz; empty: <workdir>/samples_nfe<nfe>")
    num: int = field(64, "images", minimum=1)
    nfe: int = field(1, "network evaluations per image: 1 for the student, odd numbers for the teacher", minimum=1)
    labels: tuple[int, ...] = field((), "classes that the images run through in turn; empty: all", minimum=0)
    seed: int = field(0, "seed of the latents", minimum=0, maximum=2**32 - 1)
    batch_size: int = field(256, "images at a time", minimum=1)
    jax_cache_dir: str = field("", "folder of JAX's compilation cache; empty: none")

    def __post_init__(self):
        """Checks each field."""
        validate(self)
        if not self.workdir:
            raise ConfigError("workdir must name the folder of a finished run, got an empty text")
        object.__setattr__(self, "workdir", settled(self.workdir))
        if self.nfe % 2 == 0:
            raise ConfigError(f"nfe must be odd: n Heun steps take 2n - 1 evaluations, got {self.nfe}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_tool(SampleConfig, {}, arguments, run, prog="poise.launch.sample", description=__doc__ or "")


def run(config: SampleConfig) -> None:
    """Draws and writes."""
    import jax
    import numpy as np

    from poise.launch.drawing import Drawer, labels_in_turn
    from poise.launch.files import atomic_path
    from poise.launch.pictures import grid_picture
    from poise.launch.runs import open_generator

    found = open_generator(config.workdir, config.nfe)
    classes = found.network.num_classes
    if any(label >= classes for label in config.labels):
        allowed = f"below {classes}" if classes else "empty: this network has no classes"
        raise ConfigError(f"labels must be {allowed}, got {','.join(map(str, config.labels))}")
    labels = labels_in_turn(config.num, classes)
    if config.labels:
        labels = np.resize(np.array(config.labels, np.int32), config.num)
    draw = Drawer(found.generate, found.network.image_shape, config.num, labels, config.batch_size)
    images = found.scale.to_pixels(draw(found.variables, jax.random.key(config.seed)))

    place = settled(config.output or f"{config.workdir}/samples_nfe{config.nfe}")
    arrays: dict[str, Any] = {"image": images} if labels is None else {"image": images, "label": labels}
    with delivered(place) as output:
        with atomic_path(output.with_name(f"{output.name}.npz")) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
        grid_picture(output.with_name(f"{output.name}.png"), images[:_SHOWN], found.scale.maximum)
    evaluations = "1 evaluation" if config.nfe == 1 else f"{config.nfe} evaluations"
    print(f"{config.num} images with {evaluations} each: {place}.png, {place}.npz")


if __name__ == "__main__":
    sys.exit(main())
