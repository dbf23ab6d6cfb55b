"""Checks and arithmetic that all quantizers share: bits, weights, the axes of a group, code ranges."""

import operator
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array

from poise.core.arguments import check_count, concrete

Axis: TypeAlias = int | tuple[int, ...] | None
"""The axes that share one scale, which are those reduced over; None for all of them."""


def check_bits(bits: Any, low: int = 1, high: int = 8, name: str = "bits") -> None:
    """Raises unless a width is a whole number in ``[low, high]``.

    Raises:
      ValueError: if it is anything else.
    """
    if isinstance(bits, bool | np.bool_) or not isinstance(bits, int | np.integer):
        raise ValueError(f"{name} must be an integer in [{low}, {high}], got {bits!r}")
    check_count(name, bits, low, high)


def as_floats(name: str, x: Any) -> Array:
    """The array itself, after the checks that every quantizer makes of what it quantizes.

    Raises:
      ValueError: if it does not hold floats, or holds a NaN or an infinity that can be seen now.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must hold floats, got {x.dtype}")
    values = concrete(x)
    if values is not None and not np.all(np.isfinite(values)):
        raise ValueError(f"{name} must be finite, got {np.count_nonzero(~np.isfinite(values))} entries that are not")
    return x


def group_axes(axis: Axis, ndim: int) -> tuple[int, ...]:
    """The axes of one group, counted from the front.

    Raises:
      ValueError: if one is out of range or named twice.
    """
    if axis is None:
        return tuple(range(ndim))
    axes = tuple(operator.index(a) for a in (axis if isinstance(axis, tuple) else (axis,)))
    if any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis must lie in [{-ndim}, {ndim - 1}] for an array of {ndim} axes, got {axis}")
    axes = tuple(sorted(a % ndim for a in axes))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis must name every axis at most once, got {axis}")
    return axes


def check_not_empty(name: str, x: Array) -> None:
    """Raises a ValueError if there is nothing to take a scale from."""
    if not x.size:
        raise ValueError(f"{name} must not be empty, got shape {x.shape}")


def check_broadcasts(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless a parameter broadcasts against an array without enlarging it."""
    try:
        fits = np.broadcast_shapes(np.shape(value), shape) == tuple(shape)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to the shape {tuple(shape)}, got {np.shape(value)}")


def code_range(bits: int, signed: bool = True) -> tuple[int, int]:
    """The least and the greatest code: ``[-2^(b-1), 2^(b-1) - 1]``, or ``[0, 2^b - 1]`` without a sign."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def safe_scale(scale: Array) -> Array:
    """The scale where it is positive, else 1, so that a group of zeros divides by no zero."""
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))
