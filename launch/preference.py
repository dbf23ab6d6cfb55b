"""Trains a language model on preferences by several losses, side by side: ``python -m poise.launch.preference``.

A small decoder is first trained on all texts and is then the reference; from it each loss starts anew. The default is
a synthetic experiment, in which one token decides what is preferred, of less than three minutes; ``--data=jsonl:PATH``
reads objects with the texts ``prompt``, ``chosen`` and ``rejected``, one a line. A table (which pairs are ranked right
before and after, how far the policy went from the reference) is printed and written to the working directory, with
``report.json``, a picture and checkpoints. The same command goes on where a stopped run left off.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from poise.launch.config import ConfigError, field, parse_names, validate
from poise.launch.execution import BatchConfig
from poise.launch.main import launch

METHODS = ("dpo", "ipo", "tdpo", "mapo", "sparse_po", "sparse_po_independent")

# jax and everything that needs it is imported when the run starts, so that --help and mistakes answer at once.


@dataclasses.dataclass(frozen=True)
class PreferenceConfig(BatchConfig):
    """The settings of a comparison; every field is a flag of the same name."""

    workdir: str = field(
        "runs/preference", "folder that everything is written to; rerun in it to resume", role="execution"
    )
    data: str = field("trigger", "trigger, the synthetic experiment, or jsonl:PATH")
    methods: str = field("dpo,sparse_po,mapo", f"what is compared, separated by commas: {', '.join(METHODS)}")
    seed: int = field(0, "seed of the run: data, parameters, order and noise", minimum=0, maximum=2**32 - 1)
    num_pairs: int = field(1000, "pairs to train on; of a file, at most", minimum=1)
    num_held_out: int = field(500, "pairs to judge by; of a file, at most a fifth", minimum=1)
    max_length: int = field(128, "tokens of a text in a file, prompt included; longer ones are cut", minimum=8)

    num_layers: int = field(2, "layers of the decoder", minimum=1)
    num_heads: int = field(2, "its heads", minimum=1)
    width: int = field(32, "its width, an even multiple of the heads", minimum=2)
    pretrain_steps: int = field(1500, "updates that make the reference", minimum=1)
    pretrain_learning_rate: float = field(3e-3, "Adam's learning rate for it", exclusive_minimum=0.0)

    steps: int = field(400, "updates by each loss", minimum=1)
    batch_size: int = field(64, "texts, or pairs, of an update", minimum=1)
    learning_rate: float = field(1e-3, "Adam's learning rate for each loss", exclusive_minimum=0.0)
    beta: float = field(0.5, "strength of the reference", exclusive_minimum=0.0)
    l1: float = field(0.0, "weight of the L1 norm of learned masks", minimum=0.0)
    mask_dropout: float = field(0.01, "dropout of learned masks", minimum=0.0, maximum=0.9)
    mask_weight_decay: float = field(0.01, "weight decay of learned masks", minimum=0.0)
    agreement: float = field(
        0.0,
        "share of raters that agree with a pair, for the idealized accuracy; 0: 1 for trigger, 0.75 for a file",
        minimum=0.0,
        maximum=1.0,
    )

    eval_every: int = field(50, "updates between judgements; 0: at a loss's end", role="execution", minimum=0)
    save_every: int = field(0, "steps between checkpoints; 0: by time alone", role="execution", minimum=0)
    keep: int = field(1, "checkpoints kept per phase", role="execution", minimum=1)

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        object.__setattr__(self, "methods", ",".join(parse_names("methods", self.methods, METHODS)))
        kind, _, place = self.data.partition(":")
        if (kind, bool(place)) not in (("trigger", False), ("jsonl", True)):
            raise ConfigError(f"data must be trigger or jsonl:PATH, got {self.data!r}")
        if place:  # as a run's other places, wherever it is resumed from
            object.__setattr__(self, "data", f"jsonl:{pathlib.Path(place).expanduser().absolute()}")
        if self.width % (2 * self.num_heads):
            raise ConfigError(f"width must be an even multiple of num_heads = {self.num_heads}, got {self.width}")

    @property
    def method_names(self) -> tuple[str, ...]:
        """The losses, in order."""
        return tuple(self.methods.split(","))

    @property
    def raters(self) -> float:
        """The share of raters that agree with a pair."""
        return self.agreement or (1.0 if self.data == "trigger" else 0.75)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(
        PreferenceConfig, {}, arguments, run, prog="poise.launch.preference", description=__doc__ or "", check=check
    )


def check(config: PreferenceConfig) -> None:
    """Reads a file of pairs before anything is written.

    Raises:
      DataError: naming its line that can't be used.
    """
    from poise.launch.devices import check_devices
    from poise.launch.preference_data import read_jsonl

    check_devices(config, "batch_size")
    if config.data != "trigger":
        read_jsonl(config.data.partition(":")[2])


def run(config: PreferenceConfig, workdir: pathlib.Path) -> None:
    """The whole run: data, the reference, a phase for each loss, then the comparison."""
    from poise.launch.agreement import is_main
    from poise.launch.loop import fit
    from poise.launch.preference_data import facts_of, open_pairs
    from poise.launch.preference_judge import make_judges
    from poise.launch.preference_phases import preference_phases
    from poise.launch.preference_results import write_results
    from poise.launch.workdir import settle_data

    data = open_pairs(config)
    settle_data(facts_of(data), workdir)
    judges = make_judges(config, data)
    result = fit(
        preference_phases(config, data, judges),
        workdir=workdir,
        seed=config.seed,
        **config.for_fit(),
    )
    if is_main():
        write_results(config, data, judges, result.seconds, workdir)


if __name__ == "__main__":
    sys.exit(main())
