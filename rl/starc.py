"""Distances between rewards: STARC's standardized canonical forms, and EPIC's Pearson distance."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from poise.core.arguments import check_choice
from poise.core.arrays import at_least_float32
from poise.rl.canonicalization import (
    canonicalize_dard,
    canonicalize_epic,
    canonicalize_minimal,
    canonicalize_minimal_potential,
    canonicalize_val,
    canonicalize_value_potential,
)
from poise.rl.mdp import MDP, check_distribution, check_mdp

Order = int | float | str

_ORDERS = {"1": 1.0, "2": 2.0, "inf": np.inf}

CANONICALIZATIONS: dict[str, Callable[[Array, MDP], Array]] = {
    "val": canonicalize_val,
    "minimal": canonicalize_minimal,
    "minimal_weighted": lambda reward, mdp: canonicalize_minimal(reward, mdp, weighted=True),
    "epic": canonicalize_epic,
    "dard": canonicalize_dard,
    "value_potential": canonicalize_value_potential,
    "minimal_potential": canonicalize_minimal_potential,
    "none": lambda reward, mdp: at_least_float32(reward),
}


def _parse(name: str, order: Order) -> tuple[float, bool]:
    """The exponent, and whether entries are weighted by their transition's probability."""
    if isinstance(order, str):
        kind = order.removeprefix("weighted_")
        if kind in _ORDERS:
            return _ORDERS[kind], order.startswith("weighted_")
    elif order in _ORDERS.values():
        return float(order), False
    raise ValueError(f"{name} must be 1, 2, inf or one of these as a word, plain or with 'weighted_', got {order!r}")


def reward_norm(
    reward: Float[Array, "states actions next"],
    order: int | float | str = 2,
    weights: Float[Array, "s a t"] | None = None,
) -> Float[Array, ""]:
    r"""A norm over all transitions: $\big(\sum w|R|^p\big)^{1/p}$, or $\max w|R|$ for $p=\infty$.

    Args:
      reward: $R[s,a,t]$.
      order: $p$: 1, 2 or infinity, as a number or a word.
      weights: $w$, usually the transition probabilities; None for 1.

    Returns:
      The norm, in the dtype of ``reward`` (float32 for bfloat16 and float16); its gradient at zero is zero.

    Raises:
      ValueError: for another order, or weights of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import reward_norm
      >>> reward = jnp.array([[[3.0, -4.0]]])
      >>> [float(reward_norm(reward, order)) for order in (1, 2, "inf")]
      [7.0, 5.0, 4.0]

    References:
      Skalse et al., STARC, https://arxiv.org/abs/2309.15257.
    """
    p, weighted = _parse("order", order)
    if weighted:
        raise ValueError(f"order must not be weighted here, where weights are an argument, got {order!r}")
    size = jnp.abs(at_least_float32(reward))
    if weights is not None and weights.shape != reward.shape:
        raise ValueError(f"weights must have shape {reward.shape}, got {weights.shape}")
    w = 1 if weights is None else jnp.asarray(weights, size.dtype)
    if p == np.inf:
        return jnp.max(w * size)
    if p == 1:
        return jnp.sum(w * size)
    # Scaled, so that squares of tiny and huge rewards are none.
    top = jnp.max(size)
    zero = top == 0
    total = jnp.sum(w * jnp.square(size / jnp.where(zero, 1, top)))
    return jnp.where(total == 0, 0, top * jnp.sqrt(jnp.where(total == 0, 1, total)))


def _norm_of(name: str, order: Order, mdp: MDP) -> Callable[[Array], Array]:
    p, weighted = _parse(name, order)
    return lambda reward: reward_norm(reward, p, mdp.transition if weighted else None)


def standardize(
    reward: Float[Array, "states actions next"],
    mdp: MDP,
    canonicalization: str | Callable[[Array, MDP], Array] = "val",
    norm: int | float | str = 2,
) -> Float[Array, "states actions next"]:
    r"""A reward's canonical form at norm 1, $s(R) = c(R)/n(c(R))$; zero for a trivial reward.

    A reward is trivial if nothing but rounding is left of it: $n(c(R)) \le \epsilon\,n(R)$ with
    $\epsilon = 10^{-5}$ in float32 and $10^{-10}$ in float64.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.
      canonicalization: ``val``, ``minimal``, ``minimal_weighted``, ``epic``, ``dard``, ``value_potential``,
        ``minimal_potential``, ``none``, or a function ``(reward, mdp) -> reward``.
      norm: $n$: 1, 2 or inf, or ``weighted_1``, ``weighted_2``, ``weighted_inf`` by the transitions' probabilities.

    Returns:
      $s(R)$, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: for an unknown name, an environment that is none, or shapes that don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, standardize
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> standardize(jnp.array([[[1.0], [3.0]]]), mdp, norm="inf").tolist()
      [[[-1.0], [1.0]]]
      >>> standardize(jnp.array([[[3.0], [3.0]]]), mdp).tolist()
      [[[0.0], [0.0]]]

    References:
      Skalse et al., STARC, https://arxiv.org/abs/2309.15257.
    """
    check_mdp(mdp, reward=reward)
    if not callable(canonicalization):
        check_choice("canonicalization", canonicalization, CANONICALIZATIONS)
        canonicalization = CANONICALIZATIONS[canonicalization]
    size_of = _norm_of("norm", norm, mdp)
    canonical = canonicalization(reward, mdp)
    size = size_of(canonical)
    tolerance = 1e-10 if canonical.dtype == jnp.float64 else 1e-5
    trivial = ~(size > tolerance * size_of(at_least_float32(reward)))
    return jnp.where(trivial, 0, canonical / jnp.where(trivial, 1, size))


def starc_distance(
    reward_1: Float[Array, "states actions next"],
    reward_2: Float[Array, "s a t"],
    mdp: MDP,
    canonicalization: str | Callable[[Array, MDP], Array] = "val",
    norm: int | float | str = 2,
    metric: int | float | str = 2,
) -> Float[Array, ""]:
    r"""How differently two rewards rank policies in an environment, $d(R_1,R_2) = m(s(R_1) - s(R_2))$.

    0 for rewards that differ by a positive factor, shaping and redistribution; with one norm used twice, 2 for a
    reward and its negative, and 1 for a trivial and another one. With ``val`` or ``minimal`` it bounds the regret of
    optimizing one reward and being judged by the other from above and below.

    Args:
      reward_1: $R_1[s,a,t]$.
      reward_2: $R_2[s,a,t]$.
      mdp: the environment.
      canonicalization: as in :func:`standardize`.
      norm: $n$, see there.
      metric: $m$, of the same choices.

    Returns:
      The distance, in the wider dtype of the rewards, at least float32.

    Raises:
      ValueError: for an unknown name, an environment that is none, or shapes that don't fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.rl import potential_shaping, random_mdp, random_reward, starc_distance
      >>> mdp = random_mdp(jax.random.key(0), 5, 3)
      >>> reward = random_reward(jax.random.key(1), mdp)
      >>> same = potential_shaping(3 * reward, jnp.arange(5.0), mdp.discount)
      >>> float(starc_distance(reward, same, mdp)) < 1e-4
      True
      >>> f"{starc_distance(reward, -reward, mdp):.3f}"
      '2.000'

    References:
      Skalse et al., STARC: A General Framework For Quantifying Differences Between Reward Functions,
      https://arxiv.org/abs/2309.15257.
    """
    check_mdp(mdp, reward_1=reward_1, reward_2=reward_2)
    first = standardize(reward_1, mdp, canonicalization, norm)
    second = standardize(reward_2, mdp, canonicalization, norm)
    return _norm_of("metric", metric, mdp)(first - second)


def epic_distance(
    reward_1: Float[Array, "states actions next"],
    reward_2: Float[Array, "s a t"],
    mdp: MDP,
    state_dist: Float[Array, " d"] | None = None,
    action_dist: Float[Array, " e"] | None = None,
    coverage: Float[Array, "x y z"] | None = None,
) -> Float[Array, ""]:
    r"""EPIC's distance, $\sqrt{(1-\rho)/2}$ with $\rho$ Pearson's correlation of the canonical rewards.

    Computed as half the $L_2(D)$ distance of the centered canonical rewards at norm 1, which is the same and keeps its
    digits near 0. A trivial reward is at distance 1/2 from others.

    Args:
      reward_1: $R_1[s,a,t]$.
      reward_2: $R_2[s,a,t]$.
      mdp: the environment, of which the discount counts.
      state_dist: as in :func:`canonicalize_epic`.
      action_dist: see there.
      coverage: $D[s,a,t]$, sums to 1 over all transitions; None for the product of the distributions.

    Returns:
      A number in $[0, 1]$, in the wider dtype of the rewards, at least float32.

    Raises:
      ValueError: if the environment or a distribution is none, or the shapes don't fit.

    Example:
      >>> import jax
      >>> from poise.rl import epic_distance, random_mdp, random_reward
      >>> mdp = random_mdp(jax.random.key(0), 5, 3)
      >>> reward = random_reward(jax.random.key(1), mdp)
      >>> f"{epic_distance(reward, -reward, mdp):.3f}", f"{epic_distance(reward, 2 * reward, mdp):.3f}"
      ('1.000', '0.000')

    References:
      Gleave et al., Quantifying Differences in Reward Functions, https://arxiv.org/abs/2006.13900.
    """
    check_mdp(mdp, reward_1=reward_1, reward_2=reward_2)
    states, actions, _ = reward_1.shape
    dtype = jnp.promote_types(jnp.result_type(reward_1, reward_2), jnp.float32)
    if coverage is None:
        d_s = jnp.full((states,), 1 / states, dtype) if state_dist is None else jnp.asarray(state_dist, dtype)
        d_a = jnp.full((actions,), 1 / actions, dtype) if action_dist is None else jnp.asarray(action_dist, dtype)
        if d_s.shape != (states,) or d_a.shape != (actions,):
            raise ValueError(
                f"state_dist and action_dist must have shapes {(states,)} and {(actions,)}, "
                f"got {d_s.shape} and {d_a.shape}"
            )
        weights = d_s[:, None, None] * d_a[:, None] * d_s
    else:
        if coverage.shape != reward_1.shape:
            raise ValueError(f"coverage must have shape {reward_1.shape}, got {coverage.shape}")
        check_distribution("coverage", coverage.reshape(-1), (coverage.size,))
        weights = jnp.asarray(coverage, dtype)

    def unit(reward):
        canonical = canonicalize_epic(jnp.asarray(reward, dtype), mdp, state_dist, action_dist)
        centered = canonical - jnp.sum(weights * canonical)
        size = reward_norm(centered, 2, weights)
        trivial = ~(size > (1e-10 if dtype == jnp.float64 else 1e-5) * reward_norm(reward, 2, weights))
        return jnp.where(trivial, 0, centered / jnp.where(trivial, 1, size))

    return reward_norm(unit(reward_1) - unit(reward_2), 2, weights) / 2
