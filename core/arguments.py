"""Checks of arguments: concrete values only, so that traced ones and schedules pass."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def is_concrete(value: Any) -> bool:
    """Whether a value can be looked at now, that is, isn't traced by a transformation.

    Example:
      >>> import jax
      >>> from poise.core.arguments import is_concrete
      >>> is_concrete(1.0), bool(jax.jit(lambda x: x * is_concrete(x))(1.0))
      (True, False)
    """
    return not isinstance(value, jax.core.Tracer)


def concrete(value: Any) -> np.ndarray | None:
    """The value as a numpy array, or None for a tracer, a schedule or None itself."""
    if value is None or callable(value) or not is_concrete(value):
        return None
    return np.asarray(value)


def check_range(
    name: str,
    value: Any,
    low: float = -np.inf,
    high: float = np.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Raises if a concrete number lies outside of an interval; tracers and schedules pass.

    Args:
      name: the argument's name, for the message.
      value: a number, an array, a tracer, a schedule or None.
      low: the least allowed value.
      high: the greatest allowed value.
      open_low: whether ``low`` itself is excluded.
      open_high: whether ``high`` itself is excluded.

    Raises:
      TypeError: if the value is not a number.
      ValueError: if it is NaN or outside of the interval.

    Example:
      >>> from poise.core.arguments import check_range
      >>> check_range("decay", 1.0, 0.0, 1.0, open_high=True)
      Traceback (most recent call last):
      ValueError: decay must lie in [0, 1), got 1.0
    """
    number = concrete(value)
    if number is None:
        return
    if not (np.issubdtype(number.dtype, np.number) or jax.numpy.issubdtype(number.dtype, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = number.astype(np.float64)
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not np.all(above & below):
        left, right = "(" if open_low else "[", ")" if open_high else "]"
        raise ValueError(f"{name} must lie in {left}{low:g}, {high:g}{right}, got {value!r}")


def check_count(name: str, value: Any, low: int = 1, high: int | None = None) -> None:
    """Raises unless a concrete value is a whole number in ``[low, high]``; tracers pass.

    Raises:
      TypeError: if the value is no integer (booleans are none).
      ValueError: if it is out of range.
    """
    number = concrete(value)
    if number is None:
        return
    if not np.issubdtype(number.dtype, np.integer):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if np.any(number < low) or (high is not None and np.any(number > high)):
        allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raises a ValueError unless the value is one of the allowed names.

    Example:
      >>> from poise.core.arguments import check_choice
      >>> check_choice("kind", "quadratic", ("karras", "linear"))
      Traceback (most recent call last):
      ValueError: kind must be one of karras, linear, got 'quadratic'
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_real(name: str, tree: Any) -> None:
    """Raises a TypeError if a leaf is complex; the methods here are about real weights."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.numpy.issubdtype(jax.numpy.result_type(leaf), jax.numpy.complexfloating):
            raise TypeError(
                f"{name} must be real, got {jax.numpy.result_type(leaf)} at {jax.tree_util.keystr(path)}; "
                "wrap the transformation in optax.contrib.split_real_and_imaginary"
            )
