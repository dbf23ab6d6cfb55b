"""Gradient descent on the logistic loss divided by how much of the data is still misclassified."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_range
from poise.optim.leaves import sum_dtype
from poise.optim.linear_rules import LinearRule, path_of_rule


def normalized_logistic_weights(margins: Float[Array, "..."]) -> Float[Array, "..."]:
    r"""The weights of the examples in a normalized step: $w_i = \sigma(-m_i)/\sum_j\sigma(-m_j)$.

    Computed as the softmax of $\log\sigma(-m)$, so that they sum to 1 however large the margins are, where the quotient
    would be 0/0 (beyond about 100 in float32, 745 in float64).

    Args:
      margins: $m_i = y_i\langle a_i, \theta\rangle$ in any shape; all axes together are the data set.

    Returns:
      The weights, in the shape and dtype of the margins; computed in float32 for bfloat16 and float16.

    Example:
      Only the least separated example counts once all of them are far from the boundary:

      >>> import jax.numpy as jnp
      >>> from poise.optim import normalized_logistic_weights
      >>> normalized_logistic_weights(jnp.array([1000.0, 1500.0, 2000.0])).tolist()
      [1.0, 0.0, 0.0]
    """
    logits = jax.nn.log_sigmoid(-margins.astype(sum_dtype(margins)))
    return jax.nn.softmax(logits, axis=tuple(range(margins.ndim))).astype(margins.dtype)


def normalized_logistic_loss(margins: Float[Array, "..."]) -> Float[Array, ""]:
    r"""The mean logistic loss $f = \frac1n\sum_i\log(1+e^{-m_i})$, whose gradient is normalized.

    The derivative with respect to the margins is $-w$ with :func:`normalized_logistic_weights`, which is that of $f$
    divided by $\frac1n\sum_i\sigma(-m_i)$. Minimizing it by plain SGD is normalized gradient descent, whatever the
    model behind the margins; the steps keep their length while the loss vanishes.

    Args:
      margins: $m_i$ in any shape, the whole data set or a batch of it.

    Returns:
      The mean logistic loss.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import normalized_logistic_loss
      >>> (-jax.grad(normalized_logistic_loss)(jnp.array([0.0, 0.0, 200.0, 200.0]))).tolist()
      [0.5, 0.5, 0.0, 0.0]

    References:
      Tyurin, From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
      AAAI 2025, https://arxiv.org/abs/2412.08424.
    """
    dtype = sum_dtype(margins)
    wide = margins.astype(dtype)
    value = jnp.mean(jax.nn.softplus(-wide))
    weights = jax.lax.stop_gradient(jax.nn.softmax(jax.nn.log_sigmoid(-wide), axis=tuple(range(margins.ndim))))
    linear = -jnp.sum(weights * wide)
    return (jax.lax.stop_gradient(value) + (linear - jax.lax.stop_gradient(linear))).astype(margins.dtype)


def logistic_rule(step_size: ArrayLike, normalized: bool = False) -> LinearRule:
    r"""One step of gradient descent on the logistic loss of a linear classifier.

    With $\sigma_i = \sigma(-y_i\langle a_i,\theta\rangle)$,

    $$\theta \leftarrow \theta + \frac\gamma n\sum_i\sigma_i\,y_ia_i, \qquad\text{or}\qquad
    \theta \leftarrow \theta + \gamma\,\frac{\sum_i\sigma_i\,y_ia_i}{\sum_i\sigma_i}$$

    when normalized. For $\gamma \to \infty$ and $\theta_0 = 0$, $\theta_t/\gamma$ tends to the batch perceptron,
    normalized or not (except for degenerate data). The normalized rule separates any data with margin $\mu$ and radius
    $R$ after at most $R^2/\mu^2 + 2\log(2n-1)/(\gamma\mu^2)$ steps; without the normalization the number of steps
    grows with $n$.

    Args:
      step_size: $\gamma > 0$.
      normalized: whether to divide by the mean of $\sigma_i$.

    Returns:
      A rule for :func:`path_of_rule` and :func:`iterations_to_separate`.

    Raises:
      ValueError: if ``step_size`` is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import logistic_rule
      >>> logistic_rule(2.0)(jnp.zeros(2), 0, jnp.array([[1.0, 0.0], [0.0, 1.0]])).tolist()
      [0.5, 0.5]

    References:
      Tyurin, From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
      AAAI 2025, https://arxiv.org/abs/2412.08424.
    """
    check_range("step_size", step_size, 0.0, open_low=True)

    def rule(theta: Array, count: ArrayLike, signed: Array) -> Array:
        del count
        margins = signed @ theta
        if normalized:
            weights = normalized_logistic_weights(margins)
        else:
            weights = jax.nn.sigmoid(-margins) / len(signed)
        return theta + step_size * (weights @ signed)

    return rule


def logistic_gd(
    features: Float[Array, "n d"],
    labels: Float[Array, " n"],
    step_size: ArrayLike,
    num_steps: int,
    normalized: bool = False,
) -> Float[Array, "{num_steps}+1 d"]:
    r"""Gradient descent on the logistic loss of a linear classifier, from zero.

    Args:
      features: the examples $a_i$.
      labels: $y_i \in \{-1, 1\}$.
      step_size: $\gamma > 0$.
      num_steps: the number of steps.
      normalized: whether each step is divided by the mean of $\sigma_i$; see :func:`logistic_rule`.

    Returns:
      $\theta_0 = 0, \theta_1, \dots$; the run goes on after separation.

    Raises:
      ValueError: if ``step_size`` or ``num_steps`` is out of range, or as :func:`path_of_rule` does.

    Example:
      The loss is no measure of progress: at $\theta_1$ it grows with the step size, but $\theta_2$ separates:

      >>> import jax.numpy as jnp
      >>> from poise.optim import logistic_gd
      >>> x, y = jnp.array([[1.0, -1.0], [-1.0, -4.0]]), jnp.array([1.0, -1.0])
      >>> path = logistic_gd(x, y, step_size=1000.0, num_steps=2)
      >>> [(y * (x @ theta) > 0).tolist() for theta in path]
      [[False, False], [False, True], [True, True]]

    References:
      Tyurin, From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes,
      AAAI 2025, https://arxiv.org/abs/2412.08424.
    """
    return path_of_rule(logistic_rule(step_size, normalized), features, labels, num_steps)
