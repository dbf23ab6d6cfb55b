"""Fréchet distance between Gaussians, and so between the moments of two sample sets."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.metrics.features import check_array, check_pair
from poise.metrics.moments import moments


def frechet(
    mu1: Float[ArrayLike, " dim"],
    cov1: Float[ArrayLike, "dim dim"],
    mu2: Float[ArrayLike, " dim"],
    cov2: Float[ArrayLike, "dim dim"],
) -> Float[Array, ""]:
    r"""Fréchet distance (squared 2-Wasserstein distance) between two Gaussians.

    $$d = |\mu_1-\mu_2|^2 + \mathrm{tr}\, C_1 + \mathrm{tr}\, C_2 - 2\, \mathrm{tr} (C_1 C_2)^{1/2}.$$

    The last trace is the sum of the singular values of $C_1^{1/2} C_2^{1/2}$, which are the square roots of the
    eigenvalues of $C_1^{1/2} C_2 C_1^{1/2}$: real by construction for singular covariances too, as those of fewer
    samples than features are. Negative eigenvalues of a covariance count as 0, and so does a negative distance.

    Gradients exist for repeated eigenvalues too. Along directions in which a covariance is singular, the distance has
    no derivative or an infinite one; those parts of the gradient are 0.

    Computed in the dtype of the moments (float32 for 16-bit ones). The square root of a singular covariance costs
    digits: about 4 are left of float32. Values that are to be published are best computed from float64 moments under
    ``jax.enable_x64()``; see :func:`init_moments`.

    Args:
      mu1: the first mean.
      cov1: the first covariance; its symmetric part counts.
      mu2: the second mean.
      cov2: the second covariance; its symmetric part counts.

    Returns:
      The distance, in the units of the features squared. Values that are not finite spread under ``jit``.

    Raises:
      TypeError: if an argument does not hold real floating numbers.
      ValueError: if a mean is not a vector or a covariance not a matrix, if sizes disagree, or if a concrete value is
        not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import frechet
      >>> mu, cov = jnp.zeros(2), jnp.diag(jnp.array([1.0, 4.0]))
      >>> round(float(frechet(mu, cov, mu + 1, 4 * cov)), 4)  # 2 from the means, 5 from the covariances
      7.0

    References:
      Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
      Local Nash Equilibrium", https://arxiv.org/abs/1706.08500; Dowson, Landau, "The Fréchet distance between
      multivariate normal distributions", Journal of Multivariate Analysis 1982,
      https://doi.org/10.1016/0047-259X(82)90077-X. Official codes take a matrix square root of the product, whose
      imaginary parts they drop.
    """
    mu1, mu2 = check_array("mu1", mu1, rank=1), check_array("mu2", mu2, rank=1)
    cov1, cov2 = check_array("cov1", cov1, rank=2), check_array("cov2", cov2, rank=2)
    dim = len(mu1)
    for name, value, shape in (("mu2", mu2, (dim,)), ("cov1", cov1, (dim, dim)), ("cov2", cov2, (dim, dim))):
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, as mu1 has shape {mu1.shape}, got {value.shape}")
    if dim < 1:
        raise ValueError(f"mu1 must hold at least one feature, got shape {mu1.shape}")
    return _frechet(mu1, cov1, mu2, cov2)


def frechet_distance(features1: Float[ArrayLike, "n dim"], features2: Float[ArrayLike, "m dim"]) -> Float[Array, ""]:
    """Fréchet distance between the moments of two sample sets.

    Args:
      features1: samples of one distribution, one a row.
      features2: samples of the other.

    Returns:
      :func:`frechet` of the two means and unbiased covariances, in the dtype of the samples (float32 for 16-bit ones)
      and in their units squared.

    Raises:
      TypeError: if the samples are not real floating numbers.
      ValueError: if a sample set is not a matrix, holds fewer than 2 samples or a value that is not finite, or if the
        numbers of features differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.metrics import frechet_distance
      >>> x = jnp.array([[0.0], [2.0], [4.0]])
      >>> round(float(frechet_distance(x, x + 3)), 4)
      9.0

    References:
      Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs Trained by a Two Time-Scale Update Rule Converge to a
      Local Nash Equilibrium", https://arxiv.org/abs/1706.08500.
    """
    features1, features2 = check_pair(("features1", features1), ("features2", features2))
    return frechet(*moments(features1), *moments(features2))


@jax.jit
def _frechet(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> Array:
    distance = jnp.sum((mu1 - mu2) ** 2) + jnp.trace(cov1) + jnp.trace(cov2) - 2 * _trace_root(cov1, cov2)
    return jnp.maximum(distance, 0)


def _factor(cov: Array) -> tuple[Array, Array]:
    r"""A square root $A$ with $A A^\top = C$ and the transpose of its pseudo-inverse, for a symmetric matrix $C$."""
    values, vectors = jnp.linalg.eigh(cov)
    values = jnp.maximum(values, 0)
    cutoff = jnp.finfo(cov.dtype).eps * len(cov) * values[-1]
    regular = values > cutoff
    inverse_root = jnp.where(regular, 1 / jnp.sqrt(jnp.where(regular, values, 1)), 0)
    return vectors * jnp.sqrt(values), vectors * inverse_root


@jax.custom_jvp
def _trace_root(cov1: Array, cov2: Array) -> Array:
    """The trace of $(C_1 C_2)^{1/2}$."""
    factor1, factor2 = _factor(cov1)[0], _factor(cov2)[0]
    product = jnp.matmul(factor1.T, factor2, precision="highest")
    return jnp.linalg.svd(product, compute_uv=False).sum()


@_trace_root.defjvp
def _trace_root_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    # The derivative is that of optimal transport: half the linear map that carries the first Gaussian to the second
    # with respect to the first covariance, half its inverse with respect to the second. Differentiating the
    # decompositions instead would divide by differences of eigenvalues, which may be 0.
    (factor1, inverse1), (factor2, inverse2) = map(_factor, primals)
    product = jnp.matmul(factor1.T, factor2, precision="highest")
    left, values, right = jnp.linalg.svd(product, full_matrices=False)
    regular = values > jnp.finfo(values.dtype).eps * len(values) * values[0]
    polar = jnp.matmul(left * regular, right, precision="highest")
    there = jnp.linalg.multi_dot([factor2, polar.T, inverse1.T], precision="highest")
    back = jnp.linalg.multi_dot([factor1, polar, inverse2.T], precision="highest")
    derivative = jnp.sum((there + there.T) * tangents[0]) + jnp.sum((back + back.T) * tangents[1])
    return values.sum(), 0.25 * derivative
