"""Deep Q-learning entirely on the device: environments, replay and updates inside one scan."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from poise.core import Algorithm, Batch, Metrics
from poise.core.arguments import check_count, check_range
from poise.rl.environment import Environment, step_or_reset
from poise.rl.n_step import StepRecord, Transition, n_step_transition, push_step
from poise.rl.replay import ReplayState, replay_add, replay_init, replay_sample
from poise.rl.td_learner import LearnerState, make_update, q_values
from poise.rl.value_transform import ValueTransform


class DQNConfig(NamedTuple):
    r"""How a DQN acts and learns. The defaults suit MinAtar on a CPU.

    Attributes:
      num_envs: environments that are stepped together.
      buffer_size: transitions that are kept.
      batch_size: transitions of one update.
      gamma: the discount $\gamma$.
      n_step: rewards that are summed before the value is asked.
      double: whether the online network chooses the next action.
      target_period: updates between copies to the target network.
      min_history: transitions before the first update; until then parameters stay as they are.
      epsilon_start: share of random actions at first.
      epsilon_end: share of random actions at last.
      epsilon_steps: environment steps, over all environments, of the linear decay in between.
      iterations: of one ``step`` of the algorithm, each one step of all environments and one update.
    """

    num_envs: int = 32
    buffer_size: int = 50_000
    batch_size: int = 64
    gamma: float | int = 0.99
    n_step: int = 1
    double: bool = False
    target_period: int = 500
    min_history: int = 1_000
    epsilon_start: float | int = 1.0
    epsilon_end: float | int = 0.05
    epsilon_steps: int = 100_000
    iterations: int = 100


class DQNState(NamedTuple):
    """Everything that changes while a DQN trains.

    Attributes:
      learner: parameters, target parameters, optimizer.
      env_state: of all environments.
      observation: what the agent sees now.
      window: the last ``n_step`` steps of each environment.
      replay: the buffer of :class:`Transition`.
      running_return: of each environment's episode so far.
      last_return: of each environment's last finished episode; 0 before the first.
      iteration: finished iterations.
    """

    learner: LearnerState
    env_state: PyTree
    observation: Array
    window: StepRecord
    replay: ReplayState
    running_return: Float[Array, " envs"]
    last_return: Float[Array, " envs"]
    iteration: Int[Array, ""]


def _check(config: DQNConfig) -> None:
    for name in ("num_envs", "buffer_size", "batch_size", "n_step", "target_period", "epsilon_steps", "iterations"):
        check_count(name, getattr(config, name))
    check_count("min_history", config.min_history, 0, config.buffer_size)
    for name in ("gamma", "epsilon_start", "epsilon_end"):
        check_range(name, getattr(config, name), 0.0, 1.0)
    if config.buffer_size < config.num_envs:
        raise ValueError(f"buffer_size must be at least num_envs = {config.num_envs}, got {config.buffer_size}")


def epsilon_greedy(key: PRNGKeyArray, q: Float[Array, "batch actions"], epsilon: Array | float) -> Int[Array, " batch"]:
    """The best action of each row, or with a probability any one.

    Args:
      key: a random key.
      q: values of the actions.
      epsilon: the probability.

    Returns:
      Integers; of equal values the first is best.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import epsilon_greedy
      >>> epsilon_greedy(jax.random.key(0), jnp.array([[0.0, 2.0, 1.0]]), 0.0).tolist()
      [1]
    """
    coin_key, action_key = jax.random.split(key)
    anything = jax.random.randint(action_key, q.shape[:-1], 0, q.shape[-1])
    return jnp.where(jax.random.bernoulli(coin_key, epsilon, q.shape[:-1]), anything, jnp.argmax(q, axis=-1))


def dqn(
    env: Environment,
    net: nn.Module,
    transform: ValueTransform,
    optimizer: optax.GradientTransformation,
    config: DQNConfig = DQNConfig(),  # noqa: B008, an immutable value
) -> Algorithm:
    r"""Deep Q-learning as an algorithm: acting, remembering and learning in one ``lax.scan``.

    One iteration steps all environments with $\epsilon$-greedy actions, writes their transitions into the ring buffer
    and makes one update by the loss of ``transform``: cross-entropy for ``hl_gauss``, ``two_hot`` and ``c51``, the
    squared error for ``scalar``. Targets stop at ``terminated``; an episode that was ``truncated`` still has a future,
    seen from its true last observation. :func:`over_seeds` trains several seeds at once.

    Args:
      env: an environment.
      net: a module from observations ``[batch, ...]`` to outputs ``[batch, actions, transform.num_outputs]``, such as
        :class:`poise.nets.ValueMLP`.
      transform: what the outputs mean.
      optimizer: an optax transformation.
      config: all numbers.

    Returns:
      An algorithm with state :class:`DQNState` that needs no data: its batch is ``()``. Metrics are means over the
      step's iterations: ``loss``, ``td_loss``, ``q_max`` (the greatest value of a next state, of
      those that go on, by the network that chooses the target's action), ``target_mean``,
      ``target_not_finite`` and, with a support, ``target_out_of_support``, ``target_entropy`` and ``excess_loss``
      (cross-entropy minus entropy), all over the updates made (0 if none was); ``return_mean``, over the episodes that
      finished, or their last returns if none did; ``episodes``, how many did; ``epsilon``, ``env_steps``, at the end.

    Raises:
      TypeError: if a count is no integer.
      ValueError: if a number is out of range.

    Example:
      >>> import jax, optax
      >>> from poise.nets import ValueMLP
      >>> from poise.rl import DQNConfig, catch, dqn, hl_gauss
      >>> transform = hl_gauss(-1.5, 1.5, 21)
      >>> net = ValueMLP(3, transform.num_outputs, (16,))
      >>> agent = dqn(catch(), net, transform, optax.adam(1e-3), DQNConfig(num_envs=4, min_history=0))
      >>> state = jax.eval_shape(agent.init, jax.random.key(0), ())
      >>> state, metrics = jax.eval_shape(agent.step, state, (), jax.random.key(1))  # jax.jit computes it
      >>> state.replay.data.observation.shape, metrics["loss"].shape
      ((50000, 10, 5), ())

    References:
      Mnih et al., Human-level control through deep reinforcement learning, Nature 2015; Farebrother et al., Stop
      Regressing, https://arxiv.org/abs/2403.03950.
    """
    _check(config)
    update = make_update(net, transform, optimizer, double=config.double, target_period=config.target_period)

    def init(key: PRNGKeyArray, batch: Batch) -> DQNState:
        del batch
        net_key, env_key = jax.random.split(key)
        env_state, observation = jax.vmap(env.reset)(jax.random.split(env_key, config.num_envs))
        params = cast(Any, net).init(net_key, observation[:1])
        learner = LearnerState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))
        zero, no = jnp.zeros((config.num_envs,)), jnp.zeros((config.num_envs,), bool)
        record = StepRecord(observation, zero.astype(jnp.int32), zero, no, no, observation)
        window = jax.tree.map(lambda leaf: jnp.zeros((config.n_step, *leaf.shape), leaf.dtype), record)
        item = jax.tree.map(lambda leaf: leaf[0], n_step_transition(window, config.gamma))
        replay = replay_init(item, config.buffer_size)
        return DQNState(learner, env_state, observation, window, replay, zero, zero, jnp.zeros((), jnp.int32))

    def epsilon_at(iteration):
        progress = jnp.clip(iteration.astype(jnp.float32) * config.num_envs / config.epsilon_steps, 0, 1)
        return config.epsilon_start + progress * (config.epsilon_end - config.epsilon_start)

    def iterate(state: DQNState, key: PRNGKeyArray) -> tuple[DQNState, dict[str, Array]]:
        act_key, env_key, sample_key = jax.random.split(key, 3)
        q = q_values(net, transform, state.learner.params, state.observation)
        action = epsilon_greedy(act_key, q, epsilon_at(state.iteration))
        step_keys = jax.random.split(env_key, config.num_envs)
        env_state, observation, out = jax.vmap(step_or_reset, in_axes=(None, 0, 0, 0))(
            env, step_keys, state.env_state, action
        )
        record = StepRecord(state.observation, action, out.reward, out.terminated, out.truncated, out.observation)
        window = push_step(state.window, record)
        full = state.iteration >= config.n_step - 1
        replay = replay_add(state.replay, n_step_transition(window, config.gamma), full)

        ready = (replay.size >= config.min_history) & (replay.size > 0)
        learner, metrics = update(state.learner, replay_sample(replay, sample_key, config.batch_size))
        learner = jax.tree.map(lambda new, old: jnp.where(ready, new, old), learner, state.learner)
        metrics = {name: jnp.where(ready, value, 0) for name, value in metrics.items()}

        done = out.terminated | out.truncated
        total = state.running_return + out.reward
        metrics |= {
            "updates": ready.astype(jnp.float32),
            "episodes": jnp.sum(done).astype(jnp.float32),
            "finished_return": jnp.sum(jnp.where(done, total, 0)),
        }
        new = DQNState(
            learner,
            env_state,
            observation,
            window,
            replay,
            jnp.where(done, 0, total),
            jnp.where(done, total, state.last_return),
            state.iteration + 1,
        )
        return new, metrics

    def step(state: DQNState, batch: Batch, key: PRNGKeyArray) -> tuple[DQNState, Metrics]:
        del batch
        state, history = jax.lax.scan(iterate, state, jax.random.split(key, config.iterations))
        updates, episodes, finished = (jnp.sum(history.pop(n)) for n in ("updates", "episodes", "finished_return"))
        metrics = {name: jnp.sum(values) / jnp.maximum(updates, 1) for name, values in history.items()}
        metrics |= {
            "return_mean": jnp.where(episodes > 0, finished / jnp.maximum(episodes, 1), jnp.mean(state.last_return)),
            "episodes": episodes,
            "epsilon": epsilon_at(state.iteration),
            "env_steps": (state.iteration * config.num_envs).astype(jnp.float32),
        }
        return state, metrics

    return Algorithm(init, step)


def replay_dataset(state: DQNState) -> Transition:
    """The transitions that a finished run holds, as a data set for :func:`cql`; not under ``jit``.

    Args:
      state: a state of :func:`dqn`, of one seed.

    Returns:
      Transitions ``[size, ...]``.

    Raises:
      ValueError: if there are none.

    Example:
      >>> import jax, optax
      >>> from poise.nets import ValueMLP
      >>> from poise.rl import DQNConfig, catch, dqn, replay_dataset, scalar
      >>> config = DQNConfig(num_envs=2, buffer_size=8, iterations=3, min_history=8)
      >>> agent = dqn(catch(), ValueMLP(3, 1, (4,)), scalar(), optax.sgd(0.1), config)
      >>> state, _ = jax.jit(agent.step)(agent.init(jax.random.key(0), ()), (), jax.random.key(1))
      >>> replay_dataset(state).observation.shape
      (6, 10, 5)
    """
    size = int(state.replay.size)
    if size < 1:
        raise ValueError("state must hold transitions, got an empty replay buffer")
    return jax.tree.map(lambda leaf: leaf[:size], state.replay.data)
