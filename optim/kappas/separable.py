"""Kappas that act on each entry by itself, and two smooth ones of the whole leaf."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.optim.kappas.kappa import Kappa, Number, excess, indicator, largest, positive, widened


def dead_zone(eps: Number) -> Kappa:
    r"""The sign with a dead zone: small momenta don't move their weight, which adds $\epsilon\|x\|_1$ in Lion's box.

    $$K(m) = \sum_i \max(|m_i| - \epsilon, 0), \qquad \nabla K(m) = \operatorname{sign}(m)\,1_{|m| > \epsilon}, \qquad
    K^*(y) = \epsilon\|y\|_1 \text{ on } \|y\|_\infty \le 1$$

    Args:
      eps: half the width of the zone, positive, in units of the gradient.

    Returns:
      The kappa.

    Raises:
      ValueError: if ``eps`` is not positive or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.dead_zone(1.0).grad(jnp.array([2.0, -0.5, -1.5])).tolist()
      [1.0, 0.0, -1.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    eps = positive("eps", eps)
    return _boxed(
        value=lambda m: jnp.maximum(jnp.abs(m) - eps, 0),
        grad=lambda m: jnp.where(jnp.abs(m) > eps, jnp.sign(m), jnp.where(jnp.isnan(m), m, 0)),
        penalty=lambda y: eps * jnp.abs(y),
    )


def huber(eps: Number) -> Kappa:
    r"""Huber's function: the momentum, cut off at one, which adds $\frac{\epsilon\lambda}2\|x\|^2$ in Lion's box.

    $$K(m) = \sum_i \begin{cases}m_i^2/2\epsilon & |m_i| \le \epsilon\\ |m_i| - \epsilon/2 & \text{else}\end{cases},
    \qquad \nabla K(m) = \operatorname{clip}(m/\epsilon, -1, 1), \qquad
    K^*(y) = \tfrac\epsilon2\|y\|^2 \text{ on } \|y\|_\infty \le 1$$

    With $\epsilon = 1$ this is what ``optax.scale_by_lion(mode="refined")`` does.

    Args:
      eps: where the momentum saturates, positive, in units of the gradient.

    Returns:
      The kappa.

    Raises:
      ValueError: if ``eps`` is not positive or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.huber(2.0).grad(jnp.array([1.0, -0.5, -3.0])).tolist()
      [0.5, -0.25, -1.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    eps = positive("eps", eps)

    def value(m: Array) -> Array:
        inner = jnp.minimum(jnp.abs(m), eps)
        return inner * (jnp.abs(m) - inner / 2) / eps

    return _boxed(value, lambda m: jnp.clip(m / eps, -1, 1), lambda y: eps / 2 * y**2)


def relativistic(eps: Number) -> Kappa:
    r"""A smooth sign: the velocity of a relativistic particle of momentum $m$ and rest mass $\epsilon$.

    $$K(m) = \sum_i \sqrt{m_i^2 + \epsilon^2} - \epsilon, \qquad \nabla K(m) = \frac{m}{\sqrt{m^2 + \epsilon^2}}, \qquad
    K^*(y) = \epsilon \sum_i 1 - \sqrt{1 - y_i^2} \text{ on } \|y\|_\infty \le 1$$

    Args:
      eps: the width of the smooth part, positive, in units of the gradient.

    Returns:
      The kappa.

    Raises:
      ValueError: if ``eps`` is not positive or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> [round(x, 4) for x in kappas.relativistic(4.0).grad(jnp.array([3.0, 0.0])).tolist()]
      [0.6, 0.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    eps = positive("eps", eps)

    def grad(m: Array) -> Array:
        scale = jax.lax.stop_gradient(jnp.maximum(jnp.abs(m), eps))  # squares of the momentum itself may overflow
        return (m / scale) / jnp.sqrt((m / scale) ** 2 + (eps / scale) ** 2)

    def value(m: Array) -> Array:
        direction = grad(m)
        return m * direction / (1 + jnp.sqrt(jnp.maximum(1 - direction**2, 0)))

    return _boxed(value, grad, lambda y: eps * y**2 / (1 + _root(1 - y**2)))


def tanh(slope: Number) -> Kappa:
    r"""A smooth sign by the hyperbolic tangent: an entropy in Lion's box.

    $$K(m) = \tfrac1a\sum_i \log\cosh(a m_i), \qquad \nabla K(m) = \tanh(a m), \qquad
    K^*(y) = \tfrac1{2a}\sum_i (1+y_i)\log(1+y_i) + (1-y_i)\log(1-y_i) \text{ on } \|y\|_\infty \le 1$$

    This is what ``optax.scale_by_lion(mode="smooth", smooth_beta=a)`` does.

    Args:
      slope: $a > 0$, per unit of the gradient.

    Returns:
      The kappa.

    Raises:
      ValueError: if ``slope`` is not positive or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> [round(x, 4) for x in kappas.tanh(2.0).grad(jnp.array([0.5, -10.0])).tolist()]
      [0.7616, -1.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    slope = positive("slope", slope)

    def value(m: Array) -> Array:
        x = slope * jnp.abs(m)
        small = x < 1
        near = jnp.log1p(2 * jnp.sinh(jnp.where(small, x, 0) / 2) ** 2)
        return jnp.where(small, near, x + jnp.log1p(jnp.exp(-2 * x)) - math.log(2)) / slope

    def penalty(y: Array) -> Array:
        return (jax.scipy.special.xlog1py(1 + y, y) + jax.scipy.special.xlog1py(1 - y, -y)) / (2 * slope)

    return _boxed(value, lambda m: jnp.tanh(slope * m), penalty)


def softsign(eps: Number) -> Kappa:
    r"""A smooth sign with heavy tails, whose barrier keeps the weights strictly inside of Lion's box.

    $$K(m) = \sum_i |m_i| - \epsilon\log(1 + |m_i|/\epsilon), \qquad \nabla K(m) = \frac{m}{|m| + \epsilon}, \qquad
    K^*(y) = -\epsilon \sum_i |y_i| + \log(1 - |y_i|) \text{ on } \|y\|_\infty < 1$$

    Args:
      eps: the momentum at which the direction is one half, positive, in units of the gradient.

    Returns:
      The kappa.

    Raises:
      ValueError: if ``eps`` is not positive or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.softsign(1.0).grad(jnp.array([1.0, -3.0])).tolist()
      [0.5, -0.75]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    eps = positive("eps", eps)
    return _boxed(
        value=lambda m: jnp.abs(m) - eps * jnp.log1p(jnp.abs(m) / eps),
        grad=lambda m: m / (jnp.abs(m) + eps),
        penalty=lambda y: -eps * (jnp.abs(y) + jnp.log1p(-jnp.abs(y))),
        open_box=True,
    )


def arctan(slope: Number) -> Kappa:
    r"""A smooth sign by the arc tangent, whose barrier keeps the weights strictly inside of Lion's box.

    $$K(m) = \tfrac2\pi\sum_i m_i\arctan(a m_i) - \tfrac1{2a}\log(1 + a^2 m_i^2), \qquad
    \nabla K(m) = \tfrac2\pi\arctan(a m), \qquad
    K^*(y) = -\tfrac2{\pi a}\sum_i \log\cos\tfrac{\pi y_i}2 \text{ on } \|y\|_\infty < 1$$

    Args:
      slope: $a > 0$, per unit of the gradient.

    Returns:
      The kappa.

    Raises:
      ValueError: if ``slope`` is not positive or not finite in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> [round(x, 4) for x in kappas.arctan(1.0).grad(jnp.array([1.0, -1e9])).tolist()]
      [0.5, -1.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    slope = positive("slope", slope)

    def value(m: Array) -> Array:
        x = slope * jnp.abs(m)
        large = x > 1
        inverse = 1 / jnp.where(large, x, 1)
        half_log = jnp.where(
            large, jnp.log1p(inverse**2) / 2 - jnp.log(inverse), jnp.log1p(jnp.where(large, 0, x) ** 2) / 2
        )
        return 2 / math.pi / slope * (x * jnp.arctan(x) - half_log)

    def penalty(y: Array) -> Array:
        return -2 / (math.pi * slope) * jnp.log1p(-2 * jnp.sin(math.pi / 4 * y) ** 2)

    return _boxed(value, lambda m: 2 / math.pi * jnp.arctan(slope * m), penalty, open_box=True)


def squared_l2() -> Kappa:
    r"""Half the squared $\ell_2$ norm: momentum itself, no constraint, and the usual weight decay as the penalty.

    $$K(m) = \tfrac12\|m\|^2, \qquad \nabla K(m) = m, \qquad K^*(y) = \tfrac12\|y\|^2$$

    With $\lambda = 0$, $b_1 = b_2$ is the heavy ball and $b_1 = b_2^2$ Nesterov's momentum, as ``optax.sgd`` takes them
    with the learning rate times $1 - b_2$.

    Returns:
      The kappa.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> float(kappas.squared_l2().conjugate(jnp.array([3.0, 4.0])))
      12.5

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """

    def half_square(x: Float[Array, "..."]) -> Float[Array, ""]:
        return jnp.sum(widened(x) ** 2) / 2

    return Kappa(half_square, lambda m: m, half_square, lambda y: jnp.zeros((), widened(y).dtype))


def log_sum_exp() -> Kappa:
    r"""The logarithm of the sum of exponentials: weights on the simplex.

    $$K(m) = \log\sum_i e^{m_i}, \qquad \nabla K(m) = \operatorname{softmax}(m), \qquad
    K^*(y) = \sum_i y_i\log y_i \text{ on } y \ge 0,\ \textstyle\sum_i y_i = 1$$

    This $K$ is not even: the momentum is taken with the paper's sign, so that the direction is the softmax of the
    *negative* gradient, and $\lambda x$ becomes a probability vector. Its violation is the distance of the sum to one,
    or the size of the most negative entry if that is greater.

    Returns:
      The kappa.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.log_sum_exp().grad(jnp.zeros(4)).tolist()
      [0.25, 0.25, 0.25, 0.25]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """

    def grad(m: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.softmax(widened(m), axis=tuple(range(m.ndim))).astype(m.dtype)

    def violation(y: Float[Array, "..."]) -> Float[Array, ""]:
        x = widened(y)
        return jnp.maximum(jnp.abs(jnp.sum(x) - 1), jnp.max(-x, initial=0))

    def conjugate(y: Float[Array, "..."]) -> Float[Array, ""]:
        x = jnp.maximum(widened(y), 0)
        return jnp.sum(jax.scipy.special.xlogy(x, x)) + indicator(1 + violation(y), y)

    return Kappa(lambda m: jax.scipy.special.logsumexp(widened(m)), grad, conjugate, violation)


def _root(x: Array) -> Array:
    """A square root of what is negative by rounding alone, with a finite derivative at zero."""
    inside = x > 0
    return jnp.where(inside, jnp.sqrt(jnp.where(inside, x, 1)), 0)


def _boxed(value, grad, penalty, open_box: bool = False) -> Kappa:
    """A separable kappa from its scalar functions, whose conjugate lives on the box of entries up to one.

    Args:
      value: $K$ of each entry.
      grad: its derivative.
      penalty: $K^*$ of each entry, called in the box only.
      open_box: whether the penalty is infinite on the boundary.
    """

    def conjugate(y: Float[Array, "..."]) -> Float[Array, ""]:
        x = widened(y)
        top = largest(x)
        edge = 1 - jnp.finfo(x.dtype).eps if open_box else 1
        inside = jnp.sum(penalty(jnp.clip(x, -edge, edge)))
        return jnp.where(top < 1, inside, jnp.inf) if open_box else inside + indicator(top, y)

    return Kappa(
        value=lambda m: jnp.sum(value(widened(m))),
        grad=lambda m: grad(widened(m)).astype(m.dtype),
        conjugate=conjugate,
        violation=lambda y: excess(largest(widened(y))),
    )
