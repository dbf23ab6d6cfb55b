"""Preference losses in which every token's reward and divergence have their own weights: SparsePO and MaPO."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.rl.preference_pairs import check_beta, check_same_shape, comparable, log_ratio, logistic, pair_margin
from poise.rl.token_logprobs import as_mask, sequence_logprob, token_count

MaskPair = tuple[Array, Array]


def _weights(name: str, pair: MaskPair | None, chosen: Array, rejected: Array) -> MaskPair | None:
    if pair is None:
        return None
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair (chosen, rejected), got {len(pair)} arrays")
    check_same_shape(chosen.shape, **{f"the chosen {name}": pair[0]})
    check_same_shape(rejected.shape, **{f"the rejected {name}": pair[1]})
    return pair[0], pair[1]


def _weighted(values: Array, weights: Array | None, mask: Array) -> Array:
    """The sum over counted tokens of weight times value, neither of which is looked at elsewhere."""
    values = jnp.where(mask != 0, at_least_float32(values), 0)
    return sequence_logprob(values if weights is None else jnp.where(mask != 0, weights, 0) * values, mask)


def _l1(pair: MaskPair | None, chosen_mask: Array, rejected_mask: Array) -> Array:
    """The sums of absolute weights over both texts; a weight of 1 that nobody learns is not penalized."""
    if pair is None:
        return jnp.zeros(())
    return sequence_logprob(jnp.abs(pair[0]), chosen_mask) + sequence_logprob(jnp.abs(pair[1]), rejected_mask)


def sparse_po_loss(
    policy_chosen: Float[Array, "*batch chosen"],
    policy_rejected: Float[Array, "*batch rejected"],
    ref_chosen: Float[Array, "*a"],
    ref_rejected: Float[Array, "*b"],
    kl_chosen: Float[Array, "*e"],
    kl_rejected: Float[Array, "*f"],
    chosen_mask: Shaped[Array, "*c"],
    rejected_mask: Shaped[Array, "*d"],
    *,
    beta: ArrayLike = 0.1,
    reward_mask: tuple[Array, Array] | None = None,
    kl_mask: tuple[Array, Array] | None = None,
    l1_reward: ArrayLike = 0.0,
    l1_kl: ArrayLike = 0.0,
) -> Float[Array, "*batch"]:
    r"""SparsePO and MaPO: DPO with a weight for every token's reward and one for its divergence.

    $$-\log\sigma\big(\beta[U_w-U_l-(D_l-D_w)]\big) + \lambda_u(\|\mu_w\|_1+\|\mu_l\|_1)
      + \lambda_d(\|\nu_w\|_1+\|\nu_l\|_1),$$

    $U = \sum_tl_t\mu_t(\log\pi(y_t)-\log\rho(y_t))$ and $D = \sum_tl_t\nu_tKL(\rho\|\pi)_t$; the norms count the tokens
    with $l_t = 1$. All weights 1 give :func:`tdpo_loss` of version 1; $\nu = 0$ and $\mu = 1$ give :func:`dpo_loss`.
    Weights come from :func:`mapo_mask` or from :class:`poise.nets.SparseTokenMask`; the gradient flows into them.

    Args:
      policy_chosen: as in :func:`dpo_loss`.
      policy_rejected: see there.
      ref_chosen: see there.
      ref_rejected: see there.
      kl_chosen: divergence at each token of the chosen texts (:func:`token_forward_kl`).
      kl_rejected: likewise.
      chosen_mask: $l$, as in :func:`dpo_loss`.
      rejected_mask: likewise.
      beta: positive.
      reward_mask: $(\mu_w, \mu_l)$, in the shapes of the log-probabilities; None for 1.
      kl_mask: $(\nu_w, \nu_l)$; None for 1.
      l1_reward: $\lambda_u \ge 0$; nothing is added for weights of None.
      l1_kl: $\lambda_d \ge 0$.

    Returns:
      One loss per pair, in the policy's dtype (float32 for bfloat16 and float16). Where a text has no token that
      counts it is log 2 without a gradient (:func:`preference_metrics` counts those).

    Raises:
      TypeError: if a text's mask is floating.
      ValueError: if a number is out of range or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import sparse_po_loss
      >>> logps, kl, mask = jnp.array([[-1.0, -1.0]]), jnp.zeros((1, 2)), jnp.array([[1, 1]])
      >>> weights = (jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]))
      >>> args = (logps, logps, logps - 2.0, logps, kl, kl, mask, mask)
      >>> f"{sparse_po_loss(*args, beta=1.0, reward_mask=weights)[0]:.4f}"  # log(1 + e^-2)
      '0.1269'

    References:
      Christopoulou et al., SparsePO, https://arxiv.org/abs/2410.05102.
    """
    check_beta(beta)
    check_range("l1_reward", l1_reward, 0.0, open_high=True)
    check_range("l1_kl", l1_kl, 0.0, open_high=True)
    check_same_shape(policy_chosen.shape, ref_chosen=ref_chosen, kl_chosen=kl_chosen)
    check_same_shape(policy_rejected.shape, ref_rejected=ref_rejected, kl_rejected=kl_rejected)
    as_mask("chosen_mask", chosen_mask, policy_chosen.shape)
    as_mask("rejected_mask", rejected_mask, policy_rejected.shape)
    mu = _weights("reward_mask", reward_mask, policy_chosen, policy_rejected)
    nu = _weights("kl_mask", kl_mask, policy_chosen, policy_rejected)

    def side(policy, ref, kl, mask, index):
        counted = mask != 0
        ratio = jnp.where(counted, at_least_float32(policy), 0) - jnp.where(counted, at_least_float32(ref), 0)
        reward = _weighted(ratio, None if mu is None else mu[index], mask)
        return reward + _weighted(kl, None if nu is None else nu[index], mask)

    chosen = side(policy_chosen, ref_chosen, kl_chosen, chosen_mask, 0)
    rejected = side(policy_rejected, ref_rejected, kl_rejected, rejected_mask, 1)
    loss = logistic(beta * pair_margin(chosen, rejected, chosen_mask, rejected_mask))
    penalty = l1_reward * _l1(mu, chosen_mask, rejected_mask) + l1_kl * _l1(nu, chosen_mask, rejected_mask)
    return loss + jnp.where(comparable(chosen_mask, rejected_mask), penalty, 0).astype(loss.dtype)


def _min_max(values: Array, mask: Array) -> Array:
    """Each sequence rescaled to [0, 1] over its counted tokens; 1 where they are all alike, 0 elsewhere."""
    low = jnp.min(jnp.where(mask, values, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(mask, values, -jnp.inf), axis=-1, keepdims=True)
    flat = ~(high > low)
    scaled = (values - jnp.where(flat, 0, low)) / jnp.where(flat, 1, high - low)
    return jnp.where(mask, jnp.where(flat, 1, scaled), 0)


def mapo_mask(
    activations: Float[Array, "hooks *batch tokens features"] | Sequence[Array] | Mapping[str, Array | Sequence[Array]],
    mask: Shaped[Array, "*mask"],
) -> Float[Array, "*tokens"]:
    r"""Weights of tokens from a frozen model's activations (MaPO).

    For each hooked activation the mean over its features is rescaled over the tokens that count, from the least to the
    greatest of the sequence, to $[0, 1]$. The weights are the mean over the hooks of a kind, then over the kinds.

    Args:
      activations: ``[hooks, ..., tokens, features]``, or a sequence of ``[..., tokens, features]`` whose features may
        differ in number, or a mapping from kinds (``mlp``, ``attention``, ...) to either.
      mask: 1 for the tokens that count, ``[..., tokens]``.

    Returns:
      Weights in $[0, 1]$ without a gradient, 0 for tokens that don't count. A sequence whose activations are all alike,
      or that has one token, gets 1. Multiplying or shifting all activations of a hook changes nothing.

    Raises:
      TypeError: if the mask is floating.
      ValueError: if there are no activations or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import mapo_mask
      >>> mapo_mask(jnp.array([[[[1.0], [3.0], [2.0], [50.0]]]]), jnp.array([[1, 1, 1, 0]])).tolist()
      [[0.0, 1.0, 0.5, 0.0]]

    References:
      Christopoulou et al., SparsePO, https://arxiv.org/abs/2410.05102. The official code also standardizes the means
      before it rescales them, which changes nothing, and casts to float16, which is not done here.
    """
    kinds = list(activations.values()) if isinstance(activations, Mapping) else [activations]
    if not kinds or any(len(hooks) == 0 for hooks in kinds):
        raise ValueError("activations must hold one or more hooks of each kind")
    counted = as_mask("mask", mask, kinds[0][0].shape[:-1])
    weights = []
    for hooks in kinds:
        for hook in hooks:
            check_same_shape(counted.shape, **{"activations without their features": hook[..., 0]})
        means = [jnp.mean(at_least_float32(hook), axis=-1) for hook in hooks]
        weights.append(sum(_min_max(jnp.where(counted, value, 0), counted) for value in means) / len(means))
    return jax.lax.stop_gradient(jnp.asarray(sum(weights)) / len(weights))


def mask_sparsity(weights: Float[Array, "*batch tokens"], mask: Shaped[Array, "*mask"]) -> Float[Array, "*batch"]:
    """The share of a sequence's tokens whose weight is exactly 0; a learned mask at 1 is dead.

    Args:
      weights: of each token.
      mask: 1 for the tokens that count.

    Returns:
      Shares in [0, 1], in the dtype of ``weights`` (float32 for bfloat16 and float16); 0 if no token counts.

    Raises:
      TypeError: if the mask is floating.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import mask_sparsity
      >>> float(mask_sparsity(jnp.array([0.0, 0.5, 0.0, 0.0]), jnp.array([1, 1, 0, 0])))
      0.5
    """
    counted = as_mask("mask", mask, weights.shape)
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    return jnp.sum(counted & (weights == 0), axis=-1).astype(dtype) / token_count(counted, dtype)


def preference_metrics(
    policy_chosen: Float[Array, "*batch chosen"],
    policy_rejected: Float[Array, "*batch rejected"],
    ref_chosen: Float[Array, "*a"],
    ref_rejected: Float[Array, "*b"],
    chosen_mask: Shaped[Array, "*c"],
    rejected_mask: Shaped[Array, "*d"],
    *,
    beta: ArrayLike = 0.1,
) -> dict[str, Float[Array, ""]]:
    r"""What is watched while preferences are trained on; the same for every loss.

    Args:
      policy_chosen: as in :func:`dpo_loss`, like all arrays.
      policy_rejected: see there.
      ref_chosen: see there.
      ref_rejected: see there.
      chosen_mask: see there.
      rejected_mask: see there.
      beta: positive.

    Returns:
      ``reward_chosen`` and ``reward_rejected``, the means of $\beta R$; ``reward_margin``, that of their difference;
      ``reward_accuracy``, the share of pairs with $R_w > R_l$; all over pairs that can be compared, and
      ``empty_pairs``, the share of those that can't since a text has no token that counts.

    Raises:
      TypeError: if a mask is floating.
      ValueError: if ``beta`` is not positive or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import preference_metrics
      >>> logps, mask = jnp.array([[-1.0], [-1.0]]), jnp.array([[1], [0]])
      >>> metrics = preference_metrics(logps, logps, logps - 1.0, logps, mask, mask, beta=0.5)
      >>> {name: float(value) for name, value in metrics.items() if name in ("reward_margin", "empty_pairs")}
      {'reward_margin': 0.5, 'empty_pairs': 0.5}
    """
    check_beta(beta)
    chosen = beta * log_ratio(policy_chosen, ref_chosen, chosen_mask, "chosen")
    rejected = beta * log_ratio(policy_rejected, ref_rejected, rejected_mask, "rejected")
    valid = comparable(chosen_mask, rejected_mask)

    def mean(values):
        total = jnp.sum(jnp.where(valid, values, 0), dtype=chosen.dtype)
        return total / jnp.maximum(jnp.sum(valid), 1).astype(chosen.dtype)

    return {
        "reward_chosen": mean(chosen),
        "reward_rejected": mean(rejected),
        "reward_margin": mean(chosen - rejected),
        "reward_accuracy": mean(chosen > rejected),
        "empty_pairs": jnp.mean(~valid, dtype=chosen.dtype),
    }
