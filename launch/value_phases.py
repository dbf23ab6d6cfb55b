"""The phases of a comparison of losses for values: one for each loss, which trains all seeds at once."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from poise.launch.config import ConfigError, nearest
from poise.launch.data import NoData
from poise.launch.episodes import play_episodes
from poise.launch.phase import Phase
from poise.nets import ValueMLP
from poise.rl import (
    DQNConfig,
    Environment,
    ValueTransform,
    c51,
    catch,
    dqn,
    from_gymnax,
    hl_gauss,
    over_seeds,
    reward_noise,
    scalar,
    softmax_scalar,
    sticky_actions,
    two_hot,
)

if TYPE_CHECKING:
    from poise.launch.value import ValueConfig


_ON_A_GRID: dict[str, Callable[..., ValueTransform]] = {
    "hl_gauss": hl_gauss,
    "two_hot": two_hot,
    "c51": c51,
    "mse_softmax": softmax_scalar,
}


def make_transform(loss: str, v_min: float, v_max: float, num_bins: int = 51) -> ValueTransform:
    """The representation of values that a loss's name stands for.

    Args:
      loss: one of ``poise.launch.value.LOSSES``.
      v_min: lower end of the grid.
      v_max: upper end of the grid.
      num_bins: bins or atoms.

    Example:
      >>> from poise.launch.value_phases import make_transform
      >>> make_transform("mse", -1.0, 1.0).num_outputs, make_transform("c51", -1.0, 1.0).num_outputs
      (1, 51)
    """
    return scalar() if loss == "mse" else _ON_A_GRID[loss](v_min, v_max, num_bins)


def pictures_as_booleans(env: Environment) -> Environment:
    """Pictures of zeros and ones need a byte for each in the buffer.

    Example:
      >>> import jax
      >>> from poise.launch.value_phases import pictures_as_booleans
      >>> from poise.rl import catch
      >>> pictures_as_booleans(catch()).reset(jax.random.key(0))[1].dtype
      dtype('bool')
    """

    def reset(key):
        state, observation = env.reset(key)
        return state, observation.astype(bool)

    def step(key, state, action):
        state, out = env.step(key, state, action)
        return state, out._replace(observation=out.observation.astype(bool))

    return Environment(reset, step, env.num_actions)


def make_environment(config: "ValueConfig", noise: bool = True) -> Environment:
    """The environment that the flags name.

    Args:
      config: the run's settings.
      noise: whether rewards get the noise that agents are trained with.

    Raises:
      ConfigError: if there is none of that name, or gymnax isn't installed.
    """
    if config.env == "catch":
        env = pictures_as_booleans(catch())
    else:
        env = _gymnax(config.env)
    if config.sticky_actions:
        env = sticky_actions(env, config.sticky_actions)
    return reward_noise(env, config.reward_noise) if noise and config.reward_noise else env


def _gymnax(name: str) -> Environment:
    try:
        import gymnax
    except ImportError as error:
        raise ConfigError(
            f'env={name} needs gymnax: pip install ".[rl]"{nearest(name, ("catch",))}; catch is built in'
        ) from error
    if name not in gymnax.registered_envs:
        known = sorted(["catch", *gymnax.registered_envs])
        raise ConfigError(f"env must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    env = from_gymnax(*gymnax.make(name))
    return pictures_as_booleans(env) if name.endswith("-MinAtar") else env


def make_network(config: "ValueConfig", env: Environment, transform: ValueTransform) -> ValueMLP:
    """The network that the flags describe."""
    return ValueMLP(env.num_actions, transform.num_outputs, config.preset.hidden)


def dqn_config(config: "ValueConfig") -> DQNConfig:
    """The agents' settings."""
    return DQNConfig(
        num_envs=config.num_envs,
        buffer_size=config.buffer_size,
        batch_size=config.batch_size,
        gamma=config.gamma,
        n_step=config.n_step,
        double=config.double,
        target_period=config.preset.target_period,
        min_history=config.min_history,
        epsilon_end=config.epsilon_end,
        epsilon_steps=config.preset.epsilon_steps,
        iterations=config.updates_per_step,
    )


def value_phases(config: "ValueConfig") -> tuple[Phase, ...]:
    """The run: a phase for each loss, independent of the others.

    Args:
      config: the run's settings.

    Returns:
      The phases, in the order of ``config.losses``; all metrics have one number a seed.
    """
    return tuple(_phase(config, loss) for loss in config.loss_names)


def _phase(config: "ValueConfig", loss: str) -> Phase:
    env = make_environment(config)
    transform = make_transform(loss, *config.support, config.preset.num_bins)
    net = make_network(config, env, transform)
    agent = dqn(env, net, transform, optax.adam(config.preset.learning_rate, eps=1e-5), dqn_config(config))
    return Phase(
        name=loss,
        make_algorithm=lambda _, axis_name=None: over_seeds(agent, config.num_seeds, axis_name),
        data=NoData(),
        num_steps=config.preset.updates // config.updates_per_step,
        evaluate=_judge(config, net, transform),
        evaluate_every=config.eval_every,
        num_seeds=config.num_seeds,
    )


def _judge(config: "ValueConfig", net: ValueMLP, transform: ValueTransform) -> Callable[[Any, jax.Array], dict]:
    """Greedy episodes without noise: their returns, and by how much the values of their steps are wrong."""
    env = make_environment(config, noise=False)
    play = functools.partial(
        play_episodes,
        env,
        net,
        transform,
        num_episodes=config.eval_episodes,
        max_steps=config.preset.episode_steps,
    )

    def one(params, key):
        played = play(params, key)
        error = transform.decode(played.outputs) - played.returns_to_go(config.gamma)
        square = jnp.sum(jnp.where(played.counted, error**2, 0)) / jnp.sum(played.counted)
        return {"return": jnp.mean(played.returns()), "value_error": jnp.sqrt(square)}

    judged = jax.jit(jax.vmap(one))
    return lambda state, key: judged(state.learner.params, jax.random.split(key, config.num_seeds))
