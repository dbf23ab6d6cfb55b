"""Scalar targets of value learning, and the penalty that keeps offline values low."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from poise.core.arrays import at_least_float32


def _check_actions(name: str, action: Array, q: Array) -> None:
    if not jnp.issubdtype(action.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {action.dtype}")
    if action.shape != q.shape[:-1]:
        raise ValueError(f"{name} must have the shape {q.shape[:-1]} of the batch, got {action.shape}")


def take_action(q: Array, action: Array) -> Array:
    """The entry of each row that belongs to an action."""
    return jnp.take_along_axis(q, action[..., None], axis=-1)[..., 0]


def _bootstrap(reward: Array, discount: Array, value: Array) -> Array:
    """Reward plus discounted value; where the discount is 0 the value is not looked at, be it NaN."""
    if not reward.shape == discount.shape == value.shape:
        raise ValueError(
            f"reward, discount and the batch of q_next must have one shape, "
            f"got {reward.shape}, {discount.shape} and {value.shape}"
        )
    dtype = jnp.promote_types(jnp.result_type(reward, value), jnp.float32)
    discount = discount.astype(dtype)
    after = jnp.where(discount == 0, 0, discount * jnp.where(discount == 0, 0, value.astype(dtype)))
    return jax.lax.stop_gradient(reward.astype(dtype) + after)


def q_learning_target(
    reward: Float[Array, "*batch"],
    discount: Float[Array, "*discounts"],
    q_next: Float[Array, "*next actions"],
    q_next_selector: Float[Array, "*selector choices"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The target of Q-learning, $y = r + \gamma\,Q(s', \arg\max_a S(s', a))$, without a gradient.

    With $S = Q$, the target network, this is DQN; with $S$ the online network, double DQN.

    Args:
      reward: $r$, or a sum of $n$ discounted ones.
      discount: $\gamma^n(1-\text{terminated})$. An episode that was cut short by a time limit is not terminated.
      q_next: $Q(s', \cdot)$ of the target network, actions last.
      q_next_selector: $S(s', \cdot)$, the values that choose the action; None for ``q_next``.

    Returns:
      The targets, in the wider dtype of ``reward`` and ``q_next``, at least float32.

    Raises:
      ValueError: if the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import q_learning_target
      >>> reward, discount = jnp.array([1.0, 1.0]), jnp.array([0.5, 0.0])
      >>> q_next = jnp.array([[2.0, 4.0], [9.0, 9.0]])
      >>> q_learning_target(reward, discount, q_next).tolist()
      [3.0, 1.0]
      >>> q_learning_target(reward, discount, q_next, -q_next).tolist()
      [2.0, 1.0]

    References:
      Mnih et al., Human-level control through deep reinforcement learning, Nature 2015; van Hasselt, Guez, Silver,
      Deep Reinforcement Learning with Double Q-learning, https://arxiv.org/abs/1509.06461.
    """
    selector = q_next if q_next_selector is None else q_next_selector
    if selector.shape != q_next.shape:
        raise ValueError(f"q_next_selector must have the shape {q_next.shape} of q_next, got {selector.shape}")
    return _bootstrap(reward, discount, take_action(q_next, jnp.argmax(selector, axis=-1)))


def sarsa_target(
    reward: Float[Array, "*batch"],
    discount: Float[Array, "*discounts"],
    q_next: Float[Array, "*next actions"],
    next_action: Shaped[Array, "*action"],
) -> Float[Array, "*batch"]:
    r"""The target of SARSA, $y = r + \gamma\,Q(s', a')$ with the action that was taken, without a gradient.

    Args:
      reward: $r$.
      discount: $\gamma(1-\text{terminated})$.
      q_next: $Q(s', \cdot)$, actions last.
      next_action: $a'$, integers.

    Returns:
      The targets, in the wider dtype of ``reward`` and ``q_next``, at least float32.

    Raises:
      TypeError: if the actions are no integers.
      ValueError: if the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import sarsa_target
      >>> sarsa_target(jnp.array([1.0]), jnp.array([0.5]), jnp.array([[2.0, 4.0]]), jnp.array([0])).tolist()
      [2.0]
    """
    _check_actions("next_action", next_action, q_next)
    return _bootstrap(reward, discount, take_action(q_next, next_action))


def conservative_penalty(q: Float[Array, "*batch actions"], action: Shaped[Array, "*action"]) -> Float[Array, "*batch"]:
    r"""What conservative Q-learning adds to its loss, $\log\sum_a e^{Q(s,a)} - Q(s, a_\text{data})$.

    Never negative, and 0 only where softmax($Q$) is certain of the action of the data; its gradient is
    $\mathrm{softmax}(Q)$ minus the one-hot action.

    Args:
      q: $Q(s, \cdot)$ at the *current* state, actions last.
      action: the action of the data, integers.

    Returns:
      The penalty of each example, in the dtype of ``q`` (float32 for bfloat16 and float16).

    Raises:
      TypeError: if the actions are no integers.
      ValueError: if the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import conservative_penalty
      >>> penalty = conservative_penalty(jnp.zeros((1, 2)), jnp.array([0]))
      >>> f"{penalty[0]:.4f}"  # log 2
      '0.6931'

    References:
      Kumar et al., Conservative Q-Learning for Offline Reinforcement Learning, https://arxiv.org/abs/2006.04779.
      Farebrother et al., https://arxiv.org/abs/2403.03950, print the next state in the first term; their code takes
      the current one, as is done here.
    """
    _check_actions("action", action, q)
    q = at_least_float32(q)
    return jax.nn.logsumexp(q, axis=-1) - take_action(q, action)
