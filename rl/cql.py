"""Conservative Q-learning: offline, from a data set of transitions."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray

from poise.core import Algorithm, Batch, Metrics
from poise.core.arguments import check_count, check_range
from poise.rl.td_learner import LearnerState, make_update
from poise.rl.value_transform import ValueTransform


class CQLConfig(NamedTuple):
    """How an offline agent learns.

    Attributes:
      batch_size: transitions of one update.
      double: whether the online network chooses the next action.
      target_period: updates between copies to the target network.
      conservative_weight: the weight of :func:`conservative_penalty`; 0 is plain offline Q-learning.
      td_weight: the weight of the temporal-difference loss.
      iterations: updates of one ``step`` of the algorithm.
    """

    batch_size: int = 64
    double: bool = True
    target_period: int = 2_000
    conservative_weight: float | int = 0.1
    td_weight: float | int = 1.0
    iterations: int = 100


def cql(
    net: nn.Module,
    transform: ValueTransform,
    optimizer: optax.GradientTransformation,
    config: CQLConfig = CQLConfig(),  # noqa: B008, an immutable value
) -> Algorithm:
    r"""Conservative Q-learning as an algorithm on a data set that stays on the device.

    Each update lowers $w_\text{td}\,L(Q(s,a), y) + \alpha\,(\log\sum_{a'}e^{Q(s,a')} - Q(s,a))$ on transitions drawn
    uniformly, with the loss $L$ and the read-out $Q$ of ``transform``.

    Args:
      net: as in :func:`dqn`.
      transform: what its outputs mean.
      optimizer: an optax transformation.
      config: all numbers.

    Returns:
      An algorithm with state :class:`LearnerState`. Its batch is the *whole* data set, a :class:`Transition` of arrays
      ``[size, ...]`` as :func:`replay_dataset` gives it. The metrics are those of :func:`dqn` that concern learning,
      and ``conservative_penalty``.

    Raises:
      TypeError: if a count is no integer.
      ValueError: if a number is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.nets import ValueMLP
      >>> from poise.rl import Transition, cql, hl_gauss
      >>> transform = hl_gauss(-1.5, 1.5, 21)
      >>> agent = cql(ValueMLP(3, transform.num_outputs, (16,)), transform, optax.adam(1e-3))
      >>> x, zero = jnp.zeros((100, 10, 5)), jnp.zeros(100)
      >>> data = Transition(x, jnp.zeros(100, int), zero, zero, x)
      >>> state = jax.eval_shape(agent.init, jax.random.key(0), data)
      >>> state, metrics = jax.eval_shape(agent.step, state, data, jax.random.key(1))  # jax.jit computes it
      >>> "conservative_penalty" in metrics
      True

    References:
      Kumar et al., Conservative Q-Learning, https://arxiv.org/abs/2006.04779; Farebrother et al., Stop Regressing,
      https://arxiv.org/abs/2403.03950, whose code's settings are the defaults.
    """
    for name in ("batch_size", "target_period", "iterations"):
        check_count(name, getattr(config, name))
    for name in ("conservative_weight", "td_weight"):
        check_range(name, getattr(config, name), 0.0, open_high=True)
    update = make_update(
        net,
        transform,
        optimizer,
        double=config.double,
        target_period=config.target_period,
        conservative_weight=config.conservative_weight,
        td_weight=config.td_weight,
    )

    def init(key: PRNGKeyArray, batch: Batch) -> LearnerState:
        params = cast(Any, net).init(key, batch.observation[:1])
        return LearnerState(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def step(state: LearnerState, batch: Batch, key: PRNGKeyArray) -> tuple[LearnerState, Metrics]:
        def iterate(state, key):
            index = jax.random.randint(key, (config.batch_size,), 0, len(batch.reward))
            return update(state, jax.tree.map(lambda leaf: leaf[index], batch))

        state, history = jax.lax.scan(iterate, state, jax.random.split(key, config.iterations))
        return state, jax.tree.map(jnp.mean, history)

    return Algorithm(init, step)
