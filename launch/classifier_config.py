"""The flags that launchers of image classifiers share: data, a vision transformer, its training in float, execution."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from poise.launch.config import ConfigError, field, validate
from poise.launch.execution import BatchConfig

NETWORK = ("data", "image_size", "patch_size", "width", "num_heads", "num_layers", "mlp_ratio")

# Seconds, to see that everything works.
SMOKE: dict[str, Any] = {
    "patch_size": 4, "width": 16, "num_layers": 1, "float_steps": 6, "batch_size": 16, "eval_images": 40,
    "timing_images": 40, "save_every": 2, "save_every_seconds": 0.0,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ClassifierConfig(BatchConfig):
    """The settings of a classifier; every field is a flag of the same name."""

    workdir: str = field("", "folder that everything is written to; rerun in it to resume", role="execution")
    data: str = field(
        "digits",
        "labelled images: digits, synthetic (noise, to measure speed), tfds:NAME, or folder:PATH with a subfolder for "
        "each class",
    )
    data_dir: str = field("", "folder of prepared data sets; empty: <workdir>/data", role="execution")
    image_size: int = field(
        0, "side of synthetic images; those of a folder are cropped and resized to it; 0: 32, their own", minimum=0
    )
    seed: int = field(0, "seed of the run: parameters and data order", minimum=0, maximum=2**32 - 1)

    patch_size: int = field(2, "side of the vision transformer's patches", minimum=1)
    width: int = field(48, "width of a token", minimum=1)
    num_heads: int = field(2, "attention heads, which divide the width", minimum=1)
    num_layers: int = field(2, "blocks", minimum=1)
    mlp_ratio: int = field(4, "hidden width of the perceptrons over the width", minimum=1)

    float_steps: int = field(1000, "updates of the float network", minimum=1)
    float_learning_rate: float = field(2e-3, "its peak learning rate", exclusive_minimum=0.0)
    batch_size: int = field(64, "images per update", minimum=1)
    weight_decay: float = field(0.05, "weight decay of AdamW, on kernels", minimum=0.0)

    eval_images: int = field(10_000, "held-out images, at most, that accuracy is measured on", minimum=1)
    timing_images: int = field(256, "images of the batch that is timed", role="execution", minimum=1)

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        kind, _, place = self.data.partition(":")
        if (kind, bool(place)) not in (("digits", False), ("synthetic", False), ("tfds", True), ("folder", True)):
            raise ConfigError(f"data must be digits, synthetic, tfds:NAME or folder:PATH, got {self.data!r}")
        if kind == "folder":  # the same images wherever the run is resumed from
            object.__setattr__(self, "data", f"folder:{pathlib.Path(place).expanduser().absolute()}")
        if self.image_size and kind not in ("folder", "synthetic"):
            raise ConfigError(f"image_size must be 0 for data={self.data}, whose size is known, got {self.image_size}")
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads must divide width={self.width}, got {self.num_heads}")
        if kind == "digits" and 8 % self.patch_size:
            raise ConfigError(f"patch_size must divide the images' side 8, got {self.patch_size}")


def network_settings(config: ClassifierConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's ``config.json`` says of its data and network, with the defaults where it says nothing.

    Args:
      config: gives the defaults.
      found: the file's content.

    Raises:
      ConfigError: if the file is that of another launcher.
    """
    fields = {entry.name: entry.default for entry in dataclasses.fields(config)}
    if "patch_size" not in found:
        raise ConfigError("checkpoint must be the folder of a run of poise.launch.qat or poise.launch.ptq")
    return {name: found.get(name, fields[name]) for name in NETWORK}
