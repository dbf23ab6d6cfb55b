"""What a diffusion network predicts: clean data, noise, velocity or flow, and the conversions between them."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_choice
from poise.core.arrays import at_least_float32, expand_like

PREDICTIONS = ("x0", "eps", "v", "flow")


def _coefficient(name: str, value: Array, x: Array) -> Array:
    if jnp.ndim(value) > 0 and jnp.shape(value) != jnp.shape(x)[:1]:
        raise ValueError(f"{name} must be a scalar or have shape {jnp.shape(x)[:1]}, got {jnp.shape(value)}")
    return expand_like(jnp.asarray(value), x) if jnp.ndim(value) else jnp.asarray(value)


def prediction_target(
    x0: Float[Array, "batch *event"],
    noise: Float[Array, "batch *event"],
    prediction: str,
    alpha: Float[Array, "#batch"] | Float[Array, ""] | None = None,
    sigma: Float[Array, "#batch"] | Float[Array, ""] | None = None,
) -> Float[Array, "batch *event"]:
    r"""The target of a network that sees $x_t = \alpha x_0 + \sigma \epsilon$.

    ``x0``: $x_0$; ``eps``: $\epsilon$; ``v``: $\alpha\epsilon - \sigma x_0$; ``flow``: $\epsilon - x_0$.

    Args:
      x0: clean data.
      noise: $\epsilon$, standard normal.
      prediction: one of the four names.
      alpha: signal coefficients, needed for ``v``.
      sigma: noise coefficients, needed for ``v``.

    Returns:
      The target.

    Raises:
      ValueError: for an unknown name, or if ``v`` comes without its coefficients.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import prediction_target
      >>> prediction_target(jnp.array([[1.0]]), jnp.array([[3.0]]), "flow").tolist()
      [[2.0]]

    References:
      Salimans, Ho, "Progressive Distillation", https://arxiv.org/abs/2202.00512 (v); Lipman et al., "Flow Matching",
      https://arxiv.org/abs/2210.02747 (flow).
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "x0":
        return x0
    if prediction == "eps":
        return noise
    if prediction == "flow":
        return noise - x0
    if alpha is None or sigma is None:
        raise ValueError("alpha and sigma must be given for prediction 'v'")
    return _coefficient("alpha", alpha, x0) * noise - _coefficient("sigma", sigma, x0) * x0


def x0_from_prediction(
    x_t: Float[Array, "batch *event"],
    predicted: Float[Array, "batch *event"],
    prediction: str,
    alpha: Float[Array, "#batch"] | Float[Array, ""],
    sigma: Float[Array, "#batch"] | Float[Array, ""],
) -> Float[Array, "batch *event"]:
    r"""The clean data that a prediction at $x_t = \alpha x_0 + \sigma\epsilon$ implies.

    ``eps``: $(x_t - \sigma\epsilon)/\alpha$; ``v``: $(\alpha x_t - \sigma v)/(\alpha^2+\sigma^2)$; ``flow``:
    $(x_t - \sigma u)/(\alpha + \sigma)$.

    Args:
      x_t: noised data.
      predicted: the network's output.
      prediction: what it predicts: ``x0``, ``eps``, ``v`` or ``flow``.
      alpha: signal coefficients, scalar or one per example.
      sigma: noise coefficients, likewise.

    Returns:
      $x_0$. With ``eps`` it is not finite where ``alpha`` is 0.

    Raises:
      ValueError: for an unknown name.

    Example:
      Rectified flow has $\alpha = 1-t$ and $\sigma = t$:

      >>> import jax.numpy as jnp
      >>> from poise.fdistill import x0_from_prediction
      >>> x0_from_prediction(jnp.array([[1.5]]), jnp.array([[2.0]]), "flow", jnp.array(0.75), jnp.array(0.25)).tolist()
      [[1.0]]

    References:
      As :func:`prediction_target`.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    a, s = _coefficient("alpha", alpha, x_t), _coefficient("sigma", sigma, x_t)
    if prediction == "x0":
        return predicted
    if prediction == "eps":
        return (x_t - s * predicted) / a
    if prediction == "v":
        return (a * x_t - s * predicted) / (a**2 + s**2)
    return (x_t - s * predicted) / (a + s)


def denoising_loss(
    predicted: Float[Array, "batch *event"],
    x0: Float[Array, "batch *event"],
    noise: Float[Array, "batch *event"],
    prediction: str = "x0",
    alpha: Float[Array, "#batch"] | Float[Array, ""] | None = None,
    sigma: Float[Array, "#batch"] | Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    r"""Denoising score matching, the mean squared error against :func:`prediction_target`.

    Args:
      predicted: the network's output at $\alpha x_0 + \sigma\epsilon$.
      x0: clean data.
      noise: $\epsilon$.
      prediction: what the network predicts.
      alpha: signal coefficients, needed for ``v``.
      sigma: noise coefficients, needed for ``v``.

    Returns:
      The loss, a mean over batch and event, in float32 at least.

    Raises:
      ValueError: as :func:`prediction_target`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import denoising_loss
      >>> float(denoising_loss(jnp.array([[1.0]]), jnp.array([[1.0]]), jnp.array([[3.0]]), "eps"))
      4.0

    References:
      Vincent, "A connection between score matching and denoising autoencoders" (2011); NVlabs/FastGen.
    """
    predicted, x0, noise = at_least_float32(predicted), at_least_float32(x0), at_least_float32(noise)
    return jnp.mean((predicted - prediction_target(x0, noise, prediction, alpha, sigma)) ** 2)
