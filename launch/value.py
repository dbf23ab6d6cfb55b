"""Trains agents whose values are learned by several losses, side by side: ``python -m poise.launch.value``.

Each loss is one phase of the run, with all seeds trained at once. The built-in game catch takes about a minute; the
games of MinAtar and other environments of gymnax come with ``pip install ".[rl]"``. Learning curves with confidence
bands, histograms of returns, ``report.json`` and checkpoints are written to the working directory, and a table is
printed. The same command goes on where a stopped run left off; ``poise.launch.play`` shows an agent at play.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from poise.launch.config import ConfigError, field, parse_names, validate
from poise.launch.execution import ExecutionConfig
from poise.launch.main import launch

LOSSES = ("mse", "hl_gauss", "two_hot", "c51", "mse_softmax")

# jax and everything that needs it is imported when the run starts, so that --help and mistakes answer at once.


class Preset(NamedTuple):
    """What suits an environment: used where a flag is left at 0 or empty.

    Attributes:
      updates: updates of the networks.
      epsilon_steps: environment steps of the decay of exploration.
      target_period: updates between copies to the target network.
      learning_rate: Adam's.
      num_bins: of the grid of values.
      hidden: widths of the network.
      episode_steps: steps of a judged episode, at most.
      support: the ends of the grid of values without noise on rewards; None where they are unknown.
      room: how far the upper end lies above what is reached.
    """

    updates: int = 8_000
    epsilon_steps: int = 100_000
    target_period: int = 500
    learning_rate: float = 1e-3
    num_bins: int = 51
    hidden: tuple[int, ...] = (256, 128)
    episode_steps: int = 1_000
    support: tuple[float, float] | None = None
    room: float = 0.0


PRESETS = {
    "catch": Preset(4_000, 50_000, 100, 3e-3, 21, (64, 64), 10, (-2.0, 2.0)),
    "Breakout-MinAtar": Preset(support=(-1.0, 9.0), room=2.0),
    "SpaceInvaders-MinAtar": Preset(support=(-1.0, 19.0), room=2.0),
}


@dataclasses.dataclass(frozen=True)
class ValueConfig(ExecutionConfig):
    """The settings of a comparison; every field is a flag of the same name."""

    workdir: str = field("runs/value", "folder that everything is written to; rerun in it to resume", role="execution")
    env: str = field("catch", "catch, or an environment of gymnax such as Breakout-MinAtar")
    losses: str = field("mse,hl_gauss", f"what is compared, separated by commas: {', '.join(LOSSES)}")
    num_seeds: int = field(5, "agents of each loss, trained at once", minimum=1)
    seed: int = field(0, "seed of the run, from which each agent draws its own", minimum=0, maximum=2**32 - 1)
    updates: int = field(0, "updates of each agent; 0: 4000 for catch, 8000 otherwise", minimum=0)
    updates_per_step: int = field(50, "updates between rows of metrics; they make one compiled step", minimum=1)

    reward_noise: float = field(1.0, "standard deviation of the noise on each reward", minimum=0.0)
    sticky_actions: float = field(
        0.0, "probability that an action is the last one again", minimum=0.0, exclusive_maximum=1.0
    )
    v_min: float = field(0.0, "lower end of the grid of values; equal ends: known for the environment")
    v_max: float = field(0.0, "upper end of the grid of values")
    num_bins: int = field(0, "bins or atoms of the grid; 0: 21 for catch, 51 otherwise", minimum=0)

    num_envs: int = field(32, "environments of an agent", minimum=1)
    batch_size: int = field(64, "transitions of an update", minimum=1)
    buffer_size: int = field(50_000, "transitions that are kept", minimum=1)
    min_history: int = field(1_000, "transitions before the first update", minimum=0)
    target_period: int = field(
        0, "updates between copies to the target network; 0: 100 for catch, 500 otherwise", minimum=0
    )
    epsilon_end: float = field(0.05, "share of random actions at last", minimum=0.0, maximum=1.0)
    epsilon_steps: int = field(
        0, "environment steps of its decay from 1; 0: 50000 for catch, 100000 otherwise", minimum=0
    )
    gamma: float = field(0.99, "discount", minimum=0.0, maximum=1.0)
    n_step: int = field(1, "rewards that are summed before the value is asked", minimum=1)
    double: bool = field(False, "whether the online network chooses the next action")
    hidden: tuple[int, ...] = field((), "widths of the network; empty: 64,64 for catch, 256,128 otherwise", minimum=1)
    learning_rate: float = field(0.0, "Adam's; 0: 0.003 for catch, 0.001 otherwise", minimum=0.0)

    eval_episodes: int = field(32, "episodes by which each agent is judged", role="execution", minimum=1)
    eval_every: int = field(0, "steps of the run between judgements; 0: at a loss's end", role="execution", minimum=0)
    save_every: int = field(0, "steps between checkpoints; 0: by time alone", role="execution", minimum=0)
    keep: int = field(1, "checkpoints kept per loss; each holds the buffer", role="execution", minimum=1)

    def __post_init__(self):
        """Checks each field, and those that belong together."""
        validate(self)
        object.__setattr__(self, "losses", ",".join(parse_names("losses", self.losses, LOSSES)))
        preset = PRESETS.get(self.env, Preset())
        updates = self.updates or preset.updates
        if updates % self.updates_per_step:
            raise ConfigError(
                f"updates must be a multiple of updates_per_step = {self.updates_per_step}, got {updates}"
            )
        rows = updates // self.updates_per_step
        if self.eval_every and rows % self.eval_every:
            raise ConfigError(f"eval_every must divide the run's {rows} steps, got {self.eval_every}")
        if self.num_bins == 1:
            raise ConfigError("num_bins must be at least 2, or 0 for what suits the environment, got 1")
        for name in ("num_envs", "min_history"):
            if getattr(self, name) > self.buffer_size:
                raise ConfigError(f"{name} must be at most buffer_size = {self.buffer_size}, got {getattr(self, name)}")
        if self.v_min > self.v_max:
            raise ConfigError(f"v_min must be below v_max, got {self.v_min} and {self.v_max}")
        if self.v_min == self.v_max and preset.support is None and set(self.loss_names) != {"mse"}:
            raise ConfigError(
                f"v_min and v_max must be given for env={self.env}: the grid is known for {', '.join(PRESETS)} alone"
            )

    @property
    def preset(self) -> Preset:
        """What suits the environment, with what the flags say instead."""
        names = ("updates", "epsilon_steps", "target_period", "learning_rate", "num_bins", "hidden")
        given = {name: getattr(self, name) for name in names if getattr(self, name)}
        return PRESETS.get(self.env, Preset())._replace(**given)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The losses, in order."""
        return tuple(self.losses.split(","))

    @property
    def support(self) -> tuple[float, float]:
        """The ends of the grid; noise of standard deviation 1 takes 2 on either side, where there is no room yet."""
        if self.v_min < self.v_max:
            return self.v_min, self.v_max
        preset = PRESETS.get(self.env, Preset())
        low, high = preset.support or (0.0, 1.0)  # which the squared error makes no use of
        return low - 2 * self.reward_noise, high + max(0.0, 2 * self.reward_noise - preset.room)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the launcher and returns its exit code, see :func:`poise.launch.main.launch`."""
    arguments = sys.argv[1:] if argv is None else argv
    return launch(ValueConfig, {}, arguments, run, prog="poise.launch.value", description=__doc__ or "", check=check)


def check(config: ValueConfig) -> None:
    """Looks whether there is such an environment, and such devices, before anything is written.

    Raises:
      ConfigError: if not.
    """
    from poise.launch.devices import check_devices
    from poise.launch.value_phases import make_environment

    check_devices(config)
    make_environment(config)


def run(config: ValueConfig, workdir: pathlib.Path) -> None:
    """The whole run: a phase for each loss, then the comparison."""
    from poise.launch.agreement import is_main
    from poise.launch.loop import fit
    from poise.launch.value_phases import value_phases
    from poise.launch.value_results import write_results

    result = fit(
        value_phases(config),
        workdir=workdir,
        seed=config.seed,
        **config.for_fit(),
    )
    if is_main():
        write_results(config, result.seconds, workdir)


if __name__ == "__main__":
    sys.exit(main())
