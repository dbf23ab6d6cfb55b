"""Whether preferred texts are likelier: actual and ideal ranking accuracy, and which pairs can be flipped."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.rl.preference_pairs import check_beta, check_same_shape, logistic


def _check_pairs(logp_chosen: Array, logp_rejected: Array, name: str) -> tuple[Array, Array]:
    check_same_shape(logp_chosen.shape, **{name: logp_rejected})
    return at_least_float32(logp_chosen), at_least_float32(logp_rejected)


def correctly_ranked(
    logp_chosen: Float[Array, "*pairs"],
    logp_rejected: Float[Array, "*others"],
    alpha: ArrayLike | None = None,
    tie_tol: ArrayLike = 0.01,
) -> Bool[Array, "*pairs"]:
    r"""Whether a model ranks each pair as humans do.

    Without ``alpha`` this is $L_w \ge L_l$. With the share $\alpha$ of humans that prefer the first text it is
    $L_w > L_l$ for $\alpha > \frac12$, $L_w < L_l$ for $\alpha < \frac12$, and $|e^{L_w}-e^{L_l}| <$ ``tie_tol`` for
    $\alpha = \frac12$.

    Args:
      logp_chosen: log-likelihoods of the first texts, or those divided by their lengths (:func:`sequence_logprob`).
      logp_rejected: of the second texts.
      alpha: a number or one per pair, in $[0, 1]$; None if the first is the preferred one.
      tie_tol: how close two probabilities count as equal.

    Returns:
      One boolean per pair.

    Raises:
      ValueError: if a number is out of range or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import correctly_ranked
      >>> first, second = jnp.array([-1.0, -3.0, -9.0]), jnp.array([-2.0, -2.0, -8.0])
      >>> correctly_ranked(first, second).tolist()
      [True, False, False]
      >>> correctly_ranked(first, second, alpha=jnp.array([0.9, 0.2, 0.5])).tolist()
      [True, True, True]

    References:
      Chen et al., Preference Learning Algorithms Do Not Learn Preference Rankings, https://arxiv.org/abs/2405.19534.
    """
    check_range("tie_tol", tie_tol, 0.0)
    first, second = _check_pairs(logp_chosen, logp_rejected, "logp_rejected")
    if alpha is None:
        return first >= second
    check_range("alpha", alpha, 0.0, 1.0)
    alpha = jnp.asarray(alpha, first.dtype)
    tied = jnp.abs(jnp.exp(first) - jnp.exp(second)) < tie_tol
    return jnp.where(alpha > 0.5, first > second, jnp.where(alpha < 0.5, first < second, tied))


def ranking_accuracy(
    logp_chosen: Float[Array, "*pairs"],
    logp_rejected: Float[Array, "*others"],
    alpha: ArrayLike | None = None,
    tie_tol: ArrayLike = 0.01,
) -> Float[Array, ""]:
    r"""The share of pairs that a model ranks as humans do (:func:`correctly_ranked`).

    Args:
      logp_chosen: log-likelihoods of the first texts, length-normalized or not.
      logp_rejected: of the second texts.
      alpha: the share of humans that prefer the first; None if it is the preferred one.
      tie_tol: how close two probabilities count as equal.

    Returns:
      A number in $[0, 1]$.

    Raises:
      ValueError: if a number is out of range or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import ranking_accuracy
      >>> float(ranking_accuracy(jnp.array([-1.0, -3.0]), jnp.array([-2.0, -2.0])))
      0.5

    References:
      Chen et al., https://arxiv.org/abs/2405.19534.
    """
    right = correctly_ranked(logp_chosen, logp_rejected, alpha, tie_tol)
    return jnp.mean(right, dtype=at_least_float32(logp_chosen).dtype)


def whole_ranking_accuracy(logps: Float[Array, "*batch outputs"]) -> Float[Array, ""]:
    r"""The share of prompts of which a model ranks *all* outputs as humans do.

    Args:
      logps: log-likelihoods of the outputs, in the order of preference, the best first.

    Returns:
      The share of prompts with $L_1 \ge L_2 \ge \dots$

    Raises:
      ValueError: if there are fewer than 2 outputs.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import whole_ranking_accuracy
      >>> float(whole_ranking_accuracy(jnp.array([[-1.0, -2.0, -3.0], [-1.0, -3.0, -2.0]])))
      0.5
    """
    if logps.shape[-1] < 2:
        raise ValueError(f"logps must hold 2 or more outputs of each prompt, got {logps.shape[-1]}")
    right = jnp.all(logps[..., :-1] >= logps[..., 1:], axis=-1)
    return jnp.mean(right, dtype=at_least_float32(logps).dtype)


def reward_accuracy(
    logp_chosen: Float[Array, "*pairs"],
    logp_rejected: Float[Array, "*a"],
    ref_logp_chosen: Float[Array, "*b"],
    ref_logp_rejected: Float[Array, "*c"],
) -> Float[Array, ""]:
    r"""The share of pairs whose *implicit reward* is ranked right, $L_w-L^\rho_w > L_l-L^\rho_l$.

    Tuning reaches this long before :func:`ranking_accuracy`, which leaves the reference $\rho$ out.

    Args:
      logp_chosen: log-likelihoods of the chosen texts under the policy.
      logp_rejected: of the rejected texts.
      ref_logp_chosen: the same under the reference.
      ref_logp_rejected: the same under the reference.

    Returns:
      A number in $[0, 1]$.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import reward_accuracy
      >>> chosen, rejected = jnp.array([-5.0]), jnp.array([-2.0])
      >>> float(reward_accuracy(chosen, rejected, jnp.array([-9.0]), jnp.array([-3.0])))
      1.0
    """
    check_same_shape(
        logp_chosen.shape,
        logp_rejected=logp_rejected,
        ref_logp_chosen=ref_logp_chosen,
        ref_logp_rejected=ref_logp_rejected,
    )
    right = logp_chosen - ref_logp_chosen > logp_rejected - ref_logp_rejected
    return jnp.mean(right, dtype=at_least_float32(logp_chosen).dtype)


def idealized_log_ratio(
    ref_logp_chosen: Float[Array, "*pairs"],
    ref_logp_rejected: Float[Array, "*others"],
    alpha: ArrayLike,
    beta: ArrayLike,
    eps: ArrayLike = 1e-3,
) -> Float[Array, "*pairs"]:
    r"""By how much the perfect optimum of DPO prefers the first text,
    $\log\frac{\pi^*(w)}{\pi^*(l)} = L^\rho_w - L^\rho_l + \frac1\beta\log\frac{\alpha}{1-\alpha}$.

    Args:
      ref_logp_chosen: log-likelihoods of the first texts under the reference, length-normalized or not.
      ref_logp_rejected: of the second texts.
      alpha: the share of raters that prefer the first, a number or one per pair, in $[0, 1]$.
      beta: positive.
      eps: $\alpha$ is clipped to $[\varepsilon, 1-\varepsilon]$; in $(0, 0.5)$.

    Returns:
      One number per pair, in the dtype of the log-likelihoods (float32 for bfloat16 and float16).

    Raises:
      ValueError: if a number is out of range or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import idealized_log_ratio
      >>> float(idealized_log_ratio(jnp.array([-5.0]), jnp.array([-2.0]), alpha=0.5, beta=0.1)[0])
      -3.0

    References:
      Chen et al., https://arxiv.org/abs/2405.19534, equation 3. Their code takes a quotient of log-likelihoods where
      lengths are not normalized; here it is the equation in both cases.
    """  # noqa: D205
    check_range("alpha", alpha, 0.0, 1.0)
    check_beta(beta)
    check_range("eps", eps, 0.0, 0.5, open_low=True, open_high=True)
    first, second = _check_pairs(ref_logp_chosen, ref_logp_rejected, "ref_logp_rejected")
    share = jnp.clip(jnp.asarray(alpha, first.dtype), eps, 1 - jnp.asarray(eps, first.dtype))
    return first - second + (jnp.log(share) - jnp.log1p(-share)) / beta


def idealized_ranking_accuracy(
    ref_logp_chosen: Float[Array, "*pairs"],
    ref_logp_rejected: Float[Array, "*others"],
    alpha: ArrayLike = 0.75,
    beta: ArrayLike = 0.1,
    eps: ArrayLike = 1e-3,
) -> Float[Array, ""]:
    r"""The ranking accuracy that a perfectly optimized DPO would have: the share of positive
    :func:`idealized_log_ratio`.

    For $\beta\to0$ it is that of $\alpha > \frac12$; for $\beta\to\infty$ or $\alpha = \frac12$ the reference's own.

    Args:
      ref_logp_chosen: log-likelihoods of the preferred texts under the reference, length-normalized or not.
      ref_logp_rejected: of the others.
      alpha: the share of raters that agree with the preference; where it is unknown, 0.75 is the paper's assumption.
      beta: positive.
      eps: $\alpha$ is clipped to $[\varepsilon, 1-\varepsilon]$.

    Returns:
      A number in $[0, 1]$.

    Raises:
      ValueError: if a number is out of range or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import idealized_ranking_accuracy
      >>> chosen, rejected = jnp.array([-5.0, -50.0]), jnp.array([-2.0, -2.0])
      >>> float(idealized_ranking_accuracy(chosen, rejected, alpha=0.75, beta=0.1))
      0.5

    References:
      Chen et al., https://arxiv.org/abs/2405.19534.
    """  # noqa: D205
    ratio = idealized_log_ratio(ref_logp_chosen, ref_logp_rejected, alpha, beta, eps)
    return jnp.mean(ratio > 0, dtype=ratio.dtype)


def alignment_gap(
    logp_chosen: Float[Array, "*pairs"],
    logp_rejected: Float[Array, "*a"],
    ref_logp_chosen: Float[Array, "*b"],
    ref_logp_rejected: Float[Array, "*c"],
    alpha: ArrayLike = 0.75,
    beta: ArrayLike = 0.1,
    eps: ArrayLike = 1e-3,
) -> Float[Array, ""]:
    r"""How far a tuned model stays behind: idealized minus actual ranking accuracy.

    Args:
      logp_chosen: log-likelihoods of the preferred texts under the policy.
      logp_rejected: of the others.
      ref_logp_chosen: the same under the reference.
      ref_logp_rejected: the same under the reference.
      alpha: as in :func:`idealized_ranking_accuracy`.
      beta: see there.
      eps: see there.

    Returns:
      A number in $[-1, 1]$.

    Raises:
      ValueError: if a number is out of range or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import alignment_gap
      >>> ref = jnp.array([-5.0, -50.0]), jnp.array([-2.0, -2.0])
      >>> float(alignment_gap(*ref, *ref))
      0.5
    """
    ideal = idealized_ranking_accuracy(ref_logp_chosen, ref_logp_rejected, alpha, beta, eps)
    return ideal - ranking_accuracy(logp_chosen, logp_rejected)


def flip_difficulty(
    ref_logp_chosen: Float[Array, "*pairs"], ref_logp_rejected: Float[Array, "*others"]
) -> Float[Array, "*pairs"]:
    r"""How wrong the reference is about a pair, $c = L^\rho_l - L^\rho_w$; needs no training.

    Args:
      ref_logp_chosen: log-likelihoods of the preferred texts under the reference, length-normalized or not.
      ref_logp_rejected: of the others.

    Returns:
      $c$, positive where the pair has to be flipped.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import flip_difficulty
      >>> flip_difficulty(jnp.array([-5.0]), jnp.array([-2.0])).tolist()
      [3.0]
    """
    first, second = _check_pairs(ref_logp_chosen, ref_logp_rejected, "ref_logp_rejected")
    return second - first


def flip_loss_threshold(
    ref_logp_chosen: Float[Array, "*pairs"], ref_logp_rejected: Float[Array, "*others"], beta: ArrayLike = 0.1
) -> Float[Array, "*pairs"]:
    r"""A pair is ranked right if and only if its DPO loss is at most $-\log\sigma(\beta c)$.

    Log 2 for a pair that the reference finds equal; about $e^{-\beta c}$ for a hard one.

    Args:
      ref_logp_chosen: log-likelihoods of the preferred texts under the reference; sums over tokens, as in the loss.
      ref_logp_rejected: of the others.
      beta: that of the loss; positive.

    Returns:
      The threshold of each pair.

    Raises:
      ValueError: if ``beta`` is not positive or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import flip_loss_threshold
      >>> [f"{x:.4f}" for x in flip_loss_threshold(jnp.array([-2.0, -62.0]), jnp.array([-2.0, -2.0]))]
      ['0.6931', '0.0025']

    References:
      Chen et al., https://arxiv.org/abs/2405.19534, theorem on ranking and loss.
    """
    check_beta(beta)
    return logistic(beta * flip_difficulty(ref_logp_chosen, ref_logp_rejected))


def attenuated_dpo_loss(
    logp_chosen: Float[Array, "*pairs"],
    logp_rejected: Float[Array, "*a"],
    ref_logp_chosen: Float[Array, "*b"],
    ref_logp_rejected: Float[Array, "*c"],
    *,
    beta: ArrayLike = 0.1,
    ref_weight: ArrayLike = 1.0,
) -> Float[Array, "*pairs"]:
    r"""DPO with a weaker or stronger reference, $-\log\sigma\big(\beta[L_w-L_l+\gamma(L^\rho_l-L^\rho_w)]\big)$.

    Args:
      logp_chosen: log-likelihoods of the preferred texts under the policy.
      logp_rejected: of the others.
      ref_logp_chosen: the same under the reference.
      ref_logp_rejected: the same under the reference.
      beta: positive.
      ref_weight: $\gamma \ge 0$; 1 is DPO, 0 forgets the reference.

    Returns:
      One loss per pair, in the dtype of the log-likelihoods (float32 for bfloat16 and float16).

    Raises:
      ValueError: if a number is out of range or the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import attenuated_dpo_loss
      >>> x = jnp.array([-1.0])
      >>> f"{attenuated_dpo_loss(x, x, x - 5.0, x, ref_weight=0.0)[0]:.4f}"
      '0.6931'

    References:
      Chen et al., https://arxiv.org/abs/2405.19534.
    """
    check_beta(beta)
    check_range("ref_weight", ref_weight, 0.0, open_high=True)
    check_same_shape(
        logp_chosen.shape,
        logp_rejected=logp_rejected,
        ref_logp_chosen=ref_logp_chosen,
        ref_logp_rejected=ref_logp_rejected,
    )
    margin = at_least_float32(logp_chosen) - at_least_float32(logp_rejected)
    return logistic(beta * (margin + ref_weight * flip_difficulty(ref_logp_chosen, ref_logp_rejected)))


def ranking_transitions(before: Bool[Array, "*pairs"], after: Bool[Array, "*others"]) -> Int[Array, "2 2"]:
    """How many pairs went from wrong or right before training to wrong or right after it.

    Args:
      before: whether each pair was ranked right (:func:`correctly_ranked`).
      after: whether it is now.

    Returns:
      Counts ``[before, after]``, index 0 for wrong and 1 for right: ``[0, 1]`` are the pairs that were flipped.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import ranking_transitions
      >>> ranking_transitions(jnp.array([False, False, True]), jnp.array([False, True, True])).tolist()
      [[1, 1], [0, 1]]
    """
    check_same_shape(before.shape, after=after)
    return jnp.array([[jnp.sum(b & a) for a in (~after, after)] for b in (~before, before)])
