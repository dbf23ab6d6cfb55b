"""Norms as kappas: directions that don't depend on the scale of the momentum, and balls as constraints."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from poise.core.arguments import check_count, check_range, concrete
from poise.optim.kappas.kappa import Kappa, Number, excess, gathered, indicator, largest, unit_range, widened


def sign() -> Kappa:
    r"""The $\ell_1$ norm: the direction of Lion, and the box $|x_i| \le 1/\lambda$.

    $$K(m) = \|m\|_1, \qquad \nabla K(m) = \operatorname{sign}(m), \qquad
    K^*(y) = \begin{cases}0 & \|y\|_\infty \le 1\\ \infty & \text{else}\end{cases}$$

    Returns:
      The kappa; the sign of zero is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.sign().grad(jnp.array([2.0, -0.5, 0.0])).tolist()
      [1.0, -1.0, 0.0]

    References:
      Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, https://arxiv.org/abs/2302.06675;
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    return Kappa(
        value=lambda m: jnp.sum(jnp.abs(widened(m))),
        grad=jnp.sign,
        conjugate=lambda y: indicator(largest(widened(y)), y),
        violation=lambda y: excess(largest(widened(y))),
    )


def lp(p: Number) -> Kappa:
    r"""The $\ell_p$ norm, between Lion ($p \to 1$), the normalized gradient ($p = 2$) and the greatest coordinate.

    With $1/p + 1/q = 1$,

    $$K(m) = \|m\|_p, \qquad \nabla K(m) = \operatorname{sign}(m)\left(\frac{|m|}{\|m\|_p}\right)^{p-1}, \qquad
    K^*(y) = \begin{cases}0 & \|y\|_q \le 1\\ \infty & \text{else}\end{cases}$$

    so the weights end in the ball $\|x\|_q \le 1/\lambda$.

    Args:
      p: the exponent, at least 1. 1 gives :func:`sign`, infinity gives :func:`linf`.

    Returns:
      The kappa; its direction at zero is zero.

    Raises:
      ValueError: if ``p`` is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> [round(x, 4) for x in kappas.lp(2.0).grad(jnp.array([3.0, -4.0])).tolist()]
      [0.6, -0.8]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    check_range("p", p, 1.0)
    exponent = concrete(p)
    if exponent is not None:
        p = float(p)
        if p == 1:
            return sign()
        if np.isinf(p):
            return linf()

    def norm(x: Float[Array, "..."], order: Number) -> Float[Array, ""]:
        ratio, scale, alive = unit_range(widened(x))
        total = jnp.where(alive, jnp.sum(_power(jnp.abs(ratio), order)), 1)
        return jnp.where(alive, scale * total ** (1 / order), 0).reshape(())

    def grad(m: Float[Array, "..."]) -> Float[Array, "..."]:
        ratio, _, alive = unit_range(widened(m))
        size = jnp.abs(ratio)
        total = jnp.where(alive, jnp.sum(_power(size, p)), 1)
        return (jnp.sign(ratio) * _power(size, p - 1) / total ** (1 - 1 / p)).astype(m.dtype)

    return Kappa(
        value=lambda m: norm(m, p),
        grad=grad,
        conjugate=lambda y: indicator(norm(y, p / (p - 1)), y),
        violation=lambda y: excess(norm(y, p / (p - 1))),
    )


def _power(x: Array, exponent: Number) -> Array:
    """A power of non-negative numbers whose derivative at zero is zero instead of infinite."""
    positive = x > 0
    return jnp.where(positive, jnp.where(positive, x, 1) ** exponent, 0)


def linf() -> Kappa:
    r"""The greatest absolute value: one coordinate moves, and $\|x\|_1 \le 1/\lambda$.

    $$K(m) = \|m\|_\infty, \qquad \nabla K(m) = \operatorname{sign}(m_j)\,e_j \text{ with } j = \arg\max_i |m_i|, \qquad
    K^*(y) = \begin{cases}0 & \|y\|_1 \le 1\\ \infty & \text{else}\end{cases}$$

    Returns:
      The kappa; of several greatest coordinates the first one moves.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.linf().grad(jnp.array([1.0, -3.0, 2.0])).tolist()
      [0.0, -1.0, 0.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """

    def grad(m: Float[Array, "..."]) -> Float[Array, "..."]:
        # By indices, one axis after the other: flattening would gather a sharded leaf, and comparing with the maximum
        # may find none, since XLA may compute the momentum once for each of the two, and round it differently.
        chosen, rest = jnp.ones(m.shape, bool), jnp.abs(m)
        for axis in reversed(range(m.ndim)) if m.size else ():
            chosen &= jax.lax.broadcasted_iota(jnp.int32, m.shape, axis) == jnp.argmax(rest, axis, keepdims=True)
            rest = jnp.max(rest, axis, keepdims=True)
        return jnp.where(chosen, jnp.sign(m), 0 * rest)  # so that NaN stays NaN

    return Kappa(
        value=lambda m: largest(widened(m)),
        grad=grad,
        conjugate=lambda y: indicator(jnp.sum(jnp.abs(widened(y))), y),
        violation=lambda y: excess(jnp.sum(jnp.abs(widened(y)))),
    )


def top_k(k: int) -> Kappa:
    r"""The sum of the $k$ greatest absolute values: a sparse sign.

    $$K(m) = \sum_{i\in T_k(m)} |m_i|, \qquad \nabla K(m) = \operatorname{sign}(m)\,1_{T_k(m)}, \qquad
    K^*(y) = \begin{cases}0 & \|y\|_\infty \le 1,\ \|y\|_1 \le k\\ \infty & \text{else}\end{cases}$$

    with $T_k(m)$ the places of the $k$ greatest absolute values of the leaf; of equal ones the first are taken.

    Args:
      k: how many coordinates of each leaf move.

    Returns:
      The kappa. A leaf that is spread over devices is gathered.

    Raises:
      TypeError: if ``k`` is no integer.
      ValueError: if ``k`` is below 1 or, when a leaf comes, above its size.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.top_k(2).grad(jnp.array([1.0, -3.0, 2.0])).tolist()
      [0.0, -1.0, 1.0]

    References:
      The pair of norms is that of the vector-k-norm; the method is Chen et al., ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    check_count("k", k)

    def check(x: Array) -> None:
        if k > x.size:
            raise ValueError(f"k of top_k must be at most the leaf's size, got k={k} for a leaf of shape {x.shape}")

    def value(m: Float[Array, "..."]) -> Float[Array, ""]:
        check(m)
        return gathered(lambda m: jnp.sum(jax.lax.top_k(jnp.abs(widened(m)).ravel(), k)[0]), m)

    def grad(m: Float[Array, "..."]) -> Float[Array, "..."]:
        check(m)

        def select(m: Array) -> Array:
            flat = m.ravel()
            _, places = jax.lax.top_k(jnp.abs(flat), k)
            return jnp.zeros_like(flat).at[places].set(jnp.sign(flat)[places]).reshape(m.shape)

        return gathered(select, m)

    def gauge(y: Float[Array, "..."]) -> Float[Array, ""]:
        check(y)
        return jnp.maximum(largest(widened(y)), jnp.sum(jnp.abs(widened(y))) / k)

    return Kappa(
        value=value, grad=grad, conjugate=lambda y: indicator(gauge(y), y), violation=lambda y: excess(gauge(y))
    )


def group_l2(axis: int | Sequence[int] = -1, *, group_ids: Sequence[int] | np.ndarray | None = None) -> Kappa:
    r"""The sum of the $\ell_2$ norms of disjoint groups: every group moves by a unit vector.

    $$K(m) = \sum_G \|m_G\|_2, \qquad \nabla K(m)_G = \frac{m_G}{\|m_G\|_2}, \qquad
    K^*(y) = \begin{cases}0 & \max_G \|y_G\|_2 \le 1\\ \infty & \text{else}\end{cases}$$

    Args:
      axis: the axes that a group runs along; the others count the groups. For a kernel ``[in, out]``, 0 makes one group
        per output.
      group_ids: instead, the group of each entry of the leaf in row-major order, numbered from 0. Such a leaf is
        gathered where it is spread over devices.

    Returns:
      The kappa; the direction of a group of zeros is zero.

    Raises:
      TypeError: if an axis or a group number is no integer.
      ValueError: if a group number is negative, or, when a leaf comes, if an axis is out of range or the number of
        group numbers isn't the leaf's size.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.group_l2(axis=0).grad(jnp.array([[2.0, 0.0], [0.0, -3.0]])).tolist()
      [[1.0, 0.0], [0.0, -1.0]]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    if group_ids is not None:
        return _labelled_groups(np.asarray(group_ids))
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    for each in axes:
        check_count("axis", each, low=-np.iinfo(np.int32).max)

    def norms(x: Array) -> tuple[Array, Array, Array, Array]:
        if any(not -x.ndim <= each < x.ndim for each in axes):
            raise ValueError(
                f"axis of group_l2 must be in the leaf's range, got {axis!r} for a leaf of shape {x.shape}"
            )
        ratio, scale, alive = unit_range(widened(x), axes)
        squares = jnp.where(alive, jnp.sum(ratio**2, axis=axes, keepdims=True), 1)
        return ratio, scale, alive, jnp.sqrt(squares)

    def each_norm(x: Array) -> Array:
        _, scale, alive, root = norms(x)
        return jnp.where(alive, scale * root, 0)

    def grad(m: Float[Array, "..."]) -> Float[Array, "..."]:
        ratio, _, _, root = norms(m)
        return (ratio / root).astype(m.dtype)

    return Kappa(
        value=lambda m: jnp.sum(each_norm(m)),
        grad=grad,
        conjugate=lambda y: indicator(largest(each_norm(y)), y),
        violation=lambda y: excess(largest(each_norm(y))),
    )


def _labelled_groups(labels: np.ndarray) -> Kappa:
    """Groups given by the number of each entry."""
    check_count("group_ids", labels, low=0)
    labels = labels.astype(np.int32)
    count = int(labels.max(initial=-1)) + 1

    def norms(x: Array) -> tuple[Array, Array]:
        if labels.shape != (x.size,):
            raise ValueError(
                f"group_ids of group_l2 must number the leaf's entries, got {labels.size} for a leaf of shape {x.shape}"
            )
        flat = widened(x).ravel()
        scale = jax.lax.stop_gradient(jax.ops.segment_max(jnp.abs(flat), labels, count))
        alive = scale > 0  # the maximum over a number that no entry has is -inf
        scale = jnp.where(alive, scale, 1)
        squares = jax.ops.segment_sum((flat / scale[labels]) ** 2, labels, count)
        return jnp.where(alive, scale * jnp.sqrt(jnp.where(alive, squares, 1)), 0), alive

    def grad(m: Array) -> Array:
        sizes, alive = norms(m)
        return (widened(m).ravel() / jnp.where(alive, sizes, 1)[labels]).reshape(m.shape).astype(m.dtype)

    def reduced(reduction):
        return lambda x: gathered(lambda x: reduction(norms(x)[0]), x)

    return Kappa(
        value=reduced(jnp.sum),
        grad=lambda m: gathered(grad, m),
        conjugate=lambda y: indicator(reduced(largest)(y), y),
        violation=lambda y: excess(reduced(largest)(y)),
    )
