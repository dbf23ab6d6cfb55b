"""Perceptrons: the limits of gradient descent on the logistic loss as the step size grows."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.optim.linear_rules import LinearRule, path_of_rule


def batch_perceptron_rule(normalized: bool = False) -> LinearRule:
    r"""Adds up all misclassified examples: $\theta \leftarrow \theta + \frac1n\sum_{i\in S} y_ia_i$.

    $S$ holds the examples with $y_i\langle a_i,\theta\rangle \le 0$. The first step, from $\theta_0 = 0$, is half of
    that, as it is for gradient descent on the logistic loss, whose limit for large steps this is. Normalized, the sum
    is divided by $|S|$ instead of $n$, and the first step is whole. Data with margin $\mu$ and radius $R$ are separated
    within $nR^2/\mu^2$ steps, or $R^2/\mu^2$ when normalized; the factor $n$ can't be avoided.

    Args:
      normalized: whether to take the mean over the misclassified examples.

    Returns:
      A rule for :func:`path_of_rule` and :func:`iterations_to_separate`. Once all is separated it stands still.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import batch_perceptron_rule
      >>> signed = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> batch_perceptron_rule()(jnp.array([1.0, -1.0]), 3, signed).tolist()
      [1.0, -0.5]
      >>> batch_perceptron_rule(normalized=True)(jnp.array([1.0, -1.0]), 3, signed).tolist()
      [1.0, 0.0]

    References:
      Tyurin, From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
      AAAI 2025, https://arxiv.org/abs/2412.08424.
    """

    def rule(theta: Array, count: ArrayLike, signed: Array) -> Array:
        wrong = (signed @ theta <= 0).astype(signed.dtype)
        if normalized:
            return theta + wrong @ signed / jnp.maximum(jnp.sum(wrong), 1)
        first = jnp.where(jnp.asarray(count) == 0, 0.5, 1.0).astype(signed.dtype)
        return theta + first * (wrong @ signed) / len(signed)

    return rule


def perceptron_rule() -> LinearRule:
    r"""Adds the first misclassified example: $\theta \leftarrow \theta + y_ia_i$, $i = \min S$.

    $S$ as in :func:`batch_perceptron_rule`. Data with margin $\mu$ and radius $R$ are separated within $R^2/\mu^2$
    steps.

    Returns:
      A rule for :func:`path_of_rule` and :func:`iterations_to_separate`. Once all is separated it stands still.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import perceptron_rule
      >>> perceptron_rule()(jnp.array([1.0, -1.0]), 0, jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
      [1.0, 0.0]

    References:
      Rosenblatt, The Perceptron, Psychological Review 65, 1958; Novikoff, On convergence proofs on perceptrons, 1962.
    """

    def rule(theta: Array, count: ArrayLike, signed: Array) -> Array:
        del count
        wrong = signed @ theta <= 0
        return theta + jnp.where(jnp.any(wrong), signed[jnp.argmax(wrong)], 0)

    return rule


def batch_perceptron(
    features: Float[Array, "n d"], labels: Float[Array, " n"], num_steps: int, normalized: bool = False
) -> Float[Array, "{num_steps}+1 d"]:
    r"""The batch perceptron from zero; see :func:`batch_perceptron_rule`.

    Args:
      features: the examples $a_i$.
      labels: $y_i \in \{-1, 1\}$.
      num_steps: the number of updates, at least 1.
      normalized: whether to take the mean over the misclassified examples.

    Returns:
      $\theta_0 = 0$ and the iterate after each update.

    Raises:
      ValueError: as :func:`path_of_rule`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import batch_perceptron
      >>> x, y = jnp.array([[1.0, -1.0], [-1.0, -4.0]]), jnp.array([1.0, -1.0])
      >>> batch_perceptron(x, y, 2).tolist()
      [[0.0, 0.0], [0.5, 0.75], [1.0, 0.25]]
    """
    return path_of_rule(batch_perceptron_rule(normalized), features, labels, num_steps)
