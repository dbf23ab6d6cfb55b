"""An f-divergence as a value, and its evaluation in log space."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32

Pointwise = Callable[[Array], Array]


class FDivergence(NamedTuple):
    r"""A divergence $D_f(p\|q) = E_q[f(p/q)]$ with convex $f$, $f(1)=0$, as a value.

    All functions act elementwise and are differentiable. The value holds functions, so it is static under ``jit``:
    close over it, don't pass it as an argument.

    Attributes:
      name: the divergence's name.
      f: $f(r)$ for ratios $r = p/q > 0$.
      f_prime: $f'(r)$.
      f_second: $f''(r)$.
      log_weight: $\log h$ as a function of $\ell = \log r$, with $h(r) = r^2 f''(r)$; free of overflow.
      weight_at_one: $h(1) = f''(1)$.
      bounded: whether $D_f$ is bounded over all pairs of distributions, so that its gradient saturates.
      perspective: $(\log p, \log q) \mapsto q f(p/q)$ in log space, for densities that underflow; None means that it
        is built from ``f``.

    Example:
      >>> from poise.fdistill import divergence
      >>> js = divergence("jensen_shannon")
      >>> js.weight_at_one, js.bounded
      (0.5, True)
    """

    name: str
    f: Pointwise
    f_prime: Pointwise
    f_second: Pointwise
    log_weight: Pointwise
    weight_at_one: float
    bounded: bool
    perspective: Callable[[Array, Array], Array] | None = None


def times(log_a: Array, b: Array) -> Array:
    """``exp(log_a) * b`` with ``0 * inf = 0``."""
    zero = jnp.isneginf(log_a)
    return jnp.where(zero, 0.0, jnp.exp(log_a) * jnp.where(zero, 0.0, b))


def two_sided(ratio: Array, below: Pointwise, above: Pointwise) -> Array:
    """``below`` where the log-ratio is at most 0, else ``above``; each sees its own side only (finite gradients)."""
    negative = ratio <= 0
    return jnp.where(negative, below(jnp.where(negative, ratio, 0.0)), above(jnp.where(negative, 1.0, ratio)))


def perspective_from_f(f: Pointwise, log_p: Array, log_q: Array) -> Array:
    """``q f(p/q)`` from the generator alone; f sees no ratio whose fourth power leaves the number format."""
    reach = -math.log(float(jnp.finfo(log_p.dtype).tiny)) / 4.0
    return two_sided(
        log_p - log_q,
        lambda l: times(log_q, f(jnp.exp(jnp.maximum(l, -reach)))),
        lambda l: times(log_p, f(jnp.exp(jnp.minimum(l, reach))) * jnp.exp(-jnp.minimum(l, reach))),
    )


def scale(div: FDivergence, factor: float | int) -> FDivergence:
    r"""The divergence $c D_f$, with $f$ and $h$ multiplied by a positive constant.

    Args:
      div: the divergence.
      factor: $c > 0$.

    Returns:
      The scaled divergence.

    Raises:
      ValueError: if ``factor`` is not positive and finite.

    Example:
      >>> from poise.fdistill import divergence, scale
      >>> scale(divergence("squared_hellinger"), 4.0).weight_at_one
      1.0
    """
    check_range("factor", factor, low=0.0, high=math.inf, open_low=True, open_high=True)
    factor = float(factor)
    perspective = div.perspective or partial(perspective_from_f, div.f)
    return FDivergence(
        name=f"{factor:g}*{div.name}",
        f=lambda r: factor * div.f(r),
        f_prime=lambda r: factor * div.f_prime(r),
        f_second=lambda r: factor * div.f_second(r),
        log_weight=lambda l: math.log(factor) + div.log_weight(l),
        weight_at_one=factor * div.weight_at_one,
        bounded=div.bounded,
        perspective=lambda log_p, log_q: factor * perspective(log_p, log_q),
    )


def f_weight(div: FDivergence, log_ratio: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    r"""The weight $h(r) = r^2 f''(r)$ at log-ratios $\ell = \log p/q$, computed as $\exp(\log h(\ell))$.

    Args:
      div: the divergence.
      log_ratio: $\ell$, any shape; narrower types than float32 are widened to it.

    Returns:
      $h$, of the same shape; it may overflow to inf (Pearson beyond $\ell = 44$ in float32) but is never NaN.
      :func:`normalized_weight` doesn't overflow.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import divergence, f_weight
      >>> f_weight(divergence("jensen_shannon"), jnp.array([-80.0, 0.0, 80.0])).round(4).tolist()
      [0.0, 0.5, 1.0]

    References:
      arXiv 2502.15681, Theorem 1, https://arxiv.org/abs/2502.15681
    """
    return jnp.exp(div.log_weight(at_least_float32(log_ratio)))


def f_divergence(
    div: FDivergence,
    log_p: Float[Array, "*shape"],
    log_q: Float[Array, "*shape"],
    log_measure: Float[Array, "*shape"],
) -> Float[Array, ""]:
    r"""The divergence by quadrature or over a finite set: $\sum_i m_i\, q_i f(p_i/q_i)$.

    Every term is formed in log space, so densities may underflow, and either may vanish (``-inf``): the usual limits
    $0 f(0/0) = 0$, $q f(0)$ and $p \lim f(r)/r$ hold.

    Args:
      div: the divergence.
      log_p: log density of the teacher at the nodes.
      log_q: log density of the student at the nodes.
      log_measure: log of the quadrature weights; zeros for probability vectors; $-\log n - \log q_i$ for $n$ samples
        drawn from ``q``.

    Returns:
      The divergence, a scalar: finite or inf.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import divergence, f_divergence
      >>> p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([0.25, 0.25, 0.5])
      >>> round(float(f_divergence(divergence("forward_kl"), jnp.log(p), jnp.log(q), jnp.zeros(3))), 4)
      0.6931
      >>> float(f_divergence(divergence("reverse_kl"), jnp.log(p), jnp.log(q), jnp.zeros(3)))
      inf
    """
    log_p, log_q, log_measure = (at_least_float32(x) for x in (log_p, log_q, log_measure))
    empty = (jnp.isneginf(log_p) & jnp.isneginf(log_q)) | jnp.isneginf(log_measure)
    # The perspective is homogeneous of degree one, so the measure belongs to both densities.
    p_mass = jnp.where(empty, 0.0, log_p + log_measure)
    q_mass = jnp.where(empty, 0.0, log_q + log_measure)
    perspective = div.perspective or partial(perspective_from_f, div.f)
    return jnp.sum(jnp.where(empty, 0.0, perspective(p_mass, q_mass)))
