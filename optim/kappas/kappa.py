"""A convex function of one leaf as three functions: its value, a subgradient and its convex conjugate."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poise.core.arguments import check_range, concrete
from poise.optim.leaves import sum_dtype

Number: TypeAlias = float | int | Array


class Kappa(NamedTuple):
    r"""A convex function $K$ of one leaf, which turns a momentum into a direction.

    All members take one array of any shape. Sums run over the whole leaf, in float32 for bfloat16 and float16.

    Attributes:
      value: $m \mapsto K(m)$, a scalar.
      grad: $m \mapsto \nabla K(m)$, a subgradient with the shape and dtype of $m$; zero at zero wherever $K$ is even.
      conjugate: $y \mapsto K^*(y) = \sup_m \langle m, y\rangle - K(m)$, a scalar, $+\infty$ outside of its domain. A
        point that leaves the domain by no more than rounding counts as inside.
      violation: $y \mapsto v(y)$, a convex scalar that is zero exactly on the closed domain of $K^*$: by how much $y$
        has to shrink, $\max(0, \|y\| - 1)$ with the norm whose unit ball the domain is. None means that only membership
        is known: zero where the conjugate is finite, else $+\infty$.

    Example:
      The three functions of a custom $K(m) = \frac32\|m\|^2$:

      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import Kappa, lion_kappa
      >>> kappa = Kappa(lambda m: 1.5 * jnp.sum(m**2), lambda m: 3.0 * m, lambda y: jnp.sum(y**2) / 6.0)
      >>> optimizer = lion_kappa(0.1, kappa)
    """

    value: Callable[[Array], Array]
    grad: Callable[[Array], Array]
    conjugate: Callable[[Array], Array]
    violation: Callable[[Array], Array] | None = None


def positive(name: str, value: Number) -> Number:
    """A parameter of a kappa after its check: a Python float, so that it doesn't promote, or a tracer.

    Raises:
      ValueError: if it is concrete and not a positive number that float32 can hold.
    """
    check_range(name, value, float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max))
    return value if concrete(value) is None else float(value)


def violation_of(kappa: Kappa) -> Callable[[Array], Array]:
    """The kappa's violation, or for one that names none: zero in the domain of its conjugate, else infinity."""
    if kappa.violation is not None:
        return kappa.violation
    return lambda y: jnp.where(jnp.isfinite(kappa.conjugate(y)), 0.0, jnp.inf).astype(sum_dtype(y))


def widened(x: Array) -> Array:
    """The array in the dtype in which sums over it are taken: its own, but at least float32."""
    return x.astype(sum_dtype(x))


def indicator(gauge: Array, of: Array) -> Array:
    """Zero where a gauge is at most one, else infinity.

    Four units in the last place of the argument's own dtype, or 64 of the dtype it was summed in, still count as one:
    directions lie on the boundary, and the weights that they lead to are there up to rounding.
    """
    slack = max(4 * float(jnp.finfo(of.dtype).eps), 64 * float(jnp.finfo(gauge.dtype).eps))
    return jnp.where(gauge <= 1 + slack, 0.0, jnp.inf).astype(gauge.dtype)


def excess(gauge: Array) -> Array:
    """By how much a gauge exceeds one."""
    return jnp.maximum(gauge - 1, 0)


def largest(x: Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """The greatest absolute value, of all entries or along axes; 0 of no entries."""
    return jnp.max(jnp.abs(x), axis=axis, keepdims=keepdims, initial=0)


def unit_range(x: Array, axis: int | tuple[int, ...] | None = None) -> tuple[Array, Array, Array]:
    """Scales the greatest absolute value to one, so that powers neither overflow nor underflow.

    Args:
      x: any array.
      axis: the axes that one scale serves; None for all.

    Returns:
      The scaled array; its scale, 1 where all entries are zero; and whether any is not. The last two keep their
      dimensions. The scale is constant to differentiation, which is right in functions that undo it.
    """
    scale = jax.lax.stop_gradient(largest(x, axis, keepdims=True))
    alive = scale != 0
    scale = jnp.where(alive, scale, 1)
    return jnp.where(alive, x / scale, 0), scale, alive


def gathered(function: Callable[[Array], Array], x: Array) -> Array:
    """Calls a function of a whole leaf that can't work on its shards.

    Under an explicit mesh the leaf is replicated first, and a result of the leaf's shape is spread again; elsewhere the
    compiler sees to both.
    """
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return function(x)
    out = function(jax.sharding.reshard(x, jax.P()))
    return jax.sharding.reshard(out, sharding) if out.shape == x.shape and out.ndim else out
