"""Gaussian mixtures, on which densities, scores and denoisers are exact at every noise level."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from poise.core.arguments import check_range, is_concrete
from poise.core.arrays import at_least_float32

Pointwise = Callable[..., Array]
Level = Float[Array, "..."] | float | int


class GaussianMixture(NamedTuple):
    r"""$\sum_k w_k N(\mu_k, \Sigma_k)$; noise of level $\sigma$ makes it $\sum_k w_k N(\mu_k, \Sigma_k + \sigma^2 I)$.

    A pytree, so it can be differentiated, carried and passed through ``jit``. All methods take points ``[..., d]`` and
    a noise level that is one number or one for each point; 0 is the clean mixture.

    Attributes:
      weights: $w_k$, of sum 1.
      means: $\mu_k$.
      covs: covariances $\Sigma_k$ of shape ``[K, d, d]``, or of shape ``[K]`` the *standard deviations* $s_k$ of
        isotropic components, $\Sigma_k = s_k^2 I$.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.fdistill import GaussianMixture
      >>> gm = GaussianMixture(jnp.array([0.5, 0.5]), jnp.array([[-2.0], [2.0]]), jnp.array([0.5, 0.5]))
      >>> [round(x, 3) for x in gm.denoise(jnp.array([[0.0], [2.5]]), 0.5)[:, 0].tolist()]
      [0.0, 2.25]
      >>> gm.sample(jax.random.key(0), 3).shape
      (3, 1)

    References:
      The same object serves as the toy example of Karras et al., "Guiding a Diffusion Model with a Bad Version of
      Itself", https://arxiv.org/abs/2406.02507
    """

    weights: Float[Array, " components"]
    means: Float[Array, "components dim"]
    covs: Float[Array, " components"] | Float[Array, "components dim dim"]

    @property
    def isotropic(self) -> bool:
        """Whether ``covs`` holds standard deviations."""
        return jnp.ndim(self.covs) == 1

    def log_prob(self, x: Float[Array, "*batch dim"], sigma: Level = 0.0) -> Float[Array, "*batch"]:
        r"""$\log q_\sigma(x)$, by log-sum-exp over the components.

        Args:
          x: points.
          sigma: noise level, one number or ``[...]``.

        Returns:
          The log density; finite however far away a point lies.

        Raises:
          ValueError: if shapes don't fit, weights don't sum to 1, a scale isn't positive, or a level is negative.
        """
        return self._evaluate(_log_prob, x, sigma)

    def responsibilities(self, x: Float[Array, "*batch dim"], sigma: Level = 0.0) -> Float[Array, "*batch components"]:
        r"""$\gamma_k(x)$, the probability that a point came from each component.

        Args:
          x: points.
          sigma: noise level.

        Returns:
          Probabilities of sum 1.

        Raises:
          ValueError: as :meth:`log_prob`.
        """
        return self._evaluate(_responsibilities, x, sigma)

    def score(self, x: Float[Array, "*batch dim"], sigma: Level = 0.0) -> Float[Array, "*batch dim"]:
        r"""$\nabla\log q_\sigma(x) = \sum_k \gamma_k (\Sigma_k+\sigma^2 I)^{-1}(\mu_k - x)$.

        Args:
          x: points.
          sigma: noise level.

        Returns:
          The score.

        Raises:
          ValueError: as :meth:`log_prob`.
        """
        return self._evaluate(_score, x, sigma)

    def denoise(self, x: Float[Array, "*batch dim"], sigma: Level) -> Float[Array, "*batch dim"]:
        r"""$E[x_0 \mid x_\sigma = x] = x + \sigma^2\nabla\log q_\sigma(x)$, the ideal denoiser.

        Args:
          x: noised points.
          sigma: noise level.

        Returns:
          The posterior mean of the clean point.

        Raises:
          ValueError: as :meth:`log_prob`.
        """
        return self._evaluate(_denoise, x, sigma)

    def sample(self, key: PRNGKeyArray, num: int, sigma: Level = 0.0) -> Float[Array, "{num} dim"]:
        """Draws points.

        Args:
          key: a random key.
          num: how many.
          sigma: noise level, one number or ``[num]``.

        Returns:
          The points.

        Raises:
          ValueError: as :meth:`log_prob`, or if ``num`` is negative.
        """
        if num < 0:
            raise ValueError(f"num must be at least 0, got {num}")
        pick, inner, outer = jax.random.split(key, 3)
        dim, dtype = self.means.shape[1], at_least_float32(self.means).dtype
        self._check((num, dim), sigma)
        component = jax.random.categorical(pick, _log_weights(self), shape=(num,))
        z = jax.random.normal(inner, (num, dim), dtype)
        if self.isotropic:
            offset = self.covs[component][:, None] * z
        else:  # a square root that covariances of deficient rank have too
            values, vectors = jnp.linalg.eigh(self.covs)
            root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[:, None, :]
            offset = jnp.einsum("nij,nj->ni", root[component], z)
        noise = jnp.asarray(sigma, dtype).reshape(-1, 1) * jax.random.normal(outer, (num, dim), dtype)
        return self.means[component] + offset + noise

    def _evaluate(self, pointwise: Pointwise, x: Array, sigma: Level) -> Array:
        self._check(x.shape, sigma)
        x = at_least_float32(x)
        x = x.astype(jnp.promote_types(x.dtype, self.means.dtype))
        batch = x.shape[:-1]
        sigma = jnp.asarray(sigma, x.dtype)
        sigma = sigma.reshape(()) if sigma.size == 1 else jnp.broadcast_to(sigma, batch).reshape(-1)
        out = _over_points(pointwise, self, x.reshape(-1, x.shape[-1]), sigma)
        return out.reshape(*batch, *out.shape[1:])

    def _check(self, shape: tuple[int, ...], sigma: Level) -> None:
        components, dim = self.means.shape
        if self.weights.shape != (components,):
            raise ValueError(f"weights must have shape {(components,)}, one per mean, got {self.weights.shape}")
        if self.covs.shape not in ((components,), (components, dim, dim)):
            raise ValueError(
                f"covs must have shape {(components,)} (standard deviations) or {(components, dim, dim)} "
                f"(covariances), got {self.covs.shape}"
            )
        if not shape or shape[-1] != dim:
            raise ValueError(f"x must have a last axis of size {dim}, got shape {shape}")
        check_range("sigma", sigma, low=0.0)
        check_range("weights", self.weights, low=0.0)
        if is_concrete(self.weights) and not abs(float(np.asarray(self.weights, np.float64).sum()) - 1) < 1e-4:
            raise ValueError(f"weights must sum to 1, got {float(np.asarray(self.weights, np.float64).sum())}")
        if self.isotropic:
            check_range("covs (standard deviations)", self.covs, low=0.0)


def _log_weights(gm: GaussianMixture) -> Array:
    weights = at_least_float32(gm.weights)
    return jnp.where(weights > 0, jnp.log(jnp.where(weights > 0, weights, 1.0)), -jnp.inf)


def _cholesky(gm: GaussianMixture, s: Array) -> Array:
    return jnp.linalg.cholesky(gm.covs + s**2 * jnp.eye(gm.means.shape[1], dtype=gm.covs.dtype))


def _joint(gm: GaussianMixture, x: Array, s: Array) -> Array:
    """Log of weight times component density, at one point."""
    offset, dim = gm.means - x, x.shape[0]
    if gm.isotropic:
        variance = gm.covs**2 + s**2
        squares, log_det = jnp.sum(offset**2, axis=1) / variance, dim * jnp.log(variance)
    else:
        root = _cholesky(gm, s)
        white = jax.vmap(lambda l, b: jax.scipy.linalg.solve_triangular(l, b, lower=True))(root, offset)
        squares = jnp.sum(white**2, axis=1)
        log_det = 2.0 * jnp.sum(jnp.log(jnp.diagonal(root, axis1=1, axis2=2)), axis=1)
    return _log_weights(gm) - 0.5 * (squares + log_det + dim * math.log(2.0 * math.pi))


def _pull(gm: GaussianMixture, x: Array, s: Array) -> Array:
    """Every component's own score at one point."""
    offset = gm.means - x
    if gm.isotropic:
        return offset / (gm.covs**2 + s**2)[:, None]
    return jax.vmap(lambda l, b: jax.scipy.linalg.cho_solve((l, True), b))(_cholesky(gm, s), offset)


def _log_prob(gm: GaussianMixture, x: Array, s: Array) -> Array:
    return jax.nn.logsumexp(_joint(gm, x, s))


def _responsibilities(gm: GaussianMixture, x: Array, s: Array) -> Array:
    return jax.nn.softmax(_joint(gm, x, s))


def _score(gm: GaussianMixture, x: Array, s: Array) -> Array:
    return _responsibilities(gm, x, s) @ _pull(gm, x, s)


def _denoise(gm: GaussianMixture, x: Array, s: Array) -> Array:
    gamma = _responsibilities(gm, x, s)
    if gm.isotropic:
        variance = (gm.covs**2)[:, None]
        return gamma @ ((variance * x + s**2 * gm.means) / (variance + s**2))
    # mu - Sigma (Sigma + s^2)^-1 (mu - x), without the cancellation of x + s^2 score at high noise
    return gamma @ (gm.means - jnp.einsum("kij,kj->ki", gm.covs, _pull(gm, x, s)))


@functools.partial(jax.jit, static_argnums=0)
def _over_points(pointwise: Pointwise, gm: GaussianMixture, x: Array, sigma: Array) -> Array:
    return jax.vmap(functools.partial(pointwise, gm), in_axes=(0, 0 if sigma.ndim else None))(x, sigma)
