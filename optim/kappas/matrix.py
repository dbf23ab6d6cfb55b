"""Matrix norms as kappas: directions made of singular vectors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.optim.kappas.kappa import Kappa, excess, gathered, indicator, largest, violation_of, widened


class MatrixAxes(NamedTuple):
    """How a leaf is read as a matrix, or as a stack of matrices.

    Attributes:
      reduction: the axes that make the rows, the inputs of the layer; None for all that aren't in ``output``.
      output: the axes that make the columns, the outputs of the layer. Axes in neither count independent matrices.

    Example:
      The defaults fit Flax's kernels of ``Dense`` ``[in, out]`` and ``Conv`` ``[height, width, in, out]``. A stack of
      kernels ``[layers, in, out]`` names both:

      >>> from poise.optim.kappas import MatrixAxes, nuclear
      >>> kappa = nuclear(MatrixAxes(reduction=(-2,), output=(-1,)))
    """

    reduction: Sequence[int] | None = None
    output: Sequence[int] = (-1,)


_KERNEL = MatrixAxes()


def nuclear(axes: MatrixAxes = _KERNEL, fallback: Kappa | None = None) -> Kappa:
    r"""The nuclear norm: the orthogonal factor of the momentum, and singular values of at most $1/\lambda$.

    With the thin singular value decomposition $M = U\Sigma V^\top$, zero singular values left out,

    $$K(M) = \|M\|_* = \sum_i\sigma_i, \qquad \nabla K(M) = U V^\top, \qquad
    K^*(Y) = \begin{cases}0 & \sigma_{\max}(Y) \le 1\\ \infty & \text{else}\end{cases}$$

    This is the exact limit of Muon's Newton-Schulz iteration: $b_1 = b_2$ is Muon without Nesterov's momentum.

    Args:
      axes: which axes make rows and columns. Over a stack of matrices values add up.
      fallback: the kappa of leaves with fewer than two axes (biases, scales).

    Returns:
      The kappa. Its direction is differentiable, also where singular values coincide or vanish: along the perturbations
      that keep the rank. A leaf that is spread over devices is gathered.

    Raises:
      ValueError: if axes are named twice or, when a leaf comes, are out of its range, or if the leaf has fewer than two
        axes and there is no fallback.
      TypeError: if ``fallback`` is no kappa.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappa = kappas.nuclear(fallback=kappas.sign())
      >>> kappa.grad(jnp.array([[0.0, 2.0], [-3.0, 0.0]])).round(5).tolist()
      [[0.0, 1.0], [-1.0, 0.0]]
      >>> kappa.grad(jnp.array([0.5, -2.0])).tolist()
      [1.0, -1.0]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898; Jordan et al., Muon, 2024, https://kellerjordan.github.io/posts/muon.
    """
    return _of_singular_values(axes, fallback, jnp.ones_like, jnp.sum, jnp.max)


def spectral(axes: MatrixAxes = _KERNEL, fallback: Kappa | None = None) -> Kappa:
    r"""The spectral norm: the leading pair of singular vectors, and a nuclear norm of at most $1/\lambda$.

    $$K(M) = \sigma_{\max}(M), \qquad \nabla K(M) = u_1 v_1^\top, \qquad
    K^*(Y) = \begin{cases}0 & \|Y\|_* \le 1\\ \infty & \text{else}\end{cases}$$

    With $b_1 = 0$ these are the rank-one steps of the Frank-Wolfe method on the ball of the nuclear norm.

    Args:
      axes: which axes make rows and columns. Over a stack of matrices values add up.
      fallback: the kappa of leaves with fewer than two axes (biases, scales).

    Returns:
      The kappa. Its direction is differentiable; where the two greatest singular values coincide, along the
      perturbations that keep them so. A leaf that is spread over devices is gathered.

    Raises:
      ValueError: if axes are named twice or, when a leaf comes, are out of its range, or if the leaf has fewer than two
        axes and there is no fallback.
      TypeError: if ``fallback`` is no kappa.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import kappas
      >>> kappas.spectral().grad(jnp.array([[0.0, 2.0], [-3.0, 0.0]])).round(5).tolist()
      [[0.0, 0.0], [-1.0, 0.0]]

    References:
      Chen et al., Lion Secretly Solves Constrained Optimization: As Lyapunov Predicts, ICLR 2024,
      https://arxiv.org/abs/2310.05898.
    """
    return _of_singular_values(axes, fallback, lambda s: jnp.zeros_like(s).at[..., 0].set(1), jnp.max, jnp.sum)


def _of_singular_values(
    axes: MatrixAxes,
    fallback: Kappa | None,
    weight: Callable[[Array], Array],
    norm: Callable[..., Array],
    dual: Callable[..., Array],
) -> Kappa:
    """A unitarily invariant norm from what it does to singular values.

    Args:
      axes: see :func:`nuclear`.
      fallback: see :func:`nuclear`.
      weight: the direction's singular values, from the matrix's in falling order.
      norm: the norm of a vector of singular values.
      dual: the dual norm of it.
    """
    if not isinstance(axes, MatrixAxes):
        raise TypeError(f"axes must be a MatrixAxes, got {axes!r}")
    if fallback is not None and not isinstance(fallback, Kappa):
        raise TypeError(f"fallback must be a Kappa or None, got {fallback!r}")
    named = [tuple(group) for group in axes if group is not None]
    if any(len(set(group)) < len(group) for group in named) or (len(named) == 2 and set(named[0]) & set(named[1])):
        raise ValueError(f"axes must name each axis once, got {axes}")

    def dispatched(member: str, function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        def call(x: Float[Array, "..."]) -> Float[Array, "..."]:
            if x.ndim < 2:
                if fallback is None:
                    raise ValueError(
                        f"a matrix kappa got a leaf of shape {x.shape}: pass fallback=, the kappa of leaves with fewer "
                        "than two axes"
                    )
                return (violation_of(fallback) if member == "violation" else getattr(fallback, member))(x)
            return gathered(function, x)

        return call

    def values(x: Array) -> Array:
        return jnp.linalg.svd(_matrices(x, axes), compute_uv=False)

    def grad(m: Array) -> Array:
        return _to_leaf(_weighted_factors(weight, _matrices(m, axes)), m, axes).astype(m.dtype)

    def gauge(y: Array) -> Array:
        return largest(dual(values(y), axis=-1, initial=0))

    return Kappa(
        value=dispatched("value", lambda m: jnp.sum(norm(values(m), axis=-1, initial=0))),
        grad=dispatched("grad", grad),
        conjugate=dispatched("conjugate", lambda y: indicator(gauge(y), y)),
        violation=dispatched("violation", lambda y: excess(gauge(y))),
    )


def _layout(x: Array, axes: MatrixAxes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The axes of stack, rows and columns, counted from the front."""
    groups = []
    for group in axes:
        if group is not None and any(not -x.ndim <= axis < x.ndim for axis in group):
            raise ValueError(f"axes must be in the leaf's range, got {axes} for a leaf of shape {x.shape}")
        groups.append(None if group is None else tuple(axis % x.ndim for axis in group))
    rows, columns = groups
    if rows is None:
        rows = tuple(axis for axis in range(x.ndim) if axis not in columns)
    if len({*rows, *columns}) < len(rows) + len(columns):
        raise ValueError(f"axes must name each axis once, got {axes} for a leaf of shape {x.shape}")
    return tuple(axis for axis in range(x.ndim) if axis not in rows + columns), rows, columns


def _matrices(x: Array, axes: MatrixAxes) -> Array:
    """The leaf as ``[stack, rows, columns]``, in at least float32."""
    groups = _layout(x, axes)
    return (
        widened(x).transpose(sum(groups, ())).reshape([math.prod(x.shape[axis] for axis in group) for group in groups])
    )


def _to_leaf(matrices: Array, x: Array, axes: MatrixAxes) -> Array:
    """Undoes :func:`_matrices`."""
    order = sum(_layout(x, axes), ())
    return matrices.reshape([x.shape[axis] for axis in order]).transpose([order.index(axis) for axis in range(x.ndim)])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _weighted_factors(weight: Callable[[Array], Array], matrices: Array) -> Array:
    r"""$U \operatorname{diag}(w) V^\top$ with singular values replaced by weights, where they aren't zero."""
    u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    return _product(u * _weights(weight, s, matrices)[..., None, :], vt)


def _weights(weight: Callable[[Array], Array], s: Array, matrices: Array) -> Array:
    rounding = max(matrices.shape[-2:]) * jnp.finfo(s.dtype).eps
    return jnp.where(s > rounding * jnp.max(s, axis=-1, keepdims=True, initial=0), weight(s), 0)


def _product(*factors: Array) -> Array:
    return functools.reduce(functools.partial(jnp.matmul, precision="highest"), factors)


@_weighted_factors.defjvp
def _weighted_factors_jvp(weight, primals, tangents):
    """Differentiates in the basis of singular vectors, where quotients over equal or zero singular values drop out.

    The derivative of the decomposition itself would divide by differences of singular values, which cancel in the
    product.
    """
    (matrices,), (tangent,) = primals, tangents
    u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
    w = _weights(weight, s, matrices)
    v, ut = vt.mT, u.mT
    scale = jnp.max(s, axis=-1, keepdims=True, initial=0)
    rounding = max(matrices.shape[-2:]) * jnp.finfo(s.dtype).eps * scale

    def quotient(numerator: Array, denominator: Array, threshold: Array) -> Array:
        safe = jnp.abs(denominator) > threshold
        return jnp.where(safe, numerator / jnp.where(safe, denominator, 1), 0)

    def pairs(sign: int) -> Array:
        combine = lambda x: x[..., :, None] + sign * x[..., None, :]  # noqa: E731
        return quotient(combine(w), combine(s), rounding[..., None])

    core = _product(ut, tangent, v)
    inner = pairs(-1) * (core + core.mT) / 2 + pairs(1) * (core - core.mT) / 2
    over = quotient(w, s, rounding)
    outside_rows = _product(tangent, v) - _product(u, core)
    outside_columns = _product(ut, tangent) - _product(core, vt)
    out = _product(u, inner, vt) + _product(outside_rows * over[..., None, :], vt)
    return _product(u * w[..., None, :], vt), out + _product(u, over[..., :, None] * outside_columns)
