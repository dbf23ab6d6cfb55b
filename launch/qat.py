"""Trains a vision transformer whose weights have 2, 3 or 4 bits: ``python -m poise.launch.qat --workdir=runs/qat``.

The run has three phases: the network is trained in float; then with quantized weights and activations, taught by its
float self; then, for OFQ, annealed so that only weights near a threshold move. The result leaves as packed integers
(``model.safetensors``), is read again and judged; ``report.json`` and ``oscillation.png`` are written to the working
directory, and a table is printed. The same command goes on where a stopped run left off.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from poise.launch.classifier_config import SMOKE, ClassifierConfig
from poise.launch.config import ConfigError, field
from poise.launch.main import launch

RECIPES: dict[str, dict[str, Any]] = {
    "digits": {},
    "smoke": {**SMOKE, "steps": 6, "cga_steps": 4, "eval_every": 3},
}


@dataclasses.dataclass(frozen=True)
class QATConfig(ClassifierConfig):
    """The settings of a quantization-aware training; every field is a flag of the same name."""

    method: str = field("ofq", "how weights are quantized: ofq (StatsQ, annealed) or lsq", choices=("ofq", "lsq"))
    bits: int = field(2, "bits of the blocks' weights; first and last layers have 8", choices=(2, 3, 4))
    act_bits: int = field(8, "bits of the blocks' activations; first and last layers have 8", minimum=2, maximum=8)
    qkr: bool = field(False, "quantize the product of query and key weights, for method=ofq")
    distill_weight: float = field(1.0, "weight of the float network's soft labels", minimum=0.0)
    steps: int = field(1200, "updates with quantized weights", minimum=1)
    learning_rate: float = field(2e-3, "their peak learning rate", exclusive_minimum=0.0)
    min_learning_rate: float = field(
        1e-5, "what it falls to along a cosine, and stays at while annealing", exclusive_minimum=0.0
    )
    cga_steps: int = field(200, "updates of confidence-guided annealing, for method=ofq; 0: none", minimum=0)
    boundary_range: float = field(
        0.005, "annealed weights are this close to a threshold, in levels", minimum=0.0, maximum=0.5
    )
    eval_every: int = field(100, "updates between evaluations; 0: at the end only", role="execution", minimum=0)

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        super().__post_init__()
        if self.qkr and self.method != "ofq":
            raise ConfigError(f"qkr must be false for method={self.method}, got true")
        if self.min_learning_rate > self.learning_rate:
            raise ConfigError(
                f"min_learning_rate must be at most learning_rate={self.learning_rate}, got {self.min_learning_rate}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(QATConfig, RECIPES, arguments, run, prog="poise.launch.qat", description=__doc__ or "", check=check)


def check(config: ClassifierConfig) -> None:
    """Looks at the data before anything is written.

    Raises:
      DataError: if it cannot be read, has no classes, or the patches don't tile the images.
    """
    from poise.launch.devices import check_devices

    check_devices(config, "batch_size")
    if config.data != "digits":
        from poise.launch.classifier import open_classes

        open_classes(config, config.data_dir)


def run(config: QATConfig, workdir: pathlib.Path) -> None:
    """The whole run, top to bottom: data, float training, quantized training, annealing, integers, judgement."""
    from poise.launch.agreement import is_main, main_first
    from poise.launch.classifier import float_phase, open_classes
    from poise.launch.loop import fit
    from poise.launch.qat_phases import quantized_phases
    from poise.launch.qat_results import write_results

    data_dir = config.data_dir or (workdir / "data" if config.data == "digits" else "")
    images = main_first(lambda: open_classes(config, data_dir))
    result = fit(
        (float_phase(config, images), *quantized_phases(config, images)),
        workdir=workdir,
        seed=config.seed,
        **config.for_fit(),
    )
    if is_main():
        write_results(config, images, result, workdir)


if __name__ == "__main__":
    sys.exit(main())
