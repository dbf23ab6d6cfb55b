"""What Lion-kappa does in theory, measured on a run: distance to its constraint, Lyapunov function, stationarity."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from poise.core.arguments import check_range, concrete
from poise.optim import kappas
from poise.optim.kappas import Kappa
from poise.optim.kappas.kappa import Number, violation_of
from poise.optim.leaves import resolve_mask
from poise.optim.lion_kappa import resolve_kappa

_SIGN = kappas.sign()


def lion_kappa_lyapunov(
    loss: Number,
    params: PyTree,
    mu: PyTree,
    kappa: Kappa | str = _SIGN,
    learning_rate: Number = 1e-3,
    weight_decay: Number = 1e-3,
    b1: Number = 0.9,
    b2: Number = 0.99,
    mask: Any | Callable[[Any], Any] | None = None,
) -> Float[Array, ""]:
    r"""The function of weights and momentum that Lion-kappa decreases, to second order in the learning rate.

    With the learning rate $\eta$, $\varepsilon = \eta/(1-\eta\lambda)$ and
    $C = \varepsilon b_1 / (\varepsilon\lambda(1-b_1) + 1 - b_2)$,

    $$H(x, \mu) = f(x) + \tfrac1\lambda K^*(\lambda x)
      + C\left(K^*(\lambda x) + K(-\mu) + \lambda\langle\mu, x\rangle\right).$$

    The last bracket is the gap of the Fenchel-Young inequality. For a loss whose gradient has Lipschitz constant $L$,
    if $b_2 \ge b_1$ and $K^*(\lambda x_0)$ is finite, $H_{t+1} \le H_t + \tfrac L2\|x_{t+1} - x_t\|^2$ in every step
    with the gradient of the whole loss. Outside of the domain of $K^*$ it is infinite. At $\lambda = 0$ the second term
    is left out.

    Args:
      loss: $f(x)$ at ``params``, a scalar.
      params: the weights.
      mu: the momentum *after* the step that led to ``params``, with the weights' structure:
        ``optax.tree.get(opt_state, "mu")``.
      kappa: as in :func:`poise.optim.lion_kappa`.
      learning_rate: $\eta$ of the step, with $\eta\lambda < 1$.
      weight_decay: $\lambda \ge 0$.
      b1: as in :func:`poise.optim.lion_kappa`.
      b2: as in :func:`poise.optim.lion_kappa`.
      mask: which leaves decay; on the others $\lambda = 0$.

    Returns:
      $H$, a scalar; infinite while a leaf violates its constraint.

    Raises:
      ValueError: if an argument is out of range, the loss is no scalar, or $\eta\lambda \ge 1$.

    Warns:
      UserWarning: if ``b1 > b2``: the guarantee does not hold then.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import lion_kappa_lyapunov
      >>> params, mu = jnp.array([0.25, -0.5]), jnp.zeros(2)
      >>> float(lion_kappa_lyapunov(3.0, params, mu, learning_rate=0.1, weight_decay=2.0))
      3.0
      >>> float(lion_kappa_lyapunov(3.0, 2 * params, mu, learning_rate=0.1, weight_decay=2.0))
      inf

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898. The paper's function belongs to the step with the decay of the new weights; this
      is the one of Lion's own step.
    """
    kappa = resolve_kappa(kappa)
    check_range("learning_rate", learning_rate, 0.0)
    check_range("weight_decay", weight_decay, 0.0)
    check_range("b1", b1, 0.0, 1.0, open_high=True)
    check_range("b2", b2, 0.0, 1.0, open_high=True)
    if jnp.ndim(loss):
        raise ValueError(f"loss must be a scalar, got shape {jnp.shape(loss)}")
    known = [concrete(x) for x in (learning_rate, weight_decay, b1, b2)]
    if known[0] is not None and known[1] is not None and (known[0] * known[1] >= 1).any():
        raise ValueError(
            f"learning_rate * weight_decay must be below 1, got {learning_rate} * {weight_decay}: there is no Lyapunov "
            "function for steps that overshoot"
        )
    if known[2] is not None and known[3] is not None and (known[2] > known[3]).any():
        warnings.warn(f"with b1={b1} above b2={b2} the Lyapunov function need not decrease", stacklevel=2)

    def term(x: Array, m: Array, lam: Number) -> Array:
        # C, with numerator and denominator multiplied by 1 - eta lambda.
        c = learning_rate * b1 / (learning_rate * lam * (1 - b1) + (1 - learning_rate * lam) * (1 - b2))
        conjugate = kappa.conjugate(_scaled(lam, x))
        weight = c + jnp.where(lam > 0, 1 / jnp.where(lam > 0, lam, 1), 0)
        penalty = jnp.where(jnp.isinf(conjugate), jnp.inf, weight * jnp.where(jnp.isinf(conjugate), 0, conjugate))
        return penalty + c * (kappa.value(-m) + lam * _dot(m, x))

    return jnp.asarray(loss) + _total(term, _decays(params, weight_decay, mask), params, mu)


def lion_kappa_stationarity_gap(
    grads: PyTree,
    params: PyTree,
    kappa: Kappa | str = _SIGN,
    weight_decay: Number = 1e-3,
    mask: Any | Callable[[Any], Any] | None = None,
) -> Float[Array, ""]:
    r"""How far weights are from a stationary point of the problem that Lion-kappa solves.

    $$\operatorname{gap}(x) = K(-g) + K^*(\lambda x) + \lambda\langle x, g\rangle \ge 0
    \quad\text{with } g = \nabla f(x),$$

    which is zero exactly if $-g \in \partial K^*(\lambda x)$, that is, if $x$ is stationary for
    $f(x) + \frac1\lambda K^*(\lambda x)$. For a norm $K$ it is $\lambda$ times the Frank-Wolfe gap over the constraint:
    for Lion, $\|g\|_1 + \lambda\langle g, x\rangle$ in the box.

    Args:
      grads: $g$, the gradient of the whole loss at ``params``; that of a batch adds its noise.
      params: the weights.
      kappa: as in :func:`poise.optim.lion_kappa`.
      weight_decay: $\lambda \ge 0$.
      mask: which leaves decay; on the others $\lambda = 0$.

    Returns:
      The gap, a scalar; infinite while a leaf violates its constraint.

    Raises:
      ValueError: if ``weight_decay`` is negative.

    Example:
      At a corner of the box $|x_i| \le 1/2$ that the gradient points out of, and at one where a coordinate could move:

      >>> import jax.numpy as jnp
      >>> from poise.optim import lion_kappa_stationarity_gap
      >>> corner = jnp.array([0.5, -0.5])
      >>> float(lion_kappa_stationarity_gap(jnp.array([-3.0, 1.0]), corner, weight_decay=2.0))
      0.0
      >>> float(lion_kappa_stationarity_gap(jnp.array([-3.0, -1.0]), corner, weight_decay=2.0))
      2.0

    References:
      The fixed points are those of Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts,
      ICLR 2024, https://arxiv.org/abs/2310.05898; the gap is the one of the Fenchel-Young inequality.
    """
    kappa = resolve_kappa(kappa)
    check_range("weight_decay", weight_decay, 0.0)

    def term(g: Array, x: Array, lam: Number) -> Array:
        return kappa.value(-g) + kappa.conjugate(_scaled(lam, x)) + lam * _dot(x, g)

    return _total(term, _decays(params, weight_decay, mask), grads, params)


def lion_kappa_constraint_violation(
    params: PyTree,
    kappa: Kappa | str = _SIGN,
    weight_decay: Number = 1e-3,
    mask: Any | Callable[[Any], Any] | None = None,
) -> Float[Array, ""]:
    r"""The distance of the weights to the set that Lion-kappa keeps them to.

    $$\max_{\text{leaves}}\ \tfrac1\lambda v(\lambda x)$$

    with the violation $v$ of the :class:`poise.optim.Kappa`. Where the domain of $K^*$ is the unit ball of a norm, this
    is $\max(0, \|x\| - 1/\lambda)$, the distance in that norm; for Lion, in the greatest absolute value. Each step of
    Lion-kappa multiplies it by $1 - \eta\lambda$ at most, whatever the loss.

    Args:
      params: the weights.
      kappa: as in :func:`poise.optim.lion_kappa`.
      weight_decay: $\lambda \ge 0$; at zero there is no constraint.
      mask: which leaves decay; the others are not constrained.

    Returns:
      The distance, a scalar in units of the weights; zero in the set.

    Raises:
      ValueError: if ``weight_decay`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas, lion_kappa_constraint_violation
      >>> params = {"kernel": jnp.array([[3.0, -4.0]]), "bias": jnp.array([0.5])}
      >>> float(lion_kappa_constraint_violation(params, weight_decay=1.0))
      3.0
      >>> float(lion_kappa_constraint_violation(params, kappas.lp(2.0), weight_decay=1.0))
      4.0

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    kappa = resolve_kappa(kappa)
    check_range("weight_decay", weight_decay, 0.0)

    def term(x: Any, lam: Number) -> Array:
        violation = violation_of(kappa)(_scaled(lam, jnp.asarray(x)))
        return jnp.where(violation > 0, violation / lam, violation)

    leaves = jax.tree.leaves(jax.tree.map(term, params, _decays(params, weight_decay, mask)))
    return jnp.max(jnp.stack(leaves)) if leaves else jnp.zeros(())


def _decays(params: PyTree, weight_decay: Number, mask: Any) -> PyTree:
    """The weight decay of each leaf, in its dtype or the one that sums over it are taken in."""
    return jax.tree.map(lambda chosen: weight_decay if chosen else 0.0, resolve_mask(mask, params))


def _scaled(lam: Number, x: Array) -> Array:
    r"""$\lambda x$ in the dtype of $x$, by which the kappas know how exactly the weights can lie on a boundary."""
    return (lam * x).astype(x.dtype)


def _dot(x: Array, y: Array) -> Array:
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    return jnp.sum(x.astype(dtype) * y.astype(dtype))


def _total(term: Callable[..., Array], decays: PyTree, *trees: PyTree) -> Array:
    """The sum of a function over corresponding leaves of trees, None left out."""

    def each(lam: Number, *leaves: Any) -> Array | None:
        return None if leaves[0] is None else term(*map(jnp.asarray, leaves), lam)

    terms = jax.tree.map(each, decays, *trees)
    return sum(jax.tree.leaves(terms), start=jnp.zeros(()))
