"""What a set of samples must look like before it can be measured."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike


def check_values(name: str, values: ArrayLike | Sequence[float], test: Callable[[Array], Array], allowed: str) -> None:
    """Raises a ValueError that names the argument if a concrete value fails a test; tracers pass.

    Args:
      name: the argument's name, for the message.
      values: numbers of any shape.
      test: elementwise, True for what is allowed.
      allowed: the same in words, to follow "must be".

    Raises:
      ValueError: if a concrete value fails.
    """
    if isinstance(values, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        array = jnp.asarray(values)
        passed = test(array)
        if passed.all():
            return
        bad = array[~passed]
    shown = ", ".join(str(value) for value in bad[:3])
    raise ValueError(f"{name} must be {allowed}, got {shown}{', ...' if bad.size > 3 else ''}")


def check_array(name: str, values: ArrayLike, rank: int) -> Array:
    """Checks rank, dtype and finiteness, and brings 16-bit floats to float32.

    Args:
      name: the argument's name, for the messages.
      values: the array.
      rank: the number of axes that it must have.

    Returns:
      The array, in float32 if it came in bfloat16 or float16, else in its own dtype.

    Raises:
      TypeError: if the dtype is not a real floating one.
      ValueError: if the rank is another, or a concrete value is not finite.
    """
    raw, values = values, jnp.asarray(values)
    if values.ndim != rank:
        raise ValueError(f"{name} must have {rank} axes, got shape {values.shape}")
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise TypeError(f"{name} must have a real floating dtype, got {values.dtype}")
    check_values(name, raw, jnp.isfinite, "finite")
    return values.astype(jnp.promote_types(values.dtype, jnp.float32))


def check_features(name: str, features: ArrayLike, min_samples: int = 2) -> Array:
    """Checks a matrix with one sample a row; see :func:`check_array`.

    Args:
      name: the argument's name, for the messages.
      features: samples of shape ``[samples, dim]``.
      min_samples: the fewest rows allowed.

    Returns:
      The samples, in at least float32.

    Raises:
      TypeError: if the dtype is not a real floating one.
      ValueError: if the rank is not 2, there are too few samples or no features, or a concrete value is not finite.
    """
    features = check_array(name, features, rank=2)
    samples, dim = features.shape
    if samples < min_samples:
        raise ValueError(f"{name} must hold at least {min_samples} samples (rows), got shape {features.shape}")
    if dim < 1:
        raise ValueError(f"{name} must have at least one feature (column), got shape {features.shape}")
    return features


def check_pair(
    first: tuple[str, ArrayLike], second: tuple[str, ArrayLike], min_samples: int = 2
) -> tuple[Array, Array]:
    """Checks two sample sets that are to be compared; see :func:`check_features`.

    Args:
      first: name and samples of shape ``[n, dim]``.
      second: name and samples of shape ``[m, dim]``.
      min_samples: the fewest rows allowed in either.

    Returns:
      Both sample sets, in at least float32.

    Raises:
      TypeError: if a dtype is not a real floating one.
      ValueError: if either is malformed, or their numbers of features differ.
    """
    x, y = (check_features(name, values, min_samples) for name, values in (first, second))
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{first[0]} and {second[0]} must have the same number of features (columns), "
            f"got shapes {x.shape} and {y.shape}"
        )
    return x, y


def check_block_size(block_size: int) -> None:
    """Raises a ValueError if the number of rows worked on at a time is below 1.

    Args:
      block_size: the number of rows.

    Raises:
      ValueError: if it is below 1.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
