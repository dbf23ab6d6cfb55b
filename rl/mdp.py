"""Finite Markov decision processes: exact values, optimal policies, regret, and random ones to compare rewards on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from poise.core.arguments import check_count, check_range, concrete
from poise.core.arrays import at_least_float32


class MDP(NamedTuple):
    r"""A finite environment without a reward.

    Attributes:
      transition: $\tau[s,a,t]$, the probability of state $t$ after action $a$ in state $s$.
      discount: $\gamma$ in $[0, 1)$.
      initial: the distribution of the first state.
    """

    transition: Float[Array, "*batch states actions next"]
    discount: ArrayLike
    initial: Float[Array, "*batch states"]


def check_distribution(name: str, probs: Array, shape: tuple[int, ...]) -> None:
    """Raises unless an array has the shape and, where it can be looked at, its last axis holds distributions."""
    if probs.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {probs.shape}")
    values = concrete(probs)
    if values is None:
        return
    values = values.astype(np.float64)
    error = np.abs(values.sum(-1) - 1).max()
    if not (values.min() >= 0 and error < 1e-4):
        raise ValueError(f"{name} must be nonnegative and sum to 1 over its last axis, got sums off by {error:g}")


def check_mdp(mdp: MDP, **rewards: Array) -> None:
    """Raises unless an environment is one and the rewards fit it."""
    shape = mdp.transition.shape
    if len(shape) != 3 or shape[0] != shape[2]:
        raise ValueError(f"transition must have shape [states, actions, states], got {shape}")
    check_distribution("transition", mdp.transition, shape)
    check_distribution("initial", mdp.initial, shape[:1])
    check_range("discount", mdp.discount, 0.0, 1.0, open_high=True)
    for name, reward in rewards.items():
        if reward.shape != shape:
            raise ValueError(f"{name} must have shape {shape} [states, actions, states], got {reward.shape}")


def uniform_policy(mdp: MDP, dtype: jnp.dtype) -> Array:
    """Every action alike in every state."""
    states, actions, _ = mdp.transition.shape
    return jnp.full((states, actions), 1 / actions, dtype)


def potential_shaping(
    reward: Float[Array, "states actions next"], potential: Float[Array, " potentials"], discount: ArrayLike
) -> Float[Array, "states actions next"]:
    r"""Adds a potential's differences, $R(s,a,t) + \gamma\Phi(t) - \Phi(s)$, which change no policy's rank.

    Args:
      reward: $R$.
      potential: $\Phi$, one number for each state.
      discount: $\gamma$ in $[0, 1)$.

    Returns:
      The shaped reward, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the discount is out of range or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import potential_shaping
      >>> potential_shaping(jnp.zeros((2, 1, 2)), jnp.array([1.0, 2.0]), 0.5)[:, 0].tolist()
      [[-0.5, 0.0], [-1.5, -1.0]]

    References:
      Ng, Harada, Russell, Policy invariance under reward transformations, ICML 1999.
    """
    check_range("discount", discount, 0.0, 1.0, open_high=True)
    if potential.shape != reward.shape[:1]:
        raise ValueError(f"potential must have shape {reward.shape[:1]}, got {potential.shape}")
    reward = at_least_float32(reward)
    potential = jnp.asarray(potential, reward.dtype)
    return reward + jnp.asarray(discount, reward.dtype) * potential - potential[:, None, None]


def expected_reward(mdp: MDP, reward: Array) -> Array:
    r"""What an action gives on average, $\bar r[s,a] = \sum_t\tau R$."""
    return jnp.sum(jnp.asarray(mdp.transition, reward.dtype) * reward, axis=-1)


def _value(mdp: MDP, reward: Array, policy: Array) -> Array:
    """The policy's value by one linear solve."""
    transition = jnp.asarray(mdp.transition, reward.dtype)
    under_policy = jnp.einsum("sa,sat->st", policy, transition, precision="highest")
    system = jnp.eye(len(policy), dtype=reward.dtype) - jnp.asarray(mdp.discount, reward.dtype) * under_policy
    return jnp.linalg.solve(system, jnp.sum(policy * expected_reward(mdp, reward), axis=-1))


def policy_value(
    mdp: MDP, reward: Float[Array, "states actions next"], policy: Float[Array, "rows columns"] | None = None
) -> Float[Array, " states"]:
    r"""The value of a policy in every state, exactly: $V = (I-\gamma P_\pi)^{-1}r_\pi$.

    Args:
      mdp: the environment.
      reward: $R[s,a,t]$.
      policy: $\pi[s,a]$; None for the uniform one.

    Returns:
      $V$, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the environment or the policy is none, or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, policy_value
      >>> mdp = MDP(jnp.ones((1, 1, 1)), 0.5, jnp.ones(1))
      >>> policy_value(mdp, jnp.ones((1, 1, 1))).tolist()
      [2.0]
    """
    check_mdp(mdp, reward=reward)
    reward = at_least_float32(reward)
    if policy is None:
        policy = uniform_policy(mdp, reward.dtype)
    check_distribution("policy", policy, reward.shape[:2])
    return _value(mdp, reward, jnp.asarray(policy, reward.dtype))


def policy_return(
    mdp: MDP, reward: Float[Array, "states actions next"], policy: Float[Array, "rows columns"] | None = None
) -> Float[Array, ""]:
    r"""The expected discounted return $J_R(\pi) = \sum_s\mu_0(s)V(s)$.

    Args:
      mdp: the environment.
      reward: $R[s,a,t]$.
      policy: $\pi[s,a]$; None for the uniform one.

    Returns:
      The return, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: as :func:`policy_value`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, policy_return
      >>> mdp = MDP(jnp.ones((1, 1, 1)), 0.5, jnp.ones(1))
      >>> float(policy_return(mdp, jnp.ones((1, 1, 1))))
      2.0
    """
    value = policy_value(mdp, reward, policy)
    return jnp.sum(jnp.asarray(mdp.initial, value.dtype) * value)


def optimal_policy(mdp: MDP, reward: Float[Array, "states actions next"]) -> Float[Array, "states actions"]:
    r"""A deterministic policy with the greatest value in every state, by policy iteration.

    An action is changed only for one that is better by more than rounding, so that the iteration ends.

    Args:
      mdp: the environment.
      reward: $R[s,a,t]$.

    Returns:
      $\pi[s,a]$, one-hot rows, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: as :func:`policy_value`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, optimal_policy
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> optimal_policy(mdp, jnp.array([[[1.0], [2.0]]])).tolist()
      [[0.0, 1.0]]
    """
    check_mdp(mdp, reward=reward)
    reward = at_least_float32(reward)
    mean = expected_reward(mdp, reward)
    states, actions = mean.shape
    transition, discount = jnp.asarray(mdp.transition, reward.dtype), jnp.asarray(mdp.discount, reward.dtype)

    def improve(carry):
        action, _, count = carry
        value = _value(mdp, reward, jax.nn.one_hot(action, actions, dtype=reward.dtype))
        q = mean + discount * jnp.einsum("sat,t->sa", transition, value, precision="highest")
        own = jnp.take_along_axis(q, action[:, None], axis=1)[:, 0]
        slack = 50 * jnp.finfo(q.dtype).eps * jnp.max(jnp.abs(q))
        better = jnp.where(jnp.max(q, axis=1) > own + slack, jnp.argmax(q, axis=1), action)
        return better, jnp.any(better != action), count + 1

    start = (jnp.argmax(mean, axis=1), jnp.array(True), jnp.array(0))
    limit = 10 + states * actions
    action, _, _ = jax.lax.while_loop(lambda carry: carry[1] & (carry[2] < limit), improve, start)
    return jax.nn.one_hot(action, actions, dtype=reward.dtype)


def normalized_regret(
    mdp: MDP, reward: Float[Array, "states actions next"], policy: Float[Array, "rows columns"]
) -> Float[Array, ""]:
    r"""What a policy loses, $(\max_{\pi'} J - J(\pi))/(\max_{\pi'}J - \min_{\pi'}J)$.

    Args:
      mdp: the environment.
      reward: $R[s,a,t]$.
      policy: $\pi[s,a]$.

    Returns:
      A number in $[0, 1]$; 0 if all policies have the same return, to rounding.

    Raises:
      ValueError: as :func:`policy_value`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, normalized_regret
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> float(normalized_regret(mdp, jnp.array([[[1.0], [2.0]]]), jnp.array([[0.25, 0.75]])))
      0.25
    """
    best = policy_return(mdp, reward, optimal_policy(mdp, reward))
    worst = policy_return(mdp, reward, optimal_policy(mdp, -reward))
    own = policy_return(mdp, reward, policy)
    span = best - worst
    flat = ~(span > 100 * jnp.finfo(span.dtype).eps * jnp.maximum(jnp.abs(best), jnp.abs(worst)))
    return jnp.where(flat, 0, jnp.clip((best - own) / jnp.where(flat, 1, span), 0, 1))


def random_mdp(
    key: PRNGKeyArray, num_states: int, num_actions: int, discount: ArrayLike = 0.95, threshold: float | int = 1.0
) -> MDP:
    r"""A random environment with sparse transitions.

    Logits are standard normal; those below ``threshold`` are removed, the greatest of each row excepted, and the rest
    goes through a softmax. The first state's distribution is a softmax of normal logits.

    Args:
      key: a random key.
      num_states: how many states there are.
      num_actions: how many actions there are.
      discount: $\gamma$ in $[0, 1)$.
      threshold: in standard deviations; $-\infty$ keeps all transitions.

    Returns:
      The environment, in JAX's default floating dtype.

    Raises:
      TypeError: if a number of states or actions is no integer.
      ValueError: if one is below 1 or the discount out of range.

    Example:
      >>> import jax
      >>> from poise.rl import random_mdp
      >>> mdp = random_mdp(jax.random.key(0), 5, 3)
      >>> mdp.transition.shape, bool((abs(mdp.transition.sum(-1) - 1) < 1e-6).all())
      ((5, 3, 5), True)

    References:
      Skalse et al., STARC, https://arxiv.org/abs/2309.15257, whose experiments draw 32 states and 4 actions so.
    """
    check_count("num_states", num_states)
    check_count("num_actions", num_actions)
    check_range("discount", discount, 0.0, 1.0, open_high=True)
    logits_key, initial_key = jax.random.split(key)
    logits = jax.random.normal(logits_key, (num_states, num_actions, num_states))
    kept = (logits >= threshold) | (logits == jnp.max(logits, axis=-1, keepdims=True))
    transition = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    return MDP(transition, discount, jax.nn.softmax(jax.random.normal(initial_key, (num_states,))))


def random_reward(key: PRNGKeyArray, mdp: MDP) -> Float[Array, "states actions next"]:
    r"""A random reward: normal, and each with probability one half sparse, scaled, shifted and shaped.

    Sparse ones keep a uniformly drawn share of their entries; scales are uniform on $[0.1, 10]$, shifts normal with
    standard deviation 3, potentials normal with a standard deviation uniform on $[0, 10]$.

    Args:
      key: a random key.
      mdp: the environment that gives shape, discount and dtype.

    Returns:
      $R[s,a,t]$.

    Raises:
      ValueError: if the environment is none.

    Example:
      >>> import jax
      >>> from poise.rl import random_mdp, random_reward
      >>> random_reward(jax.random.key(1), random_mdp(jax.random.key(0), 5, 3)).shape
      (5, 3, 5)
    """
    check_mdp(mdp)
    shape, dtype = mdp.transition.shape, mdp.transition.dtype
    keys = jax.random.split(key, 8)
    coins = jax.random.bernoulli(keys[0], 0.5, (4,))
    reward = jax.random.normal(keys[1], shape, dtype)
    kept = jax.random.bernoulli(keys[2], jax.random.uniform(keys[3], (), dtype), shape)
    reward = jnp.where(coins[0] & ~kept, 0, reward)
    reward *= jnp.where(coins[1], jax.random.uniform(keys[4], (), dtype, 0.1, 10.0), 1)
    reward += jnp.where(coins[2], 3 * jax.random.normal(keys[5], (), dtype), 0)
    strength = jnp.where(coins[3], jax.random.uniform(keys[6], (), dtype, 0.0, 10.0), 0)
    potential = strength * jax.random.normal(keys[7], shape[:1], dtype)
    return potential_shaping(reward, potential, mdp.discount)
