"""Quantizes a trained vision transformer without training it: ``python -m poise.launch.ptq --checkpoint=runs/qat``.

The network is the float one of a run of poise.launch.qat, or is trained here where no checkpoint is named. Each method
at each number of bits rounds the weights of the blocks, on a few unlabelled images, and leaves one safetensors file of
packed integers. With ``--act_bits`` the blocks' activations are quantized, too, with steps that are learned with the
weights and kept in the file. The files are read again and judged; ``report.json`` and ``ptq.png`` are written to the
working directory, and a table is printed. The same command goes on where a stopped run left off, and more methods or
bits may be added.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from poise.launch.classifier_config import SMOKE, ClassifierConfig, network_settings
from poise.launch.config import ConfigError, field, parse_names
from poise.launch.main import launch
from poise.launch.object_store import settled

METHODS = ("rtn", "adaround", "flexround", "nupes")

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "smoke": {**SMOKE, "methods": "rtn,flexround", "bits": (3,), "steps": 4, "calibration_images": 16,
              "reconstruction_batch_size": 8},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PTQConfig(ClassifierConfig):
    """The settings of post-training quantization; every field is a flag of the same name."""

    checkpoint: str = field(
        "", "folder of a run with a float phase, whose data and network are taken; empty: train one"
    )
    methods: str = field(",".join(METHODS), f"how weights are rounded: {', '.join(METHODS)}", role="execution")
    bits: tuple[int, ...] = field(
        (2, 3, 4), "bits of the blocks' weights; first and last layers have 8", role="execution", minimum=2, maximum=8
    )
    act_bits: int = field(
        0, "bits of what enters the blocks' layers; 0: floats", role="execution", choices=(0, *range(2, 9))
    )
    drop: float = field(
        0.5,
        "with act_bits, the probability of a quantized entry while blocks are reconstructed (QDrop); 1: all are",
        role="execution",
        minimum=0.0,
        maximum=1.0,
    )
    calibration_images: int = field(256, "training images that blocks are reconstructed on", minimum=1)
    reconstruction_batch_size: int = field(64, "of them in a step", minimum=1)
    steps: int = field(300, "steps of each block's reconstruction", minimum=1)
    adaround_learning_rate: float = field(1e-2, "peak learning rate of AdaRound", exclusive_minimum=0.0)
    adaround_strength: float = field(1e-3, "of its regularizer", minimum=0.0)
    flexround_learning_rate: float = field(3e-3, "peak learning rate of FlexRound", exclusive_minimum=0.0)
    nupes_learning_rate: float = field(1e-2, "peak learning rate of NUPES", exclusive_minimum=0.0)
    activation_learning_rate: float = field(
        3e-3, "with act_bits, peak learning rate of the activations' steps; 0: they stay as they begin", minimum=0.0
    )

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        super().__post_init__()
        object.__setattr__(self, "methods", ",".join(parse_names("methods", self.methods, METHODS)))
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ConfigError(f"bits must have at least one entry, each once, got {','.join(map(str, self.bits))!r}")
        if self.reconstruction_batch_size > self.calibration_images:
            raise ConfigError(
                f"reconstruction_batch_size must be at most calibration_images={self.calibration_images}, "
                f"got {self.reconstruction_batch_size}"
            )
        if self.checkpoint:
            object.__setattr__(self, "checkpoint", settled(self.checkpoint, absolute=True))

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods, in order."""
        return tuple(name.strip() for name in self.methods.split(",") if name.strip())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(PTQConfig, RECIPES, arguments, run, prog="poise.launch.ptq", description=__doc__ or "", check=check)


def with_its_network(config: PTQConfig) -> PTQConfig:
    """The settings with the data and the network of the checkpoint, if one is named.

    Raises:
      ConfigError: if its folder is no run's.
    """
    if not config.checkpoint:
        return config
    from poise.launch.runs import read_config

    return dataclasses.replace(config, **network_settings(config, read_config(config.checkpoint)))


def check(config: PTQConfig) -> None:
    """Looks at the checkpoint and the data before anything is written.

    Raises:
      ConfigError: if the checkpoint is no run's.
      CheckpointError: if its float phase is not there.
      DataError: if the data cannot be read, has no classes, or the patches don't tile the images.
    """
    from poise.launch.devices import check_devices

    check_devices(config, "batch_size")
    used = with_its_network(config)
    if used.checkpoint:
        from poise.launch.ptq_methods import float_variables

        float_variables(used.checkpoint)
    if used.data != "digits":
        from poise.launch.classifier import open_classes

        open_classes(used, used.data_dir)


def run(config: PTQConfig, workdir: pathlib.Path) -> None:
    """The whole run, top to bottom: data, the float network, every method at every number of bits, judgement."""
    from poise.launch.agreement import is_main, main_first
    from poise.launch.classifier import float_phase, open_classes
    from poise.launch.loop import fit
    from poise.launch.ptq_methods import float_variables
    from poise.launch.ptq_results import quantize_all, settle_network

    config = with_its_network(config)
    data_dir = config.data_dir or (workdir / "data" if config.data == "digits" else "")
    images = main_first(lambda: open_classes(config, data_dir))
    if config.checkpoint:
        variables = float_variables(config.checkpoint)
    else:
        variables = fit(
            (float_phase(config, images),),
            workdir=workdir,
            seed=config.seed,
            **config.for_fit(),
        ).state.variables
    settle_network(variables["params"], workdir)
    if is_main():
        quantize_all(config, images, variables, workdir)


if __name__ == "__main__":
    sys.exit(main())
