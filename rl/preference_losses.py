"""Preference losses on pairs of texts: DPO with its variants, IPO, SimPO and token-level DPO."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Shaped

from poise.core.arguments import check_choice, check_range
from poise.rl.preference_pairs import (
    check_beta,
    check_same_shape,
    log_ratio,
    logistic,
    pair_margin,
    smoothed_logistic,
)
from poise.rl.token_logprobs import as_mask, sequence_logprob


def dpo_loss(
    policy_chosen: Float[Array, "*batch chosen"],
    policy_rejected: Float[Array, "*batch rejected"],
    ref_chosen: Float[Array, "*a"],
    ref_rejected: Float[Array, "*b"],
    chosen_mask: Shaped[Array, "*c"],
    rejected_mask: Shaped[Array, "*d"],
    *,
    beta: ArrayLike = 0.1,
    label_smoothing: ArrayLike = 0.0,
    kind: str = "sigmoid",
    length_normalize: bool = False,
) -> Float[Array, "*batch"]:
    r"""Direct preference optimization, $-\log\sigma(z)$ with $z = \beta(R_w - R_l)$.

    $R = \sum_tl_t(\log\pi(y_t) - \log\rho(y_t))$ for each text, $\rho$ the reference and $l$ the mask. With a share
    $\varepsilon$ of flipped labels the kinds are

    | kind | loss |
    |---|---|
    | ``sigmoid`` | $-(1-\varepsilon)\log\sigma(z) - \varepsilon\log\sigma(-z)$ (conservative DPO) |
    | ``robust`` | $\big(-(1-\varepsilon)\log\sigma(z) + \varepsilon\log\sigma(-z)\big)/(1-2\varepsilon)$, unbiased |
    | ``hinge`` | $\max(0, 1-z)$ |

    Args:
      policy_chosen: log-probabilities of the chosen texts' tokens under the policy (:func:`token_logprobs`).
      policy_rejected: of the rejected texts' tokens; their number may be another.
      ref_chosen: the same under the reference.
      ref_rejected: the same under the reference.
      chosen_mask: 1 for the tokens that count, those of the completion.
      rejected_mask: likewise.
      beta: how strongly the reference holds; positive.
      label_smoothing: $\varepsilon$ in $[0, 0.5)$.
      kind: ``sigmoid``, ``robust`` or ``hinge``.
      length_normalize: whether $R$ is divided by the number of tokens.

    Returns:
      One loss per pair, in the policy's dtype (float32 for bfloat16 and float16). A pair of which a text has no token
      that counts has the margin 0 and no gradient (:func:`preference_metrics` counts those).

    Raises:
      TypeError: if a mask is floating.
      ValueError: if ``beta``, ``label_smoothing`` or ``kind`` is out of range, or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import dpo_loss
      >>> policy, ref, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]]), jnp.array([[1, 1]])
      >>> f"{dpo_loss(ref, ref, ref, ref, mask, mask)[0]:.4f}"  # log 2
      '0.6931'
      >>> f"{dpo_loss(policy, ref, ref, ref, mask, mask, beta=2.0)[0]:.4f}"  # log(1 + e^-2)
      '0.1269'

    References:
      Rafailov et al., Direct Preference Optimization, https://arxiv.org/abs/2305.18290; Chowdhury et al., Provably
      Robust DPO, https://arxiv.org/abs/2403.00409; Liu et al., Statistical Rejection Sampling Improves Preference
      Optimization (hinge), https://arxiv.org/abs/2309.06657.
    """
    check_beta(beta)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, open_high=True)
    check_choice("kind", kind, ("sigmoid", "robust", "hinge"))
    chosen = log_ratio(policy_chosen, ref_chosen, chosen_mask, "chosen", length_normalize)
    rejected = log_ratio(policy_rejected, ref_rejected, rejected_mask, "rejected", length_normalize)
    z = beta * pair_margin(chosen, rejected, chosen_mask, rejected_mask)
    if kind == "hinge":
        return jax.nn.relu(1 - z)
    if kind == "robust":
        eps = jnp.asarray(label_smoothing, z.dtype)
        return ((1 - eps) * logistic(z) - eps * logistic(-z)) / (1 - 2 * eps)
    return smoothed_logistic(z, label_smoothing)


def ipo_loss(
    policy_chosen: Float[Array, "*batch chosen"],
    policy_rejected: Float[Array, "*batch rejected"],
    ref_chosen: Float[Array, "*a"],
    ref_rejected: Float[Array, "*b"],
    chosen_mask: Shaped[Array, "*c"],
    rejected_mask: Shaped[Array, "*d"],
    *,
    beta: ArrayLike = 0.1,
    length_normalize: bool = True,
) -> Float[Array, "*batch"]:
    r"""Identity preference optimization, $\big(\bar R_w - \bar R_l - \frac1{2\beta}\big)^2$.

    Args:
      policy_chosen: as in :func:`dpo_loss`, like all arrays.
      policy_rejected: see there.
      ref_chosen: see there.
      ref_rejected: see there.
      chosen_mask: see there.
      rejected_mask: see there.
      beta: the paper's $\tau$; positive.
      length_normalize: whether the log-ratios are means over the tokens rather than sums.

    Returns:
      One loss per pair; $1/(4\beta^2)$ without a gradient where a text has no token that counts.

    Raises:
      TypeError: if a mask is floating.
      ValueError: if ``beta`` is not positive or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import ipo_loss
      >>> policy, ref, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[-2.0, -2.0]]), jnp.array([[1, 1]])
      >>> float(ipo_loss(policy, ref, ref, ref, mask, mask, beta=1.0)[0])
      0.0

    References:
      Azar et al., A General Theoretical Paradigm to Understand Learning from Human Preferences,
      https://arxiv.org/abs/2310.12036. The paper prints sums of log-ratios; the library TRL takes means, as its authors
      confirmed to be meant, and so does the default here.
    """
    check_beta(beta)
    chosen = log_ratio(policy_chosen, ref_chosen, chosen_mask, "chosen", length_normalize)
    rejected = log_ratio(policy_rejected, ref_rejected, rejected_mask, "rejected", length_normalize)
    return jnp.square(pair_margin(chosen, rejected, chosen_mask, rejected_mask) - 1 / (2 * jnp.asarray(beta)))


def simpo_loss(
    policy_chosen: Float[Array, "*batch chosen"],
    policy_rejected: Float[Array, "*batch rejected"],
    chosen_mask: Shaped[Array, "*c"],
    rejected_mask: Shaped[Array, "*d"],
    *,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 0.5,
    label_smoothing: ArrayLike = 0.0,
) -> Float[Array, "*batch"]:
    r"""Preference optimization without a reference, $-\log\sigma(\beta(\bar L_w - \bar L_l) - \gamma)$.

    $\bar L$ is the mean of $\log\pi(y_t)$ over the tokens that count.

    Args:
      policy_chosen: as in :func:`dpo_loss`, like all arrays.
      policy_rejected: see there.
      chosen_mask: see there.
      rejected_mask: see there.
      beta: the scale of the margin; positive.
      gamma: the margin that is asked for, at least 0.
      label_smoothing: $\varepsilon$ in $[0, 0.5)$, as for the kind ``sigmoid`` of :func:`dpo_loss`.

    Returns:
      One loss per pair; that of the margin $-\gamma$, without a gradient, where a text has no token that counts.

    Raises:
      TypeError: if a mask is floating.
      ValueError: if a number is out of range or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import simpo_loss
      >>> chosen, rejected = jnp.array([[-1.0, -1.0]]), jnp.array([[-2.0]])
      >>> loss = simpo_loss(chosen, rejected, jnp.array([[1, 1]]), jnp.array([[1]]), beta=1.0, gamma=1.0)
      >>> f"{loss[0]:.4f}"  # log 2
      '0.6931'

    References:
      Meng, Xia, Chen, SimPO, https://arxiv.org/abs/2405.14734.
    """
    check_beta(beta)
    check_range("gamma", gamma, 0.0, open_high=True)
    check_range("label_smoothing", label_smoothing, 0.0, 0.5, open_high=True)
    as_mask("chosen_mask", chosen_mask, policy_chosen.shape)
    as_mask("rejected_mask", rejected_mask, policy_rejected.shape)
    chosen = sequence_logprob(policy_chosen, chosen_mask, length_normalize=True)
    rejected = sequence_logprob(policy_rejected, rejected_mask, length_normalize=True)
    z = beta * pair_margin(chosen, rejected, chosen_mask, rejected_mask) - gamma
    return smoothed_logistic(z, label_smoothing)


def tdpo_loss(
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
    version: int = 2,
    alpha: ArrayLike = 0.5,
) -> Float[Array, "*batch"]:
    r"""Token-level DPO: the margin also holds the divergence from the reference along each text.

    With $D = \sum_tl_tKL_t$ from :func:`token_forward_kl`, version 1 is
    $-\log\sigma\big(\beta[R_w-R_l - (D_l-D_w)]\big)$ and version 2 is
    $-\log\sigma\big(\beta[R_w-R_l - \alpha(D_l-\mathrm{sg}(D_w))]\big)$, where sg stops the gradient.

    Args:
      policy_chosen: as in :func:`dpo_loss`.
      policy_rejected: see there.
      ref_chosen: see there.
      ref_rejected: see there.
      kl_chosen: divergence at each token of the chosen texts.
      kl_rejected: likewise.
      chosen_mask: as in :func:`dpo_loss`.
      rejected_mask: see there.
      beta: positive.
      version: 1 or 2.
      alpha: the weight of the divergence in version 2; at least 0, where 0 is DPO.

    Returns:
      One loss per pair; log 2 without a gradient where a text has no token that counts.

    Raises:
      TypeError: if a mask is floating.
      ValueError: if a number is out of range or the shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import tdpo_loss
      >>> logps, kl, mask = jnp.array([[-1.0]]), jnp.array([[1.0]]), jnp.array([[1]])
      >>> loss = tdpo_loss(logps, logps, logps, logps, 0 * kl, kl, mask, mask, beta=1.0, version=1)
      >>> f"{loss[0]:.4f}"  # log(1 + e)
      '1.3133'

    References:
      Zeng et al., Token-level Direct Preference Optimization, https://arxiv.org/abs/2404.11999.
    """
    check_beta(beta)
    check_range("alpha", alpha, 0.0, open_high=True)
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    check_same_shape(policy_chosen.shape, kl_chosen=kl_chosen)
    check_same_shape(policy_rejected.shape, kl_rejected=kl_rejected)
    chosen = log_ratio(policy_chosen, ref_chosen, chosen_mask, "chosen")
    rejected = log_ratio(policy_rejected, ref_rejected, rejected_mask, "rejected")
    along_chosen = sequence_logprob(kl_chosen, chosen_mask)
    along_rejected = sequence_logprob(kl_rejected, rejected_mask)
    if version == 1:
        chosen, rejected = chosen + along_chosen, rejected + along_rejected
    else:
        chosen = chosen + alpha * jax.lax.stop_gradient(along_chosen)
        rejected = rejected + alpha * along_rejected
    return logistic(beta * pair_margin(chosen, rejected, chosen_mask, rejected_mask))
