"""Shows an agent of a run of poise.launch.value at play: ``python -m poise.launch.play --workdir=runs/value``.

One episode is drawn, without noise on the rewards: on the left the game, on the right what the network says of the
action that it takes, as a distribution over the grid of values where the loss has one. An animation, OUTPUT.gif, and a
sheet of frames, OUTPUT.png, are written.
"""

import dataclasses
import sys
from collections.abc import Sequence

from poise.launch.config import ConfigError, field, nearest, validate
from poise.launch.main import run_tool
from poise.launch.object_store import delivered, settled


@dataclasses.dataclass(frozen=True)
class PlayConfig:
    """The settings of a drawing; every field is a flag of the same name."""

    workdir: str = field("runs/value", "folder of a run of poise.launch.value")
    loss: str = field("", "whose agent plays; empty: that of the last loss")
    agent: int = field(0, "which of its agents, from 0", minimum=0)
    output: str = field("", "files that are written: OUTPUT.gif and OUTPUT.png; empty: <workdir>/play_<loss>")
    max_steps: int = field(200, "steps that are drawn, at most", minimum=1)
    seed: int = field(0, "seed of the episode", minimum=0, maximum=2**32 - 1)
    frames_per_second: float = field(8.0, "speed of the animation", exclusive_minimum=0.0, maximum=50.0)
    jax_cache_dir: str = field("", "folder of JAX's compilation cache; empty: none")

    def __post_init__(self):
        """Checks each field."""
        validate(self)
        if not self.workdir:
            raise ConfigError("workdir must name the folder of a run, got an empty text")
        object.__setattr__(self, "workdir", settled(self.workdir))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit code, see :func:`poise.launch.main.run_tool`."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_tool(PlayConfig, {}, arguments, run, prog="poise.launch.play", description=__doc__ or "")


def run(config: PlayConfig) -> None:
    """Plays and draws."""
    import jax
    import numpy as np

    from poise.launch.episodes import play_episodes
    from poise.launch.frames import animation, draw_frames, sheet
    from poise.launch.local_copy import local_copy
    from poise.launch.manifest import CheckpointError
    from poise.launch.runs import config_of
    from poise.launch.value import ValueConfig
    from poise.launch.value_phases import make_environment, make_network, make_transform
    from poise.launch.value_results import load_agents

    settings = config_of(ValueConfig, config.workdir)
    names = settings.loss_names
    loss = config.loss or names[-1]
    if loss not in names:
        raise ConfigError(f"loss must be among the run's, {', '.join(names)}, got {loss!r}{nearest(loss, names)}")
    if config.agent >= settings.num_seeds:
        raise ConfigError(f"agent must be below the run's num_seeds = {settings.num_seeds}, got {config.agent}")
    try:
        index = names.index(loss)
        learner = load_agents(settings, index, loss, local_copy(config.workdir, f"{index:02d}_{loss}"))
    except CheckpointError as error:
        raise ConfigError(f"{error}: has the run come to {loss}?") from error

    env = make_environment(settings, noise=False)
    transform = make_transform(loss, *settings.support, settings.preset.num_bins)
    net = make_network(settings, env, transform)
    params = jax.tree.map(lambda leaf: leaf[config.agent], learner.params)
    steps = min(config.max_steps, settings.preset.episode_steps)

    @jax.jit
    def episode(params, key):
        played = play_episodes(env, net, transform, params, key, num_episodes=1, max_steps=steps)
        probs = None if transform.support is None else jax.nn.softmax(played.outputs)
        return played, transform.decode(played.outputs), probs

    played, values, probs = jax.device_get(episode(params, jax.random.key(config.seed)))
    if played.observations.ndim not in (4, 5):  # steps, episodes, height, width, perhaps channels
        raise ConfigError(f"the observations of {settings.env} are no pictures: {played.observations.shape[2:]}")

    length = int(np.sum(played.counted))
    frames = draw_frames(
        played.observations[: length + 1, 0],
        values[:length, 0],
        np.cumsum(played.rewards[:length, 0]),
        None if probs is None else probs[:length, 0],
        None if transform.support is None else np.asarray(transform.support),
    )
    place = settled(config.output or f"{config.workdir}/play_{loss}")
    with delivered(place) as output:
        animation(output.with_name(f"{output.name}.gif"), frames, config.frames_per_second)
        sheet(output.with_name(f"{output.name}.png"), frames)
    print(f"{length} steps, return {np.sum(played.rewards[:length, 0]):g}: {place}.gif, {place}.png")


if __name__ == "__main__":
    sys.exit(main())
