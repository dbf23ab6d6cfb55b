"""Playing with a trained network, and training several seeds at once."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from poise.core import Algorithm, axis_index
from poise.core.arguments import check_count
from poise.rl.dqn import epsilon_greedy
from poise.rl.environment import Environment
from poise.rl.td_learner import q_values
from poise.rl.value_transform import ValueTransform


class Rollout(NamedTuple):
    """One episode of each of several environments.

    Attributes:
      observations: ``[steps, episodes, ...]``, what the agent saw before each action.
      returns: the sums of rewards up to the episode's end.
      lengths: the steps up to it.
      finished: whether the end was reached.
    """

    observations: Array
    returns: Float[Array, " episodes"]
    lengths: Array
    finished: Bool[Array, " episodes"]


def rollout(
    env: Environment,
    net: nn.Module,
    transform: ValueTransform,
    params: PyTree,
    key: PRNGKeyArray,
    *,
    num_episodes: int = 32,
    max_steps: int = 1_000,
    epsilon: float | int = 0.0,
) -> Rollout:
    """Plays episodes with the best actions of a network.

    Args:
      env: the environment.
      net: as in :func:`dqn`.
      transform: what its outputs mean.
      params: its parameters, ``state.learner.params`` of a DQN.
      key: a random key.
      num_episodes: episodes that are played side by side.
      max_steps: steps that are made of each; what follows an end is not counted.
      epsilon: share of random actions.

    Returns:
      The episodes.

    Raises:
      TypeError: if a count is no integer.
      ValueError: if a count is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import ValueMLP
      >>> from poise.rl import catch, rollout, scalar
      >>> env, net = catch(rows=4, columns=3), ValueMLP(3, 1, (8,))
      >>> params = net.init(jax.random.key(0), jnp.zeros((1, 4, 3)))
      >>> played = rollout(env, net, scalar(), params, jax.random.key(1), num_episodes=2, max_steps=5)
      >>> played.lengths.tolist(), played.finished.tolist()
      ([3, 3], [True, True])
    """
    check_count("num_episodes", num_episodes)
    check_count("max_steps", max_steps)
    reset_key, step_key = jax.random.split(key)
    state, observation = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))

    def play(carry, key):
        state, observation, going = carry
        act_key, env_key = jax.random.split(key)
        action = epsilon_greedy(act_key, q_values(net, transform, params, observation), epsilon)
        state, out = jax.vmap(env.step)(jax.random.split(env_key, num_episodes), state, action)
        after = going & ~(out.terminated | out.truncated)
        return (state, out.observation, after), (observation, jnp.where(going, out.reward, 0), going)

    going = jnp.ones((num_episodes,), bool)
    carry, (observations, rewards, counted) = jax.lax.scan(
        play, (state, observation, going), jax.random.split(step_key, max_steps)
    )
    return Rollout(observations, jnp.sum(rewards, axis=0), jnp.sum(counted, axis=0), ~carry[2])


def over_seeds(algorithm: Algorithm, num_seeds: int, axis_name: str | None = None) -> Algorithm:
    """The same algorithm for several seeds at once, by ``vmap``.

    Seed ``i`` draws from ``fold_in(key, i)``, so that it makes the same run alone. All leaves of the state and all
    metrics get a first axis ``[num_seeds]``, over which they can be sharded; the batch is shared.

    Args:
      algorithm: any.
      num_seeds: how many, on all devices together.
      axis_name: of the devices that share the seeds under ``pmap`` or ``shard_map``, where device ``p`` of ``P`` holds
        the block ``[p * num_seeds / P, (p+1) * num_seeds / P)``. Under ``jit`` no name is needed.

    Returns:
      An algorithm.

    Raises:
      TypeError: if ``num_seeds`` is no integer.
      ValueError: if it is below 1, or the devices of the axis can't share the seeds evenly.

    Example:
      >>> import jax
      >>> from poise.core import Algorithm
      >>> from poise.rl import over_seeds
      >>> draw = Algorithm(lambda key, batch: jax.random.normal(key), lambda state, batch, key: (state, {}))
      >>> over_seeds(draw, 3).init(jax.random.key(0), ()).shape
      (3,)
    """
    check_count("num_seeds", num_seeds)

    def keys_of(key):
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        if num_seeds % devices:
            raise ValueError(f"num_seeds must be a multiple of the {devices} devices that share them, got {num_seeds}")
        own = num_seeds // devices
        seeds = axis_index(axis_name) * own + jnp.arange(own)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(seeds)

    return Algorithm(
        init=lambda key, batch: jax.vmap(algorithm.init, in_axes=(0, None))(keys_of(key), batch),
        step=lambda state, batch, key: jax.vmap(algorithm.step, in_axes=(0, None, 0))(state, batch, keys_of(key)),
    )
