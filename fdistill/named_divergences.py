"""The f-divergences that have a name: nine without a parameter and two families."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poise.core.arguments import check_range
from poise.fdistill.divergence_type import FDivergence, times, two_sided

_LOG2 = math.log(2.0)


def _softplus(x: Array) -> Array:
    return jnp.logaddexp(x, 0.0)


def _reverse_kl() -> FDivergence:
    return FDivergence(
        name="reverse_kl",
        f=lambda r: -jnp.log(r),
        f_prime=lambda r: -1.0 / r,
        f_second=lambda r: 1.0 / r**2,
        log_weight=jnp.zeros_like,
        weight_at_one=1.0,
        bounded=False,
        perspective=lambda log_p, log_q: -times(log_q, log_p - log_q),
    )


def _softened_reverse_kl() -> FDivergence:
    return FDivergence(
        name="softened_reverse_kl",
        f=lambda r: (r + 1.0) * (jnp.log1p(r) - _LOG2 - jnp.log(r)),
        f_prime=lambda r: jnp.log1p(r) - _LOG2 - jnp.log(r) - 1.0 / r,
        f_second=lambda r: 1.0 / (r**2 * (r + 1.0)),
        log_weight=lambda l: -_softplus(l),
        weight_at_one=0.5,
        bounded=False,
        perspective=lambda log_p, log_q: times(jnp.logaddexp(log_p, log_q), _softplus(log_q - log_p) - _LOG2),
    )


def _jensen_shannon() -> FDivergence:
    return FDivergence(
        name="jensen_shannon",
        f=lambda r: jax.scipy.special.xlogy(r, r) - (r + 1.0) * (jnp.log1p(r) - _LOG2),
        f_prime=lambda r: _LOG2 + jnp.log(r) - jnp.log1p(r),
        f_second=lambda r: 1.0 / (r * (r + 1.0)),
        log_weight=lambda l: -_softplus(-l),
        weight_at_one=0.5,
        bounded=True,
        perspective=lambda log_p, log_q: (
            times(log_p, _LOG2 - _softplus(log_q - log_p)) + times(log_q, _LOG2 - _softplus(log_p - log_q))
        ),
    )


def _squared_hellinger() -> FDivergence:
    return FDivergence(
        name="squared_hellinger",
        f=lambda r: 1.0 - jnp.sqrt(r),
        f_prime=lambda r: -0.5 / jnp.sqrt(r),
        f_second=lambda r: 0.25 * r**-1.5,
        log_weight=lambda l: 0.5 * l - 2.0 * _LOG2,
        weight_at_one=0.25,
        bounded=True,
        perspective=lambda log_p, log_q: jnp.exp(log_q) - jnp.exp(0.5 * (log_p + log_q)),
    )


def _forward_kl() -> FDivergence:
    return FDivergence(
        name="forward_kl",
        f=lambda r: jax.scipy.special.xlogy(r, r),
        f_prime=lambda r: 1.0 + jnp.log(r),
        f_second=lambda r: 1.0 / r,
        log_weight=lambda l: l,
        weight_at_one=1.0,
        bounded=False,
        perspective=lambda log_p, log_q: times(log_p, log_p - log_q),
    )


def _jeffreys() -> FDivergence:
    return FDivergence(
        name="jeffreys",
        f=lambda r: (r - 1.0) * jnp.log(r),
        f_prime=lambda r: jnp.log(r) + 1.0 - 1.0 / r,
        f_second=lambda r: (r + 1.0) / r**2,
        log_weight=_softplus,
        weight_at_one=2.0,
        bounded=False,
        perspective=lambda log_p, log_q: two_sided(
            log_p - log_q,
            lambda l: times(log_q, l * jnp.expm1(l)),
            lambda l: times(log_p, -l * jnp.expm1(-l)),
        ),
    )


def _pearson_chi2() -> FDivergence:
    return FDivergence(
        name="pearson_chi2",
        f=lambda r: (r - 1.0) ** 2,
        f_prime=lambda r: 2.0 * (r - 1.0),
        f_second=lambda r: jnp.full_like(r, 2.0),
        log_weight=lambda l: 2.0 * l + _LOG2,
        weight_at_one=2.0,
        bounded=False,
        perspective=lambda log_p, log_q: two_sided(
            log_p - log_q,
            lambda l: times(log_q, jnp.expm1(l) ** 2),
            lambda l: times(log_p + l, jnp.expm1(-l) ** 2),
        ),
    )


def _neyman_chi2() -> FDivergence:
    return FDivergence(
        name="neyman_chi2",
        f=lambda r: (r - 1.0) ** 2 / r,
        f_prime=lambda r: 1.0 - 1.0 / r**2,
        f_second=lambda r: 2.0 / r**3,
        log_weight=lambda l: _LOG2 - l,
        weight_at_one=2.0,
        bounded=False,
        perspective=lambda log_p, log_q: two_sided(
            log_p - log_q,
            lambda l: times(log_q - l, jnp.expm1(l) ** 2),
            lambda l: times(log_p, jnp.expm1(-l) ** 2),
        ),
    )


def _triangular() -> FDivergence:
    return FDivergence(
        name="triangular",
        f=lambda r: (r - 1.0) ** 2 / (r + 1.0),
        f_prime=lambda r: (r - 1.0) * (r + 3.0) / (r + 1.0) ** 2,
        f_second=lambda r: 8.0 / (r + 1.0) ** 3,
        log_weight=lambda l: 3.0 * _LOG2 + 2.0 * l - 3.0 * _softplus(l),
        weight_at_one=1.0,
        bounded=True,
        perspective=lambda log_p, log_q: times(jnp.logaddexp(log_p, log_q), jnp.tanh(0.5 * (log_p - log_q)) ** 2),
    )


def alpha(a: float | int) -> FDivergence:
    r"""The alpha-divergence $f(r) = \frac{r^a - a r - (1-a)}{a(a-1)}$, with $h(r) = r^a$.

    One parameter runs through the family: $a \to 0$ is reverse KL, $a = 1/2$ four times the squared Hellinger
    distance, $a \to 1$ forward KL, $a = 2$ half of Pearson's $\chi^2$, $a = -1$ half of Neyman's.

    Args:
      a: the exponent; 0 and 1 give the two KL divergences.

    Returns:
      The divergence.

    Raises:
      ValueError: if ``a`` is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import alpha, f_weight
      >>> f_weight(alpha(2.0), jnp.log(jnp.array([1.0, 3.0]))).round(4).tolist()
      [1.0, 9.0]
      >>> alpha(0).name
      'reverse_kl'

    References:
      Cichocki, Amari, "Families of Alpha- Beta- and Gamma- Divergences" (2010), https://doi.org/10.3390/e12061532
    """
    a = float(a)
    if not math.isfinite(a):
        raise ValueError(f"a must be finite, got {a}")
    if a == 0.0:
        return _reverse_kl()
    if a == 1.0:
        return _forward_kl()

    def f(r):
        # Two equal forms; each is free of cancellation next to its own limit.
        if a < 0.5:
            return (jnp.expm1(a * jnp.log(r)) / a - (r - 1.0)) / (a - 1.0)
        return (r * jnp.expm1((a - 1.0) * jnp.log(r)) / (a - 1.0) - (r - 1.0)) / a

    def power_minus(log_p, log_q, exponent):  # p^e q^(1-e) - q, by expm1 where the two are close
        step = exponent * (log_p - log_q)
        close = jnp.abs(step) < 1.0
        near = jnp.exp(log_q) * jnp.expm1(jnp.where(close, step, 0.0))
        return jnp.where(close, near, jnp.exp(exponent * log_p + (1.0 - exponent) * log_q) - jnp.exp(log_q))

    def perspective(log_p, log_q):
        difference = jnp.exp(log_p) - jnp.exp(log_q)
        if a < 0.5:
            return (power_minus(log_p, log_q, a) / a - difference) / (a - 1.0)
        return (power_minus(log_q, log_p, 1.0 - a) / (a - 1.0) - difference) / a

    return FDivergence(
        name=f"alpha({a:g})",
        f=f,
        f_prime=lambda r: jnp.expm1((a - 1.0) * jnp.log(r)) / (a - 1.0),
        f_second=lambda r: r ** (a - 2.0),
        log_weight=lambda l: a * l,
        weight_at_one=1.0,
        bounded=0.0 < a < 1.0,
        perspective=perspective,
    )


def skew_js(pi: float | int) -> FDivergence:
    r"""The skewed Jensen-Shannon divergence $\pi KL(p\|m) + (1-\pi) KL(q\|m)$, $m = \pi p + (1-\pi) q$.

    Its weight is $h(r) = \pi(1-\pi) r / (\pi r + 1 - \pi)$; at $\pi = 1/2$ it is half of ``jensen_shannon``. Small
    $\pi$ behaves like forward KL, large $\pi$ like reverse KL.

    Args:
      pi: the share of the teacher in the mixture, strictly between 0 and 1.

    Returns:
      The divergence.

    Raises:
      ValueError: if ``pi`` is outside (0, 1).

    Example:
      >>> from poise.fdistill import skew_js
      >>> skew_js(0.5).weight_at_one
      0.25

    References:
      Lin, "Divergence measures based on the Shannon entropy" (1991), https://doi.org/10.1109/18.61115
    """
    check_range("pi", pi, low=0.0, high=1.0, open_low=True, open_high=True)
    pi = float(pi)
    log_pi, log_rest = math.log(pi), math.log1p(-pi)

    def log_m(l):  # log(m / q)
        return jnp.logaddexp(log_pi + l, log_rest)

    def log_p_over_m(l):
        return -jnp.logaddexp(log_pi, log_rest - l)

    return FDivergence(
        name=f"skew_js({pi:g})",
        f=lambda r: jax.scipy.special.xlogy(pi * r, r) - (pi * r + 1.0 - pi) * jnp.log1p(pi * (r - 1.0)),
        f_prime=lambda r: pi * (jnp.log(r) - jnp.log1p(pi * (r - 1.0))),
        f_second=lambda r: pi * (1.0 - pi) / (r * (pi * r + 1.0 - pi)),
        log_weight=lambda l: log_pi + log_rest + log_p_over_m(l),
        weight_at_one=pi * (1.0 - pi),
        bounded=True,
        perspective=lambda log_p, log_q: (
            pi * times(log_p, log_p_over_m(log_p - log_q)) - (1.0 - pi) * times(log_q, log_m(log_p - log_q))
        ),
    )


NAMED: dict[str, Callable[[], FDivergence]] = {
    "reverse_kl": _reverse_kl,
    "softened_reverse_kl": _softened_reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "squared_hellinger": _squared_hellinger,
    "forward_kl": _forward_kl,
    "jeffreys": _jeffreys,
    "pearson_chi2": _pearson_chi2,
    "neyman_chi2": _neyman_chi2,
    "triangular": _triangular,
}
