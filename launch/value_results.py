"""What a finished comparison of losses for values leaves: a table, ``report.json`` and two pictures."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from poise.launch.checkpoint_tree import restore_tree
from poise.launch.episodes import play_episodes
from poise.launch.intervals import interquartile_mean
from poise.launch.results import cell, phase_folder, read_rows, text_table, write_report
from poise.launch.value_phases import dqn_config, make_environment, make_network, make_transform
from poise.launch.value_pictures import Distributions, curves_picture, values_picture
from poise.rl import Transition
from poise.rl.td_learner import LearnerState, td_targets

if TYPE_CHECKING:
    from poise.launch.value import ValueConfig

_PACKAGES = ("poise", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scipy")


def write_results(config: "ValueConfig", seconds: Mapping[str, float], workdir: pathlib.Path) -> dict[str, Any]:
    """Compares the losses by the run's rows and its last checkpoints; prints the table and writes the files.

    Args:
      config: the run's settings.
      seconds: training took for each loss.
      workdir: where ``report.json``, ``curves.png`` and ``values.png`` go.

    Returns:
      The content of ``report.json``.
    """
    rows = read_rows(workdir)
    curves = {loss: np.array([row["return_mean"] for row in rows[loss]]) for loss in config.loss_names}
    env_steps = np.array([row["env_steps"][0] for row in rows[config.loss_names[0]]])
    losses = {loss: _figures(curves[loss], rows[loss]) for loss in config.loss_names}
    report = {
        "losses": losses,
        "environment": config.env,
        "support": list(config.support),
        "settings": {name: value for name, value in config.preset._asdict().items() if name not in ("support", "room")},
        "env_steps": int(env_steps[-1]),
        "seconds": dict(seconds),
        "config": dataclasses.asdict(config),
        "devices": [device.device_kind for device in jax.devices()],
        "seed": config.seed,
    }
    write_report(workdir / "report.json", report, _PACKAGES)
    noise = f", reward noise of deviation {config.reward_noise:g}" if config.reward_noise else ""
    title = f"{config.env}{noise}: {config.num_seeds} agents of each loss"
    curves_picture(workdir / "curves.png", env_steps, curves, {name: rows[name] for name in curves}, title)
    seen = {loss: _distributions(config, index, loss, workdir) for index, loss in enumerate(config.loss_names)}
    values_picture(workdir / "values.png", seen, title)
    print(table(report), flush=True)
    return report


def last_eighth(curves: np.ndarray) -> np.ndarray:
    """Each agent's mean over the last eighth of its curve ``[steps, seeds]``.

    Example:
      >>> import numpy as np
      >>> from poise.launch.value_results import last_eighth
      >>> last_eighth(np.arange(32.0).reshape(16, 2)).tolist()
      [29.0, 30.0]
    """
    return curves[-max(1, len(curves) // 8) :].mean(0)


def _figures(curves: np.ndarray, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is reported of one loss."""
    last = last_eighth(curves)
    tail = rows[-max(1, len(rows) // 8) :]

    def mean(name: str) -> float | None:
        return float(np.mean([row[name] for row in tail])) if name in tail[0] else None

    judged = rows[-1]
    figures = {
        "return_last_eighth": last,
        "greedy_return": judged["eval/return"],
        "value_error": judged["eval/value_error"],
    }
    found: dict[str, Any] = {}
    for name, by_seed in figures.items():
        interval = interquartile_mean(np.array(by_seed, float))
        found[name] = {
            "interquartile_mean": float(interval.mean),
            "interval_95": [float(interval.low), float(interval.high)],
            "by_seed": [float(value) for value in by_seed],
        }
    return found | {name: mean(name) for name in ("excess_loss", "target_out_of_support")}


def table(report: Mapping[str, Any]) -> str:
    """The comparison as text: interquartile means over agents, with the interval of the first."""
    heads = ("", "return", "95% interval", "greedy return", "value error", "excess loss", "outside of grid")
    rows = []
    for loss, figures in report["losses"].items():
        low, high = figures["return_last_eighth"]["interval_95"]
        means = [figures[name]["interquartile_mean"] for name in ("return_last_eighth", "greedy_return", "value_error")]
        others = [figures["excess_loss"], figures["target_out_of_support"]]
        rows.append((loss, cell(means[0]), f"{low:.3f} to {high:.3f}", *map(cell, [*means[1:], *others])))
    return text_table(heads, rows)


def load_agents(config: "ValueConfig", index: int, loss: str, workdir: pathlib.Path) -> LearnerState:
    """The parameters of a loss's agents from its newest checkpoint, seeds first.

    Args:
      config: the run's settings.
      index: the loss's place among them.
      loss: its name.
      workdir: the run's folder.

    Raises:
      CheckpointError: if there is none or it is damaged.
    """
    learner = restore_tree(phase_folder(workdir, index, loss))["learner"]
    return LearnerState(learner["params"], learner["target_params"], None, learner["updates"])


def _distributions(config: "ValueConfig", index: int, loss: str, workdir: pathlib.Path) -> Distributions:
    """Returns, targets and predictions in the states that the agents come to, with noise as they were trained."""
    env = make_environment(config)
    transform = make_transform(loss, *config.support, config.preset.num_bins)
    net = make_network(config, env, transform)
    settings = dqn_config(config)
    play = functools.partial(
        play_episodes,
        env,
        net,
        transform,
        num_episodes=config.eval_episodes,
        max_steps=config.preset.episode_steps,
        epsilon=settings.epsilon_end,
    )

    @jax.jit
    @jax.vmap
    def look(learner, key):
        played = play(learner.params, key)
        steps = Transition(
            played.observations[:-1],
            played.actions,
            played.rewards,
            jnp.where(played.terminated, 0.0, config.gamma),
            played.observations[1:],
        )
        # Of one step's episodes at a time, lest all outputs of all states be there at once.
        targets, values, _ = jax.lax.map(lambda step: td_targets(net, transform, learner, step, settings.double), steps)
        shares = None
        if transform.support is not None and targets.shape[-1] == transform.num_outputs:
            weight = (played.counted / jnp.sum(played.counted))[..., None]
            predicted = jax.nn.softmax(played.outputs)
            shares = jnp.sum(targets * weight, (0, 1)), jnp.sum(predicted * weight, (0, 1))
        return played.counted, played.returns_to_go(config.gamma), values, transform.decode(played.outputs), shares

    learner = load_agents(config, index, loss, workdir)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1), config.num_seeds)
    counted, returns, targets, predictions, shares = jax.device_get(look(learner, keys))
    if shares is None:
        return Distributions(returns[counted], targets[counted], predictions[counted], None)
    targets, predictions = (share.mean(0) for share in shares)
    return Distributions(returns[counted], targets, predictions, np.asarray(transform.support))
