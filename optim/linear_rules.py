"""Iterations of a linear classifier on separable data: paths, and the number of updates until all is separated."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from poise.core.arguments import check_count, concrete

LinearRule: TypeAlias = Callable[[Array, ArrayLike, Array], Array]
"""``(theta, count, signed) -> theta``: update number ``count`` from 0; row i of ``signed`` is label times example."""


class Separation(NamedTuple):
    """How a rule fared.

    Attributes:
      theta: the first iterate that separates the data, or the last one tried.
      num_steps: the number of updates made.
      separated: whether every example has a margin above 0.
    """

    theta: Float[Array, " d"]
    num_steps: Int[Array, ""]
    separated: Bool[Array, ""]


def signed_examples(features: Any, labels: Any) -> Array:
    """Labels times examples, after a look at both.

    Raises:
      ValueError: if there is no example, the numbers differ, a label is not -1 or 1, or a feature is not finite; values
        are looked at only where they are concrete.
    """
    features, labels = jnp.asarray(features), jnp.asarray(labels)
    if features.ndim != 2 or not len(features):
        raise ValueError(f"features must have the shape [n, d] with n at least 1, got {features.shape}")
    if labels.shape != features.shape[:1]:
        raise ValueError(f"labels must have the shape {features.shape[:1]} of the examples, got {labels.shape}")
    known = concrete(labels)
    if known is not None and not np.isin(known, (-1, 1)).all():
        raise ValueError(f"labels must be -1 or 1, got {np.unique(known)}")
    known = concrete(features)
    if known is not None and not np.isfinite(known).all():
        raise ValueError("features must be finite, got NaN or infinite ones")
    return labels[:, None].astype(features.dtype) * features


def path_of_rule(
    rule: LinearRule, features: Float[Array, "n d"], labels: Float[Array, " n"], num_steps: int
) -> Float[Array, "{num_steps}+1 d"]:
    r"""The iterates of a rule from zero.

    Args:
      rule: what :func:`logistic_rule`, :func:`batch_perceptron_rule` or :func:`perceptron_rule` returns.
      features: the examples $a_i$.
      labels: $y_i \in \{-1, 1\}$.
      num_steps: the number of updates, at least 1. The run goes on after separation.

    Returns:
      $\theta_0 = 0$ and the iterate after each update.

    Raises:
      ValueError: if there are no examples, a label is not -1 or 1, a feature is not finite, or ``num_steps`` below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import path_of_rule, perceptron_rule
      >>> path_of_rule(perceptron_rule(), jnp.eye(2), jnp.array([1.0, -1.0]), 2).tolist()
      [[0.0, 0.0], [1.0, 0.0], [1.0, -1.0]]
    """
    check_count("num_steps", num_steps)
    signed = signed_examples(features, labels)
    zero = jnp.zeros(signed.shape[1], signed.dtype)

    def step(theta: Array, count: Array) -> tuple[Array, Array]:
        theta = rule(theta, count, signed).astype(zero.dtype)
        return theta, theta

    return jnp.concatenate([zero[None], jax.lax.scan(step, zero, jnp.arange(num_steps))[1]])


def iterations_to_separate(
    rule: LinearRule, features: Float[Array, "n d"], labels: Float[Array, " n"], max_steps: int
) -> Separation:
    r"""The number of updates from zero until $y_i\langle a_i,\theta\rangle > 0$ for all examples.

    Args:
      rule: what :func:`logistic_rule`, :func:`batch_perceptron_rule` or :func:`perceptron_rule` returns.
      features: the examples $a_i$.
      labels: $y_i \in \{-1, 1\}$.
      max_steps: where to give up, at least 1; data that can't be separated run that long.

    Returns:
      The separating iterate and the number of updates, or a failure. Can't be differentiated backwards.

    Raises:
      ValueError: if there are no examples, a label is not -1 or 1, a feature is not finite, or ``max_steps`` below 1.

    Example:
      One example against many of the other class: the number of steps that plain gradient descent needs grows with
      the number of examples, that of the normalized one doesn't.

      >>> import jax.numpy as jnp
      >>> from poise.optim import iterations_to_separate, logistic_rule
      >>> x = jnp.concatenate([jnp.array([[0.5, -1.0]]), jnp.tile(jnp.array([[-0.5, -1.0]]), (99, 1))])
      >>> y = jnp.array([1.0] + 99 * [-1.0])
      >>> plain = iterations_to_separate(logistic_rule(100.0), x, y, 1000)
      >>> normalized = iterations_to_separate(logistic_rule(100.0, normalized=True), x, y, 1000)
      >>> int(plain.num_steps) > 25, int(normalized.num_steps), bool(normalized.separated)
      (True, 2, True)

    References:
      Tyurin, From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
      AAAI 2025, https://arxiv.org/abs/2412.08424.
    """
    check_count("max_steps", max_steps)
    signed = signed_examples(features, labels)

    def separates(theta: Array) -> Array:
        return jnp.all(signed @ theta > 0)

    def update(carry: Separation) -> Separation:
        theta = rule(carry.theta, carry.num_steps, signed).astype(signed.dtype)
        return Separation(theta, carry.num_steps + 1, separates(theta))

    zero = jnp.zeros(signed.shape[1], signed.dtype)
    start = Separation(zero, jnp.zeros((), jnp.int32), separates(zero))
    return jax.lax.while_loop(
        lambda carry: jnp.logical_not(carry.separated) & (carry.num_steps < max_steps), update, start
    )
