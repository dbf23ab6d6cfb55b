"""Checks of arguments at trace time: concrete values are judged, tracers pass."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at now, that is, isn't traced by a transformation.

    Example:
      >>> import jax
      >>> from poise.fdistill.checks import is_concrete
      >>> is_concrete(1.0), bool(jax.jit(lambda x: x * is_concrete(x))(1.0))
      (True, False)
    """
    return not isinstance(value, jax.core.Tracer)


def check_range(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raises unless every concrete entry of ``value`` lies in the interval from ``low`` to ``high``.

    Args:
      name: the argument's name, for the message.
      value: a number or array; tracers pass unchecked.
      low: the lower end.
      high: the upper end.
      low_open: whether the lower end itself is excluded.
      high_open: whether the upper end itself is excluded.

    Raises:
      ValueError: if an entry is not a number or lies outside.

    Example:
      >>> from poise.fdistill.checks import check_range
      >>> check_range("decay", 1.0, low=0.0, high=1.0, high_open=True)
      Traceback (most recent call last):
      ValueError: decay must lie in [0.0, 1.0), got 1.0
    """
    if not is_concrete(value):
        return
    entries = np.asarray(value, dtype=np.float64)
    above = entries > low if low_open else entries >= low
    below = entries < high if high_open else entries <= high
    if not np.all(above & below):
        interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
        shown = entries.item() if entries.ndim == 0 else f"values from {entries.min()} to {entries.max()}"
        raise ValueError(f"{name} must lie in {interval}, got {shown}")


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises unless ``value`` is one of the allowed names.

    Example:
      >>> from poise.fdistill.checks import check_choice
      >>> check_choice("kind", "quadratic", ("karras", "linear"))
      Traceback (most recent call last):
      ValueError: kind must be one of karras, linear, got 'quadratic'
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def at_least_float32(x: Array) -> Array:
    """The array in float32 if it is narrower (bfloat16, float16, integers), else unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill.checks import at_least_float32
      >>> at_least_float32(jnp.ones(2, jnp.bfloat16)).dtype
      dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def expand_like(x: Array, like: Array) -> Array:
    """Per-example values ``[batch]`` with trailing axes of length 1, so that they broadcast against ``[batch, ...]``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill.checks import expand_like
      >>> expand_like(jnp.ones(3), jnp.ones((3, 8, 8))).shape
      (3, 1, 1)
    """
    return jnp.reshape(x, jnp.shape(x) + (1,) * (jnp.ndim(like) - jnp.ndim(x)))
