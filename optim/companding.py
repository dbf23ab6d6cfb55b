"""Companding functions: bounded, odd, increasing maps that are steep at zero."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_choice, check_range
from poise.optim.leaves import sum_dtype

KINDS = ("arctan", "tanh", "softsign", "identity")


class _Shape(NamedTuple):
    """A companding function for a = b = 1: the map, its derivative, its inverse, its bound."""

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    bound: float


def _arctan_slope(x: Array) -> Array:
    return 1 / (1 + x * x)


_SHAPES = {
    "arctan": _Shape(jnp.arctan, _arctan_slope, jnp.tan, np.pi / 2),
    "tanh": _Shape(jnp.tanh, lambda x: 1 - jnp.tanh(x) ** 2, jnp.arctanh, 1.0),
    "softsign": _Shape(
        lambda x: x / (1 + jnp.abs(x)), lambda x: 1 / (1 + jnp.abs(x)) ** 2, lambda y: y / (1 - jnp.abs(y)), 1.0
    ),
}


def check_companding(a: ArrayLike, b: ArrayLike, kind: str) -> None:
    """Raises for an unknown kind, and for scales that are not positive and finite; tracers pass."""
    check_choice("kind", kind, KINDS)
    check_range("a", a, 0.0, open_low=True, open_high=True)
    check_range("b", b, 0.0, open_low=True, open_high=True)


def companding_bound(a: ArrayLike, kind: str = "arctan") -> Float[Array, "..."]:
    r"""The bound that no companded weight reaches: $a\pi/2$ for arctan, $a$ for tanh and softsign, none for identity.

    Args:
      a: the height, positive.
      kind: ``arctan``, ``tanh``, ``softsign`` or ``identity``.

    Returns:
      The bound in the shape of ``a``.

    Raises:
      ValueError: if ``a`` is not positive and finite or ``kind`` unknown.

    Example:
      >>> from poise.optim import companding_bound
      >>> float(companding_bound(2.0, "tanh")), float(companding_bound(2.0, "identity"))
      (2.0, inf)
    """
    check_companding(a, 1.0, kind)
    return jnp.asarray(a, jnp.result_type(float)) * (jnp.inf if kind == "identity" else _SHAPES[kind].bound)


def companding(v: Float[Array, "..."], a: ArrayLike, b: ArrayLike, kind: str = "arctan") -> Float[Array, "..."]:
    r"""Maps raw weights to effective ones: compresses the large, pushes the small away from zero.

    With $x = v/b$,

    $$w = a\arctan x, \qquad w = a\tanh x, \qquad w = a\frac{x}{1+|x|}, \qquad w = v$$

    for the kinds ``arctan``, ``tanh``, ``softsign``, ``identity`` (which ignores $a$ and $b$). The first three are odd
    and increasing with slope $a/b$ at zero, and bounded (:func:`companding_bound`). For $a = b \to \infty$ they tend to
    $w = v$.

    Args:
      v: raw weights, any finite value.
      a: the height, positive; a scalar or broadcastable to ``v``.
      b: the width, positive; a scalar or broadcastable to ``v``.
      kind: ``arctan``, ``tanh``, ``softsign`` or ``identity``.

    Returns:
      Effective weights, in the shape and dtype of ``v``; computed in float32 for bfloat16 and float16.

    Raises:
      ValueError: if ``a`` or ``b`` is not positive and finite, or ``kind`` unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import companding
      >>> companding(jnp.array([-1e30, 0.0, 1.0]), a=2.0, b=1.0, kind="softsign").tolist()
      [-2.0, 0.0, 1.0]

    References:
      Cakaj, Mehnert, Yang, Weight Compander: A Simple Weight Reparameterization for Regularization, IJCNN 2023,
      https://arxiv.org/abs/2306.16993. There is no official code. The paper's function is taken to be the arctan; the
      other kinds are variants.
    """
    check_companding(a, b, kind)
    if kind == "identity":
        return v
    dtype = sum_dtype(v)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    return (a * _SHAPES[kind].value(v.astype(dtype) / b)).astype(v.dtype)


def companding_grad(v: Float[Array, "..."], a: ArrayLike, b: ArrayLike, kind: str = "arctan") -> Float[Array, "..."]:
    r"""The slope $dw/dv$ of :func:`companding`, largest at zero where it is $a/b$.

    For ``arctan`` it is $ab/(b^2+v^2)$. A step of gradient descent on $v$ moves $w$ with the learning rate times the
    square of the slope: $(a/b)^2$ for weights near zero, next to nothing for those near the bound.

    Args:
      v: raw weights.
      a: the height, positive.
      b: the width, positive.
      kind: ``arctan``, ``tanh``, ``softsign`` or ``identity``.

    Returns:
      The slope, in the shape and dtype of ``v``.

    Raises:
      ValueError: if ``a`` or ``b`` is not positive and finite, or ``kind`` unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import companding_grad
      >>> companding_grad(jnp.array([0.0, 0.5]), a=1.0, b=0.5).tolist()
      [2.0, 1.0]
    """
    check_companding(a, b, kind)
    if kind == "identity":
        return jnp.ones_like(v)
    dtype = sum_dtype(v)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    return (a / b * _SHAPES[kind].slope(v.astype(dtype) / b)).astype(v.dtype)


def companding_inverse(w: Float[Array, "..."], a: ArrayLike, b: ArrayLike, kind: str = "arctan") -> Float[Array, "..."]:
    r"""The raw weights $v$ with $\psi(v; a, b) = w$; for ``arctan``, $v = b\tan(w/a)$.

    Weights at the bound or beyond it have no raw value; they get that of a weight just below the bound (by 16 units in
    the last place), which is large and finite.

    Args:
      w: effective weights.
      a: the height, positive.
      b: the width, positive.
      kind: ``arctan``, ``tanh``, ``softsign`` or ``identity``.

    Returns:
      Raw weights, in the shape and dtype of ``w``.

    Raises:
      ValueError: if ``a`` or ``b`` is not positive and finite, or ``kind`` unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import companding, companding_inverse
      >>> v = companding_inverse(jnp.array([0.1, -0.2]), a=0.2, b=0.1)
      >>> bool(jnp.allclose(companding(v, 0.2, 0.1), jnp.array([0.1, -0.2]), atol=1e-7))
      True
    """
    check_companding(a, b, kind)
    if kind == "identity":
        return w
    dtype = sum_dtype(w)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    shape = _SHAPES[kind]
    most = shape.bound * (1 - 16 * float(jnp.finfo(dtype).eps))
    return (b * shape.inverse(jnp.clip(w.astype(dtype) / a, -most, most))).astype(w.dtype)
