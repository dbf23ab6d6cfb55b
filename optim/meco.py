"""Maximum likelihood of unnormalized models: the normalizer is a running average of importance weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from poise.core.arguments import check_range, concrete
from poise.optim.leaves import sum_dtype


class MecoState(NamedTuple):
    r"""State of :func:`meco_loss`.

    Attributes:
      log_normalizer: $\log u$, the running estimate of $\log Z(\theta)$.
      count: the number of updates of it.
    """

    log_normalizer: Float[Array, ""]
    count: Int[Array, ""]


def _log_mean_exp(log_weights: Array) -> Array:
    return jax.nn.logsumexp(log_weights) - jnp.log(jnp.asarray(log_weights.size, log_weights.dtype))


def _check_log_weights(log_weights: Array) -> None:
    """Refuses concrete weights that are NaN or infinitely large; a log weight of minus infinity is a weight of zero."""
    known = concrete(log_weights)
    if known is None:
        return
    if not known.size:
        raise ValueError(f"log_weights must hold at least one sample, got shape {known.shape}")
    known = known.astype(np.float64)
    if np.isnan(known).any() or np.isposinf(known).any():
        raise ValueError(
            "log_weights must be below infinity, got NaN or infinite ones; is log q finite at its samples?"
        )


def meco_init(log_weights: Float[Array, "..."] | None = None) -> MecoState:
    r"""The state before training.

    Args:
      log_weights: $f(z_b) - \log q(z_b)$ of a first batch of noise, whose mean is the first estimate of $Z$; None to
        take that of the first call of :func:`meco_loss`.

    Returns:
      The state.

    Raises:
      ValueError: if there is no sample, or a concrete log weight is NaN or plus infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import meco_init
      >>> state = meco_init(jnp.log(jnp.array([1.0, 3.0])))
      >>> round(float(jnp.exp(state.log_normalizer)), 5), int(state.count)
      (2.0, 1)
    """
    if log_weights is None:
        return MecoState(jnp.zeros((), jnp.result_type(float)), jnp.zeros((), jnp.int32))
    _check_log_weights(log_weights)
    return MecoState(_log_mean_exp(log_weights.astype(sum_dtype(log_weights))), jnp.ones((), jnp.int32))


def meco_loss(
    f_data: Float[Array, "..."],
    log_weights: Float[Array, "..."],
    state: MecoState,
    gamma: ArrayLike,
    previous_log_weights: Float[Array, "..."] | None = None,
) -> tuple[Float[Array, ""], MecoState]:
    r"""The negative log-likelihood of $p_\theta = e^{f_\theta}/Z(\theta)$, with $Z$ from a running average.

    $\mathrm{NLL} = -\frac1n\sum_if_\theta(x_i) + \log\mathbb E_{z\sim q}[e^{f_\theta(z)}/q(z)]$ is a function of an
    expectation, so that the gradient of its value on a batch is biased. With $\hat g$ the mean of $e^{f(z)-\log q(z)}$
    over the batch,

    $$u \leftarrow (1-\gamma)u + \gamma\hat g, \qquad
    G = -\frac1n\sum_i\nabla f(x_i) + \frac1B\sum_b\frac{e^{f(z_b)-\log q(z_b)}}{u}\nabla f(z_b).$$

    With the samples' weights at the previous parameters, $u \leftarrow \hat g + (1-\gamma)(u - \hat
    g_{\text{previous}})$, which follows moving parameters without lag; where that is not positive, the average above
    is taken.

    Everything happens in log space. The noise has to cover what the model covers: the variance of the weights decides
    whether this works (see :func:`effective_sample_size_from_log_weights`).

    Args:
      f_data: $f_\theta(x_i)$ on data, any shape.
      log_weights: $f_\theta(z_b) - \log q(z_b)$ on noise, any shape, both terms in the same units.
      state: the running estimate.
      gamma: $\gamma$ in (0, 1]; 1 forgets everything and gives the self-normalized importance-sampling gradient.
      previous_log_weights: the same samples' log weights at the previous parameters, or None.

    Returns:
      A loss whose value is the estimate $-\frac1n\sum_if(x_i) + \log u$ and whose gradient is $G$, and the new state,
      which is not differentiated: use ``jax.value_and_grad(..., has_aux=True)``. If all weights are zero, the estimate
      of $Z$ stays and the second sum of $G$ is zero.

    Raises:
      ValueError: if ``gamma`` is out of range, there is no sample, or a concrete log weight is NaN or plus infinity.

    Example:
      A Gaussian of unknown mean, $f = -(x-\theta)^2/2$, from standard normal noise:

      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import meco_init, meco_loss
      >>> f = lambda theta, x: -0.5 * (x - theta) ** 2
      >>> x, z = 0.5 + jax.random.normal(jax.random.key(0), (2, 4096))
      >>> def loss(theta):
      ...     return meco_loss(f(theta, x), f(theta, z) - f(0.5, z), meco_init(), gamma=1.0)
      >>> grad, state = jax.grad(loss, has_aux=True)(0.0)
      >>> bool(jnp.abs(grad + x.mean()) < 0.1)
      True

    References:
      Jiang, Qin, Wu, Chen, Yang, Zhang, Learning Unnormalized Statistical Models via Compositional Optimization, ICML
      2023, https://arxiv.org/abs/2306.07485. There is no official code; the estimator is the standard moving average
      for this composition, the second form its recursive variant.
    """
    check_range("gamma", gamma, 0.0, 1.0, open_low=True)
    _check_log_weights(log_weights)
    dtype = sum_dtype(f_data, log_weights)
    f_data, log_weights = f_data.astype(dtype), log_weights.astype(dtype)
    gamma = jnp.asarray(gamma, dtype)
    old = state.log_normalizer.astype(dtype)
    fresh = jax.lax.stop_gradient(_log_mean_exp(log_weights))

    averaged = jnp.logaddexp(jnp.log1p(-gamma) + old, jnp.log(gamma) + fresh)
    if previous_log_weights is not None:
        previous = jax.lax.stop_gradient(_log_mean_exp(previous_log_weights.astype(dtype)))
        largest = jnp.maximum(jnp.maximum(fresh, old), previous)
        corrected = jnp.exp(fresh - largest) + (1 - gamma) * (jnp.exp(old - largest) - jnp.exp(previous - largest))
        positive = corrected > 0
        averaged = jnp.where(positive, largest + jnp.log(jnp.where(positive, corrected, 1)), averaged)
    updated = jnp.where(state.count == 0, fresh, averaged)
    updated = jnp.where(jnp.isneginf(fresh), old, updated)

    weights = jax.lax.stop_gradient(jnp.exp(log_weights - updated))
    finite = jnp.where(jnp.isneginf(log_weights), 0, log_weights)
    linear = -jnp.mean(f_data) + jnp.mean(jnp.where(weights > 0, weights * finite, 0))
    value = -jnp.mean(f_data) + updated
    loss = jax.lax.stop_gradient(value) + (linear - jax.lax.stop_gradient(linear))
    return loss, MecoState(updated.astype(state.log_normalizer.dtype), state.count + 1)


def effective_sample_size_from_log_weights(log_weights: Float[Array, "..."]) -> Float[Array, ""]:
    r"""How many equal weights would be worth these: $(\sum_bw_b)^2/\sum_bw_b^2$.

    Between 1 (one sample carries all the weight, and the estimate of $Z$ is not to be trusted) and the number of
    samples. For noise $N(0,1)$ and a model $N(R,1)$ it is about $Be^{-R^2}$. ``poise.fdistill.effective_sample_size``
    is the same number of weights that are not logarithms.

    Args:
      log_weights: $f(z_b) - \log q(z_b)$, any shape.

    Returns:
      The number; 0 if all weights are zero.

    Raises:
      ValueError: if there is no sample, or a concrete log weight is NaN or plus infinity.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import effective_sample_size_from_log_weights
      >>> [float(effective_sample_size_from_log_weights(jnp.array(w))) for w in ([2.0, 2.0, 2.0], [0.0, -jnp.inf])]
      [3.0, 1.0]
    """
    _check_log_weights(log_weights)
    wide = log_weights.astype(sum_dtype(log_weights))
    largest = jax.lax.stop_gradient(jnp.max(wide))
    weights = jnp.exp(wide - jnp.where(jnp.isneginf(largest), 0, largest))
    squares = jnp.sum(weights**2)
    return jnp.where(squares > 0, jnp.sum(weights) ** 2 / jnp.where(squares > 0, squares, 1), 0)


def nce_loss(
    f_data: Float[Array, "n"],
    log_q_data: Float[Array, "n"],
    f_noise: Float[Array, "m"],
    log_q_noise: Float[Array, "m"],
    log_z: ArrayLike,
) -> Float[Array, ""]:
    r"""Noise-contrastive estimation, the baseline: tells data from noise by $f - c - \log q$ with a learned $c$.

    $$-\frac1n\sum_i\log\sigma(r(x_i)) - \frac1m\sum_b\log\sigma(-r(z_b)), \qquad r = f_\theta - c - \log q.$$

    Args:
      f_data: $f_\theta$ on data.
      log_q_data: the noise's log density on data.
      f_noise: $f_\theta$ on noise.
      log_q_noise: the noise's log density there.
      log_z: $c$, a parameter to be trained along with $\theta$; in the optimum $\log Z(\theta)$.

    Returns:
      The loss.

    Raises:
      ValueError: if a concrete log density is not finite.

    Example:
      Where the model is the noise there is nothing to tell:

      >>> import jax.numpy as jnp
      >>> from poise.optim import nce_loss
      >>> x = jnp.array([0.1, -0.2])
      >>> bool(jnp.isclose(nce_loss(x, x, x, x, 0.0), 2 * jnp.log(2.0)))
      True

    References:
      Gutmann, Hyvärinen, Noise-contrastive estimation: A new estimation principle for unnormalized statistical models,
      AISTATS 2010.
    """
    for name, log_q in (("log_q_data", log_q_data), ("log_q_noise", log_q_noise)):
        known = concrete(log_q)
        if known is not None and not np.isfinite(known.astype(np.float64)).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values")
    data, noise = f_data - log_z - log_q_data, f_noise - log_z - log_q_noise
    return -jnp.mean(jax.nn.log_sigmoid(data)) - jnp.mean(jax.nn.log_sigmoid(-noise))
