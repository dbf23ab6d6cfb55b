"""Episodes that are played to look at an agent: what it saw, what its network said, and what it got."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from poise.rl import Environment, ValueTransform, epsilon_greedy


class Episodes(NamedTuple):
    """Episodes played side by side; what follows an end is there but not ``counted``.

    Attributes:
      observations: before each step, and the one after the last, ``[steps + 1, episodes, ...]``.
      actions: that were taken.
      outputs: the network's outputs for those actions.
      rewards: that came of them.
      terminated: whether nothing follows the step, by the environment's rules.
      counted: whether the step belongs to the episode.
    """

    observations: Array
    actions: Int[Array, "steps episodes"]
    outputs: Float[Array, "steps episodes outputs"]
    rewards: Float[Array, "steps episodes"]
    terminated: Bool[Array, "steps episodes"]
    counted: Bool[Array, "steps episodes"]

    def returns(self) -> Float[Array, " episodes"]:
        """The sums of rewards."""
        return jnp.sum(jnp.where(self.counted, self.rewards, 0), axis=0)

    def lengths(self) -> Int[Array, " episodes"]:
        """The numbers of steps."""
        return jnp.sum(self.counted, axis=0)

    def returns_to_go(self, gamma: float) -> Float[Array, "steps episodes"]:
        """At each step the discounted sum of rewards from there on; 0 after an end."""

        def back(total, step):
            reward, counted = step
            total = jnp.where(counted, reward + gamma * total, 0)
            return total, total

        start = jnp.zeros(self.rewards.shape[1], self.rewards.dtype)
        return jax.lax.scan(back, start, (self.rewards, self.counted), reverse=True)[1]


def play_episodes(
    env: Environment,
    net: nn.Module,
    transform: ValueTransform,
    params: PyTree,
    key: PRNGKeyArray,
    *,
    num_episodes: int,
    max_steps: int,
    epsilon: float = 0.0,
) -> Episodes:
    """Plays by the values of a network.

    Args:
      env: the environment.
      net: as in :func:`poise.rl.dqn`.
      transform: what its outputs mean.
      params: its parameters.
      key: a random key.
      num_episodes: episodes that are played side by side.
      max_steps: steps of each, at most.
      epsilon: share of random actions.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.launch.episodes import play_episodes
      >>> from poise.nets import ValueMLP
      >>> from poise.rl import catch, scalar
      >>> env, net = catch(rows=4, columns=3), ValueMLP(3, 1, (4,))
      >>> params = net.init(jax.random.key(0), jnp.zeros((1, 4, 3)))
      >>> played = play_episodes(env, net, scalar(), params, jax.random.key(1), num_episodes=2, max_steps=5)
      >>> played.observations.shape, played.lengths().tolist()
      ((6, 2, 4, 3), [3, 3])
    """
    reset_key, step_key = jax.random.split(key)
    state, first = jax.vmap(env.reset)(jax.random.split(reset_key, num_episodes))

    def step(carry, key):
        state, observation, going = carry
        act_key, env_key = jax.random.split(key)
        outputs = cast(Any, net).apply(params, observation)
        action = epsilon_greedy(act_key, transform.decode(outputs), epsilon)
        state, out = jax.vmap(env.step)(jax.random.split(env_key, num_episodes), state, action)
        chosen = jnp.take_along_axis(outputs, action[:, None, None], axis=1)[:, 0]
        record = (out.observation, action, chosen, out.reward, out.terminated, going)
        return (state, out.observation, going & ~(out.terminated | out.truncated)), record

    start = (state, first, jnp.ones((num_episodes,), bool))
    _, (later, *records) = jax.lax.scan(step, start, jax.random.split(step_key, max_steps))
    return Episodes(jnp.concatenate([first[None], later]), *records)
