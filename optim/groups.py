"""Groups of weights: filters, channels, rows, single weights, or any partition by number."""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poise.core.arguments import check_range, concrete
from poise.optim.leaves import sum_dtype

Groups: TypeAlias = Any
"""A name of :data:`GROUP_AXES`, a tuple of the axes that number the groups, or an array of group numbers."""

GROUP_AXES = {"filters": (-1,), "channels": (-2,), "rows": (0,), "weights": None}


class Partition(NamedTuple):
    """Groups of one shape: either the axes that number them, or the number of every entry.

    Attributes:
      axes: nonnegative axes, or None.
      ids: group numbers in the leaf's shape, or None.
      count: how many groups there are.
      sizes: how many entries each has, in the shape of what :func:`sum_groups` returns.
    """

    axes: tuple[int, ...] | None
    ids: np.ndarray | None
    count: int
    sizes: np.ndarray


def partition(shape: tuple[int, ...], groups: Groups) -> Partition:
    """Resolves a description of groups for a shape.

    Args:
      shape: the leaf's shape.
      groups: ``filters`` (the last axis of a Flax kernel), ``channels`` (the last but one), ``rows`` (the first),
        ``weights`` (each entry on its own), a tuple of axes, or an integer array of that shape in which the numbers
        from 0 on all occur.

    Raises:
      ValueError: if the name is unknown, an axis out of range or named twice, or the array does not number groups.
      TypeError: if it is none of these.
    """
    rank = len(shape)
    if isinstance(groups, str):
        if groups not in GROUP_AXES:
            raise ValueError(f"groups must be one of {', '.join(map(repr, GROUP_AXES))}, got {groups!r}")
        groups = tuple(range(rank)) if GROUP_AXES[groups] is None else GROUP_AXES[groups]
    if isinstance(groups, tuple):
        if not all(isinstance(axis, int) for axis in groups):
            raise TypeError(f"groups must be a tuple of integers, got {groups}")
        if any(not -rank <= axis < rank for axis in groups):
            raise ValueError(f"groups must name axes in [{-rank}, {rank - 1}] for shape {shape}, got {groups}")
        axes = tuple(sorted(axis % rank for axis in groups))
        if len(set(axes)) != len(axes):
            raise ValueError(f"groups must name every axis at most once, got {groups} for shape {shape}")
        kept = tuple(size if axis in axes else 1 for axis, size in enumerate(shape))
        count = int(np.prod(kept))
        return Partition(axes, None, count, np.full(kept, int(np.prod(shape)) // max(count, 1)))
    ids = concrete(groups)
    if ids is None or not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"groups must be a name, a tuple of axes or a concrete array of integers, got {groups!r}")
    if ids.shape != shape:
        raise ValueError(f"groups must number every entry of shape {shape}, got an array of shape {ids.shape}")
    numbers, sizes = np.unique(ids, return_counts=True)
    if not np.array_equal(numbers, np.arange(len(numbers))):
        raise ValueError(f"groups must use every number from 0 on, got {numbers}")
    return Partition(None, ids, len(numbers), sizes)


def sum_groups(x: Array, parts: Partition) -> Array:
    """Sums over every group: of shape ``[count]`` for numbered groups, else in the leaf's rank with size 1 within."""
    if parts.ids is None:
        within = tuple(axis for axis in range(x.ndim) if axis not in (parts.axes or ()))
        return jnp.sum(x, axis=within, keepdims=True)
    return jax.ops.segment_sum(x.reshape(-1), jnp.asarray(parts.ids.reshape(-1)), parts.count)


def spread(values: Array, parts: Partition) -> Array:
    """Gives every entry its group's value, or something that broadcasts to that."""
    return values if parts.ids is None else values[parts.ids]


def group_weights(weights: Any, parts: Partition, dtype: Any) -> Array:
    """Positive weights of the groups: 1 for None, their sizes or the roots of these by name, or the given numbers.

    Raises:
      ValueError: if a weight is not positive and finite, a name is unknown or the shape does not fit.
    """
    if weights is None:
        return jnp.ones(parts.sizes.shape, dtype)
    if isinstance(weights, str):
        if weights not in ("size", "sqrt_size"):
            raise ValueError(f"weights must be None, 'size', 'sqrt_size' or numbers, got {weights!r}")
        return jnp.asarray(parts.sizes if weights == "size" else np.sqrt(parts.sizes), dtype)
    check_range("weights", weights, 0.0, open_low=True, open_high=True)
    numbers = jnp.asarray(weights, dtype)
    own = (parts.count,) if parts.ids is not None else tuple(parts.sizes.shape[axis] for axis in parts.axes or ())
    if numbers.shape not in ((), own, parts.sizes.shape):
        raise ValueError(f"weights must be a number or an array of shape {own}, got shape {numbers.shape}")
    return jnp.broadcast_to(numbers if numbers.ndim == 0 else numbers.reshape(parts.sizes.shape), parts.sizes.shape)


def group_squares(x: Array, parts: Partition) -> Array:
    """Squared norms of the groups, in float32 at least."""
    return sum_groups(jnp.square(x.astype(sum_dtype(x))), parts)
