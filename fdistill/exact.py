"""The ground truth of distillation between one-dimensional mixtures: divergences and gradients by quadrature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.fdistill.divergence_type import FDivergence, f_divergence
from poise.fdistill.mixture import GaussianMixture, Level

_REACH = 9.0  # standard deviations to each side; the mass beyond is 2e-19


class MixtureGradient(NamedTuple):
    """A derivative with respect to the parameters of a one-dimensional mixture.

    Attributes:
      means: with respect to every mean.
      stds: with respect to every standard deviation.
    """

    means: Float[Array, " components"]
    stds: Float[Array, " components"]


class WeightMoments(NamedTuple):
    r"""Moments of the weight $h(r(x))$ under the student.

    Attributes:
      mean: $E_q[h]$.
      variance: $Var_q[h]$; over the squared mean it is the variance of the normalised weight.
    """

    mean: Float[Array, ""]
    variance: Float[Array, ""]


def _stds(gm: GaussianMixture) -> Array:
    return gm.covs if gm.isotropic else jnp.sqrt(gm.covs[:, 0, 0])


def _check(teacher: GaussianMixture, student: GaussianMixture, sigma: Level, num_nodes: int) -> None:
    for name, gm in (("teacher", teacher), ("student", student)):
        if gm.means.shape[1] != 1:
            raise ValueError(f"{name} must be one-dimensional, got dimension {gm.means.shape[1]}")
    if jnp.ndim(sigma) != 0:
        raise ValueError(f"sigma must be one number, got shape {jnp.shape(sigma)}")
    if num_nodes < 3:
        raise ValueError(f"num_nodes must be at least 3, got {num_nodes}")


class _Tail(NamedTuple):
    """The widest component of a mixture, noise included: it rules both tails."""

    mean: Array
    precision: Array


def _tail(gm: GaussianMixture, sigma: Level) -> _Tail:
    variance = jnp.where(gm.weights > 0, _stds(gm) ** 2, -jnp.inf)
    widest = jnp.argmax(variance)
    return _Tail(gm.means[widest, 0], 1.0 / (variance[widest] + jnp.asarray(sigma, variance.dtype) ** 2))


def _growth(div: FDivergence, dtype) -> tuple[Array, Array]:
    """The powers of the ratio that the weight follows at ratios near zero and near infinity."""
    low, high = div.log_weight(jnp.array([-60.0, -40.0], dtype)), div.log_weight(jnp.array([40.0, 60.0], dtype))
    return (low[1] - low[0]) / 20.0, (high[1] - high[0]) / 20.0


def _integrand_tail(div: FDivergence, teacher, student, sigma: Level, times: float = 1.0) -> _Tail:
    """The Gaussian that ``q h^times`` follows far out; of precision at most 0 where its integral diverges."""
    p, q = _tail(teacher, sigma), _tail(student, sigma)
    at_zero, at_infinity = _growth(div, p.precision.dtype)
    power = times * jnp.where(p.precision < q.precision, at_infinity, at_zero)
    precision = power * p.precision + (1.0 - power) * q.precision
    weighted = power * p.precision * p.mean + (1.0 - power) * q.precision * q.mean
    return _Tail(weighted / jnp.where(precision > 0, precision, 1.0), precision)


def _nodes(teacher, student, sigma: Level, num_nodes: int, tail: _Tail) -> tuple[Array, Array]:
    """Points and log weights of the trapezoidal rule, which is spectrally accurate on densities that decay."""
    means = jnp.concatenate([teacher.means[:, 0], student.means[:, 0], tail.mean[None]])
    variances = jnp.concatenate([_stds(teacher) ** 2, _stds(student) ** 2]) + jnp.asarray(sigma, means.dtype) ** 2
    finite = tail.precision > 1e-4 * jnp.max(1.0 / variances)
    widths = jnp.append(
        jnp.sqrt(variances), jnp.where(finite, jax.lax.rsqrt(jnp.where(finite, tail.precision, 1.0)), 0.0)
    )
    means = means.at[-1].set(jnp.where(finite, tail.mean, means[0]))
    low, high = jnp.min(means - _REACH * widths), jnp.max(means + _REACH * widths)
    low, high = jax.lax.stop_gradient((low, high))
    step = (high - low) / (num_nodes - 1)
    x = low + step * jnp.arange(num_nodes, dtype=means.dtype)
    return x, jnp.full_like(x, jnp.log(step))


def _wide(gm: GaussianMixture) -> GaussianMixture:
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), gm)


def exact_divergence(
    div: FDivergence, teacher: GaussianMixture, student: GaussianMixture, sigma: Level = 0.0, num_nodes: int = 4001
) -> Float[Array, ""]:
    r"""$D_f(p_\sigma\|q_\sigma)$ between two one-dimensional mixtures, by quadrature.

    Differentiable with respect to both mixtures. Where the integral diverges the value is inf, which is decided
    exactly: with widest variances $V_p, V_q$ (noise included) and a weight that grows like $r^a$ in the tails,
    $a/V_p + (1-a)/V_q$ must be positive. So Pearson's needs $V_p < 2V_q$ and Neyman's $V_q < 2V_p$.

    Args:
      div: the divergence.
      teacher: $p$.
      student: $q$.
      sigma: noise level of both.
      num_nodes: nodes of the quadrature.

    Returns:
      The divergence: finite or inf, never NaN.

    Raises:
      ValueError: if a mixture isn't one-dimensional, ``sigma`` isn't one number, or ``num_nodes`` is below 3.

    Example:
      Forward KL of two unit Gaussians two apart is 2:

      >>> import jax.numpy as jnp
      >>> from poise.fdistill import GaussianMixture, divergence, exact_divergence
      >>> p, q = (GaussianMixture(jnp.ones(1), jnp.array([[m]]), jnp.ones(1)) for m in (2.0, 0.0))
      >>> round(float(exact_divergence(divergence("forward_kl"), p, q)), 4)
      2.0
    """
    _check(teacher, student, sigma, num_nodes)
    teacher, student = _wide(teacher), _wide(student)
    tail = _integrand_tail(div, teacher, student, sigma)
    x, log_step = _nodes(teacher, student, sigma, num_nodes, tail)
    value = f_divergence(div, teacher.log_prob(x[:, None], sigma), student.log_prob(x[:, None], sigma), log_step)
    return jnp.where(tail.precision > 0, value, jnp.inf)


def exact_gradient(
    div: FDivergence, teacher: GaussianMixture, student: GaussianMixture, sigma: Level = 0.0, num_nodes: int = 4001
) -> MixtureGradient:
    r"""The gradient of $D_f(p_\sigma\|q_\sigma)$ in the student's means and deviations, by the weighted-score theorem.

    $$\partial_\theta D_f = -\int q_\sigma\, h(p_\sigma/q_\sigma)\,
    (\nabla\log p_\sigma - \nabla\log q_\sigma)\, v_\theta\, dx$$

    with the velocities $v_{\mu_k} = \gamma_k(x)$ and $v_{s_k} = \gamma_k(x)\, s_k (x-\mu_k)/(s_k^2+\sigma^2)$ of
    samples $\mu_k + s_k z + \sigma\epsilon$. It equals the derivative of :func:`exact_divergence`.

    Args:
      div: the divergence.
      teacher: $p$.
      student: $q$.
      sigma: noise level of both.
      num_nodes: nodes of the quadrature.

    Returns:
      The gradient; infinite (in no certain direction) where the integral diverges or overflows, never NaN.

    Raises:
      ValueError: as :func:`exact_divergence`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import GaussianMixture, divergence, exact_gradient
      >>> p, q = (GaussianMixture(jnp.ones(1), jnp.array([[m]]), jnp.ones(1)) for m in (2.0, 0.0))
      >>> round(float(exact_gradient(divergence("reverse_kl"), p, q).means[0]), 4)
      -2.0

    References:
      arXiv 2502.15681, Theorem 1, https://arxiv.org/abs/2502.15681
    """
    _check(teacher, student, sigma, num_nodes)
    teacher, student = _wide(teacher), _wide(student)
    tail = _integrand_tail(div, teacher, student, sigma)
    nodes, log_step = _nodes(teacher, student, sigma, num_nodes, tail)
    x = nodes[:, None]
    log_q = student.log_prob(x, sigma)
    log_h = div.log_weight(teacher.log_prob(x, sigma) - log_q)
    force = jnp.exp(log_q + log_h + log_step)[:, None] * (teacher.score(x, sigma) - student.score(x, sigma))
    gamma, stds = student.responsibilities(x, sigma), _stds(student)
    shape = stds * (x - student.means[:, 0]) / (stds**2 + jnp.asarray(sigma, x.dtype) ** 2)

    def settle(gradient):
        gradient = jnp.where(jnp.isnan(gradient), jnp.inf, gradient)  # terms of both signs that overflow
        return jnp.where(tail.precision > 0, gradient, jnp.copysign(jnp.inf, gradient))

    return MixtureGradient(
        means=settle(-jnp.sum(force * gamma, axis=0)), stds=settle(-jnp.sum(force * gamma * shape, axis=0))
    )


def weight_moments(
    div: FDivergence, teacher: GaussianMixture, student: GaussianMixture, sigma: Level = 0.0, num_nodes: int = 4001
) -> WeightMoments:
    r"""Mean and variance of the weight $h(p_\sigma/q_\sigma)$ under the student.

    Args:
      div: the divergence.
      teacher: $p$.
      student: $q$.
      sigma: noise level of both.
      num_nodes: nodes of the quadrature.

    Returns:
      The moments; inf where they don't exist.

    Raises:
      ValueError: as :func:`exact_divergence`.

    Example:
      Forward KL's weight is the ratio itself, of mean 1 and variance $e^{\Delta^2}-1$:

      >>> import jax.numpy as jnp
      >>> from poise.fdistill import GaussianMixture, divergence, weight_moments
      >>> p, q = (GaussianMixture(jnp.ones(1), jnp.array([[m]]), jnp.ones(1)) for m in (1.0, 0.0))
      >>> [round(float(m), 3) for m in weight_moments(divergence("forward_kl"), p, q)]
      [1.0, 1.718]

    References:
      arXiv 2502.15681, Figure 4, https://arxiv.org/abs/2502.15681
    """
    _check(teacher, student, sigma, num_nodes)
    teacher, student = _wide(teacher), _wide(student)
    once = _integrand_tail(div, teacher, student, sigma)
    twice = _integrand_tail(div, teacher, student, sigma, times=2.0)
    nodes, log_step = _nodes(teacher, student, sigma, num_nodes, twice)
    x = nodes[:, None]
    log_q = student.log_prob(x, sigma)
    log_h = div.log_weight(teacher.log_prob(x, sigma) - log_q)
    mean = jnp.sum(jnp.exp(log_q + log_h + log_step))
    # q (h - mean)^2 as a square of products, which don't overflow where q is tiny
    half, overflow = 0.5 * (log_q + log_step), jnp.isinf(mean)
    variance = jnp.sum((jnp.exp(half + log_h) - jnp.where(overflow, 0.0, mean) * jnp.exp(half)) ** 2)
    return WeightMoments(
        mean=jnp.where(once.precision > 0, mean, jnp.inf),
        variance=jnp.where((twice.precision > 0) & ~overflow, variance, jnp.inf),
    )
