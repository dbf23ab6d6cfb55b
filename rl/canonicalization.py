"""Canonical forms of rewards: what is left once shaping and redistribution are taken away."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arrays import at_least_float32
from poise.rl.mdp import MDP, check_distribution, check_mdp, expected_reward, policy_value, potential_shaping


def _prepare(reward: Array, mdp: MDP) -> tuple[Array, Array, Array]:
    """Reward, transition and discount in one dtype."""
    check_mdp(mdp, reward=reward)
    reward = at_least_float32(reward)
    return reward, jnp.asarray(mdp.transition, reward.dtype), jnp.asarray(mdp.discount, reward.dtype)


def _distribution(name: str, probs: Array | None, size: int, dtype: jnp.dtype) -> Array:
    if probs is None:
        return jnp.full((size,), 1 / size, dtype)
    check_distribution(name, probs, (size,))
    return jnp.asarray(probs, dtype)


def canonicalize_val(
    reward: Float[Array, "states actions next"], mdp: MDP, policy: Float[Array, "rows columns"] | None = None
) -> Float[Array, "states actions next"]:
    r"""The advantage of a reference policy: $c(R)[s,a,t] = \sum_{t'}\tau[s,a,t'](R[s,a,t']+\gamma V(t')) - V(s)$.

    Constant in $t$. Potential shaping and redistribution over the next state leave it as it is, and the return of
    every policy under $c(R)$ is its return under $R$ minus that of the reference policy.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.
      policy: the reference policy $\pi[s,a]$; None for the uniform one.

    Returns:
      $c(R)$, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the environment or the policy is none, or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, canonicalize_val
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> canonicalize_val(jnp.array([[[1.0], [3.0]]]), mdp).tolist()
      [[[-1.0], [1.0]]]

    References:
      Skalse et al., STARC, https://arxiv.org/abs/2309.15257. The official code iterates the Bellman operator; here the
      value is solved for.
    """
    reward, transition, discount = _prepare(reward, mdp)
    value = policy_value(mdp, reward, policy)
    ahead = jnp.einsum("sat,t->sa", transition, value, precision="highest")
    advantage = expected_reward(mdp, reward) + discount * ahead - value[:, None]
    return jnp.broadcast_to(advantage[..., None], reward.shape)


def canonicalize_value_potential(
    reward: Float[Array, "states actions next"], mdp: MDP, policy: Float[Array, "rows columns"] | None = None
) -> Float[Array, "states actions next"]:
    r"""The reward shaped by a policy's value, $R + \gamma V(t) - V(s)$.

    Removes shaping but no redistribution, so it is no canonical form in the sense of STARC.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.
      policy: the reference policy; None for the uniform one.

    Returns:
      The shaped reward, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: as :func:`canonicalize_val`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, canonicalize_value_potential
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> canonicalize_value_potential(jnp.array([[[1.0], [3.0]]]), mdp).tolist()
      [[[-1.0], [1.0]]]
    """
    reward, _, discount = _prepare(reward, mdp)
    return potential_shaping(reward, policy_value(mdp, reward, policy), discount)


def canonicalize_epic(
    reward: Float[Array, "states actions next"],
    mdp: MDP,
    state_dist: Float[Array, " s"] | None = None,
    action_dist: Float[Array, " a"] | None = None,
) -> Float[Array, "states actions next"]:
    r"""EPIC's form, $R + \gamma E R(t,A,S') - E R(s,A,S') - \gamma E R(S,A,S')$ with independent $S, A, S'$.

    Knows nothing of the environment but the discount; removes shaping, and has mean 0 under the distributions.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.
      state_dist: of $S$ and $S'$; None for the uniform one.
      action_dist: of $A$; None for the uniform one.

    Returns:
      The canonical reward, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the environment or a distribution is none, or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, canonicalize_epic
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> canonicalize_epic(jnp.array([[[1.0], [3.0]]]), mdp).tolist()
      [[[-1.0], [1.0]]]

    References:
      Gleave et al., Quantifying Differences in Reward Functions, https://arxiv.org/abs/2006.13900.
    """
    reward, _, discount = _prepare(reward, mdp)
    states, actions, _ = reward.shape
    d_s = _distribution("state_dist", state_dist, states, reward.dtype)
    d_a = _distribution("action_dist", action_dist, actions, reward.dtype)
    mean = jnp.einsum("sat,a,t->s", reward, d_a, d_s, precision="highest")
    return potential_shaping(reward, mean, discount) - discount * jnp.sum(d_s * mean)


def canonicalize_dard(
    reward: Float[Array, "states actions next"], mdp: MDP, action_dist: Float[Array, " a"] | None = None
) -> Float[Array, "states actions next"]:
    r"""DARD's form, EPIC's with the environment's transitions in the place of independent states.

    $R + \gamma r_t - r_s - \gamma k[s,t]$ with $r_x = E_A\sum_u\tau[x,A,u]R[x,A,u]$ and
    $k[s,t] = E_A\sum_{u,v}\tau[s,A,u]\tau[t,A,v]R[u,A,v]$. Removes shaping, but is not idempotent.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.
      action_dist: of $A$; None for the uniform one.

    Returns:
      The canonical reward, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the environment or the distribution is none, or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, canonicalize_dard
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> canonicalize_dard(jnp.array([[[1.0], [3.0]]]), mdp).tolist()
      [[[-1.0], [1.0]]]

    References:
      Wulfe et al., Dynamics-Aware Comparison of Learned Reward Functions, https://arxiv.org/abs/2201.10081.
    """
    reward, transition, discount = _prepare(reward, mdp)
    d_a = _distribution("action_dist", action_dist, reward.shape[1], reward.dtype)
    mean = jnp.einsum("a,sa->s", d_a, expected_reward(mdp, reward), precision="highest")
    later = jnp.einsum("tav,uav->atu", transition, reward, precision="highest")
    both = jnp.einsum("a,sau,atu->st", d_a, transition, later, precision="highest")
    return potential_shaping(reward, mean, discount) - discount * both[:, None, :]


def canonicalize_minimal_potential(
    reward: Float[Array, "states actions next"], mdp: MDP
) -> Float[Array, "states actions next"]:
    r"""The shaped reward of least $\ell_2$ norm, $\min_\Phi\|R+\gamma\Phi(t)-\Phi(s)\|_2$, in closed form.

    The normal equations are a multiple of the identity plus one of the matrix of ones, so that their solution is
    written down. Removes shaping but no redistribution.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.

    Returns:
      The shaped reward, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the environment is none or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, canonicalize_minimal_potential
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> canonicalize_minimal_potential(jnp.array([[[1.0], [3.0]]]), mdp).tolist()
      [[[-1.0], [1.0]]]

    References:
      Skalse et al., STARC, https://arxiv.org/abs/2309.15257. The official code searches with Adam.
    """
    reward, _, discount = _prepare(reward, mdp)
    states, actions, _ = reward.shape
    pull = jnp.sum(reward, axis=(1, 2)) - discount * jnp.sum(reward, axis=(0, 1))
    own = actions * states * (1 + discount**2)
    # Along the vector of ones the system's eigenvalue is actions * states * (1 - discount)^2.
    along = 2 * discount * actions / (own * actions * states * (1 - discount) ** 2)
    return potential_shaping(reward, pull / own + along * jnp.sum(pull), discount)


def canonicalize_minimal(
    reward: Float[Array, "states actions next"], mdp: MDP, *, weighted: bool = False
) -> Float[Array, "states actions next"]:
    r"""The reward of least $\ell_2$ norm among those that differ by shaping and redistribution, in closed form.

    With $\bar r = \sum_t\tau R$, $q[s,a] = \|\tau[s,a,\cdot]\|_2$ and
    $M = \bar r + \gamma\tau\Phi - \Phi(s)$, the potential minimizes $\sum_{s,a}(M/q)^2$ and
    $c(R)[s,a,t] = M[s,a]\,\tau[s,a,t]/q^2$. For the norm that weighs by $\tau$ it minimizes $\sum_{s,a}M^2$ and
    $c(R)[s,a,t] = M[s,a]$.

    Args:
      reward: $R[s,a,t]$.
      mdp: the environment.
      weighted: whether the norm that is minimal weighs every entry by its transition's probability.

    Returns:
      $c(R)$, in the dtype of ``reward`` (float32 for bfloat16 and float16).

    Raises:
      ValueError: if the environment is none or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import MDP, canonicalize_minimal
      >>> mdp = MDP(jnp.ones((1, 2, 1)), 0.5, jnp.ones(1))
      >>> c = canonicalize_minimal(jnp.array([[[1.0], [3.0]]]), mdp)
      >>> [f"{x:.4f}" for x in c.ravel()]
      ['-1.0000', '1.0000']

    References:
      Skalse et al., STARC, https://arxiv.org/abs/2309.15257. The official code takes up to a million steps of Adam and
      lacks a pair of brackets; here it is one least-squares problem.
    """
    reward, transition, discount = _prepare(reward, mdp)
    states, actions, _ = reward.shape
    mean = expected_reward(mdp, reward)
    squares = jnp.ones_like(mean) if weighted else jnp.sum(jnp.square(transition), axis=-1)
    moves = jnp.eye(states, dtype=reward.dtype)[:, None, :] - discount * transition
    scale = 1 / jnp.sqrt(squares)
    # The columns are independent, since a potential with discount * transition @ potential = potential is zero.
    basis, triangle = jnp.linalg.qr((moves * scale[..., None]).reshape(states * actions, states))
    projected = jnp.matmul(basis.T, (mean * scale).reshape(-1), precision="highest")
    potential = jax.scipy.linalg.solve_triangular(triangle, projected)
    residual = mean - jnp.einsum("sat,t->sa", moves, potential, precision="highest")
    if weighted:
        return jnp.broadcast_to(residual[..., None], reward.shape)
    return (residual / squares)[..., None] * transition
