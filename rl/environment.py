"""Environments as pairs of pure functions, wrappers around them, a built-in one and an adapter for gymnax."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from poise.core.arguments import check_choice, check_count, check_range


class EnvStep(NamedTuple):
    """What an environment answers to an action.

    Attributes:
      observation: of the state that the action led to; at the end of an episode the last one, not that of a new start.
      reward: one number.
      terminated: whether the episode is over by the environment's rules, so that nothing follows.
      truncated: whether it was cut short, as by a time limit, though more would follow.
    """

    observation: Array
    reward: Float[Array, ""]
    terminated: Bool[Array, ""]
    truncated: Bool[Array, ""]


class Environment(NamedTuple):
    """An environment for one agent with numbered actions; ``vmap`` makes many of it.

    Attributes:
      reset: ``(key) -> (state, observation)``.
      step: ``(key, state, action) -> (state, EnvStep)``. It doesn't start anew by itself; :func:`step_or_reset` does.
      num_actions: actions are 0 to ``num_actions - 1``.
    """

    reset: Callable[[PRNGKeyArray], tuple[PyTree, Array]]
    step: Callable[[PRNGKeyArray, PyTree, Array], tuple[PyTree, EnvStep]]
    num_actions: int


def step_or_reset(env: Environment, key: PRNGKeyArray, state: PyTree, action: Array) -> tuple[PyTree, Array, EnvStep]:
    """Makes a step and, where that ends the episode, starts a new one.

    Args:
      env: the environment.
      key: a random key.
      state: the environment's state.
      action: one integer.

    Returns:
      State and observation to go on with, and the step, which still holds the ended episode's last observation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import catch, step_or_reset
      >>> env = catch(rows=2, columns=1)
      >>> state, _ = env.reset(jax.random.key(0))
      >>> state, observation, step = step_or_reset(env, jax.random.key(1), state, jnp.array(1))
      >>> bool(step.terminated), step.observation.ravel().tolist(), observation.ravel().tolist()
      (True, [0.0, 1.0], [1.0, 1.0])
    """
    step_key, reset_key = jax.random.split(key)
    state, step = env.step(step_key, state, action)
    fresh_state, fresh_observation = env.reset(reset_key)
    done = step.terminated | step.truncated

    def choose(fresh, old):
        return jnp.where(done, fresh, old)

    return (
        jax.tree.map(choose, fresh_state, state),
        jax.tree.map(choose, fresh_observation, step.observation),
        step,
    )


class CatchState(NamedTuple):
    """Where ball and paddle are; the paddle is always in the last row."""

    ball_row: Array
    ball_column: Array
    paddle: Array


def catch(rows: int = 10, columns: int = 5) -> Environment:
    """A ball falls from a random column; a paddle in the last row moves left, stays or moves right.

    The observation is a picture ``[rows, columns]`` of zeros and ones. When the ball arrives the episode terminates,
    with a reward of 1 if the paddle is below it and -1 if not; all other rewards are 0.

    Args:
      rows: height, at least 2; an episode takes ``rows - 1`` steps.
      columns: width, at least 1.

    Returns:
      The environment, with 3 actions.

    Raises:
      TypeError: if a size is no integer.
      ValueError: if a size is too small.

    Example:
      >>> import jax
      >>> from poise.rl import catch
      >>> state, observation = catch(3, 3).reset(jax.random.key(0))
      >>> observation.tolist()
      [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]

    References:
      Osband et al., Behaviour Suite for Reinforcement Learning, https://arxiv.org/abs/1908.03568.
    """
    check_count("rows", rows, 2)
    check_count("columns", columns)

    def draw(state):
        picture = jnp.zeros((rows, columns)).at[state.ball_row, state.ball_column].set(1.0)
        at_bottom = jnp.maximum(picture[rows - 1], jax.nn.one_hot(state.paddle, columns))
        return picture.at[rows - 1].set(at_bottom)

    def reset(key):
        column = jax.random.randint(key, (), 0, columns)
        state = CatchState(jnp.zeros((), jnp.int32), column, jnp.full((), columns // 2, jnp.int32))
        return state, draw(state)

    def step(key, state, action):
        del key
        paddle = jnp.clip(state.paddle + action.astype(jnp.int32) - 1, 0, columns - 1)
        state = CatchState(state.ball_row + 1, state.ball_column, paddle)
        over = state.ball_row >= rows - 1
        reward = jnp.where(over, jnp.where(paddle == state.ball_column, 1.0, -1.0), 0.0)
        return state, EnvStep(draw(state), reward, over, jnp.zeros((), bool))

    return Environment(reset, step, 3)


def time_limit(env: Environment, max_steps: int) -> Environment:
    """Cuts episodes short: after ``max_steps`` steps an episode that isn't over is truncated.

    Args:
      env: the environment.
      max_steps: at least 1.

    Returns:
      The environment with a counter in its state.

    Raises:
      TypeError: if ``max_steps`` is no integer.
      ValueError: if it is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import catch, time_limit
      >>> env = time_limit(catch(), 1)
      >>> state, _ = env.reset(jax.random.key(0))
      >>> _, step = env.step(jax.random.key(1), state, jnp.array(1))
      >>> bool(step.terminated), bool(step.truncated)
      (False, True)
    """
    check_count("max_steps", max_steps)

    def reset(key):
        state, observation = env.reset(key)
        return (state, jnp.zeros((), jnp.int32)), observation

    def step(key, state, action):
        inner, count = state
        inner, out = env.step(key, inner, action)
        return (inner, count + 1), out._replace(truncated=out.truncated | (~out.terminated & (count + 1 >= max_steps)))

    return Environment(reset, step, env.num_actions)


def reward_noise(env: Environment, scale: float | int = 1.0, kind: str = "normal") -> Environment:
    r"""Adds independent noise to every reward, $N(0, \text{scale}^2)$ or $U(0, \text{scale})$.

    Args:
      env: the environment.
      scale: at least 0.
      kind: ``normal`` or ``uniform``; the second raises the mean by half the scale.

    Returns:
      The environment with noisy rewards. An agent's reports of returns hold the noise too.

    Raises:
      ValueError: for a negative scale or another kind.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import catch, reward_noise
      >>> env = reward_noise(catch(), 0.5, "uniform")
      >>> state, _ = env.reset(jax.random.key(0))
      >>> _, step = env.step(jax.random.key(1), state, jnp.array(1))
      >>> 0 < float(step.reward) < 0.5
      True

    References:
      Farebrother et al., Stop Regressing, https://arxiv.org/abs/2403.03950, where noise is uniform.
    """
    check_range("scale", scale, 0.0, open_high=True)
    check_choice("kind", kind, ("normal", "uniform"))
    draw = jax.random.normal if kind == "normal" else jax.random.uniform

    def step(key, state, action):
        noise_key, key = jax.random.split(key)
        state, out = env.step(key, state, action)
        return state, out._replace(reward=out.reward + scale * draw(noise_key, (), out.reward.dtype))

    return env._replace(step=step)


def sticky_actions(env: Environment, probability: float | int = 0.25) -> Environment:
    """Repeats the last action, whatever is asked for, with a probability; the first one of an episode is obeyed.

    Args:
      env: the environment.
      probability: in [0, 1].

    Returns:
      The environment with the last action in its state.

    Raises:
      ValueError: if the probability is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import catch, sticky_actions
      >>> env = sticky_actions(catch(), 1.0)
      >>> state, _ = env.reset(jax.random.key(0))
      >>> for action in (0, 2, 2):
      ...     state, step = env.step(jax.random.key(1), state, jnp.array(action))
      >>> step.observation[-1].tolist()  # three steps to the left, as far as it goes
      [1.0, 0.0, 0.0, 0.0, 0.0]

    References:
      Machado et al., Revisiting the Arcade Learning Environment, https://arxiv.org/abs/1709.06009.
    """
    check_range("probability", probability, 0.0, 1.0)

    def reset(key):
        state, observation = env.reset(key)
        return (state, jnp.full((), -1, jnp.int32)), observation

    def step(key, state, action):
        coin_key, key = jax.random.split(key)
        inner, last = state
        stick = jax.random.bernoulli(coin_key, probability) & (last >= 0)
        action = jnp.where(stick, last, action.astype(jnp.int32))
        inner, out = env.step(key, inner, action)
        return (inner, action), out

    return Environment(reset, step, env.num_actions)


def from_gymnax(env: Any, params: Any = None) -> Environment:
    """An environment of the library gymnax, version 1.0 or later.

    Steps are made with its ``step_env`` and ``is_truncated``, which don't reset, so that the true last observation and
    the difference between terminated and truncated survive.

    Args:
      env: the environment, as the first value of ``gymnax.make("Breakout-MinAtar")``.
      params: its parameters, the second value; None for its defaults.

    Returns:
      The environment.

    Raises:
      TypeError: if the environment lacks what gymnax 1.0 has.

    Example:
      >>> from poise.rl import from_gymnax
      >>> from_gymnax("CartPole-v1")
      Traceback (most recent call last):
      TypeError: env must be an environment of gymnax 1.0 or later, got a str without step_env

    References:
      Lange, gymnax, https://github.com/RobertTLange/gymnax.
    """
    for name in ("step_env", "reset_env", "is_truncated", "num_actions"):
        if not hasattr(type(env), name):
            raise TypeError(
                f"env must be an environment of gymnax 1.0 or later, got a {type(env).__name__} without {name}"
            )
    params = env.default_params if params is None else params

    def reset(key):
        observation, state = env.reset_env(key, params)
        return jax.tree.map(jnp.asarray, state), observation

    def step(key, state, action):
        observation, new, reward, terminated, _ = env.step_env(key, state, action, params)
        new = jax.tree.map(lambda value, old: jnp.asarray(value, old.dtype), new, state)  # Python numbers have no dtype
        terminated = jnp.asarray(terminated, bool)
        truncated = jnp.asarray(env.is_truncated(new, params), bool) & ~terminated
        return new, EnvStep(observation, jnp.asarray(reward, jnp.float32), terminated, truncated)

    return Environment(reset, step, int(env.num_actions))
