"""Which keys a query sees: masks, causality, windows, lengths and segments, for any block of the score matrix."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Int

COUNT_BLOCK = 512


class Extent(NamedTuple):
    """What is known of a score matrix without looking at an array; hashable.

    Attributes:
      num_queries: the rows that exist; padding beyond them sees nothing.
      num_keys: the columns that exist; padding beyond them is seen by nobody.
      left: row i sees keys from ``i - left`` on; None for all.
      right: row i sees keys up to ``i + right``; 0 is causal, None for all.
    """

    num_queries: int
    num_keys: int
    left: int | None = None
    right: int | None = None


class Visibility(NamedTuple):
    """What is known of a score matrix from arrays; axes batch, key head, group, query, key, where 1 broadcasts.

    Attributes:
      mask: ``[B|1, K|1, G|1, T|1, S|1]``, True where a query sees a key.
      query_segments: ``[B, T]``; a query sees keys of its own segment only.
      key_segments: ``[B, S]``.
      query_lengths: ``[B]``; later queries see nothing.
      key_lengths: ``[B]``; later keys are seen by nobody.
    """

    mask: Bool[Array, "..."] | None = None
    query_segments: Int[Array, "..."] | None = None
    key_segments: Int[Array, "..."] | None = None
    query_lengths: Int[Array, "..."] | None = None
    key_lengths: Int[Array, "..."] | None = None


def _slice(x: Array, start: ArrayLike, size: int, axis: int) -> Array:
    return x if x.shape[axis] == 1 else jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def block_of(x: Array, rows: tuple[ArrayLike, int], columns: tuple[ArrayLike, int]) -> Array:
    """The block of an array ``[..., T|1, S|1]`` at (start, size) of rows and of columns; axes of length 1 stay."""
    return _slice(_slice(x, *rows, axis=x.ndim - 2), *columns, axis=x.ndim - 1)


def visible_block(
    visibility: Visibility,
    extent: Extent,
    rows: tuple[ArrayLike, int],
    columns: tuple[ArrayLike, int],
    key_offset: ArrayLike = 0,
) -> Bool[Array, "#batch #heads #groups queries keys"]:
    """Which keys the rows see, for a block of the score matrix.

    Args:
      visibility: arrays that cover at least the block, padded by :func:`pad_visibility` where it reaches beyond.
      extent: the static part.
      rows: (start, size); the start may be traced.
      columns: likewise, counted in the arrays of ``visibility``.
      key_offset: the position of the first column of those arrays, where they hold a part of the keys.
    """
    i = (rows[0] + jnp.arange(rows[1]))[:, None]
    local = columns[0] + jnp.arange(columns[1])
    j = (key_offset + local)[None, :]
    seen = (i < extent.num_queries) & (j < extent.num_keys)
    if extent.left is not None:
        seen &= j >= i - extent.left
    if extent.right is not None:
        seen &= j <= i + extent.right
    seen = seen[None]
    if visibility.query_lengths is not None:
        seen = seen & (i < visibility.query_lengths[:, None, None])
    if visibility.key_lengths is not None:
        seen = seen & (j < visibility.key_lengths[:, None, None])
    if visibility.query_segments is not None and visibility.key_segments is not None:
        of_rows = jax.lax.dynamic_slice_in_dim(visibility.query_segments, *rows, axis=1)
        of_columns = jax.lax.dynamic_slice_in_dim(visibility.key_segments, *columns, axis=1)
        seen = seen & (of_rows[:, :, None] == of_columns[:, None, :])
    seen = seen[:, None, None]
    return jnp.asarray(seen if visibility.mask is None else seen & block_of(visibility.mask, rows, columns))


def pad_axis(x: Array, axis: int, size: int) -> Array:
    """Zeros (False) behind an axis up to a size."""
    missing = size - x.shape[axis]
    return x if missing <= 0 else jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


def pad_visibility(visibility: Visibility, num_rows: int, num_columns: int) -> Visibility:
    """The same for a score matrix that is padded; what is padded is excluded by the :class:`Extent`."""
    mask, of_queries, of_keys = visibility.mask, visibility.query_segments, visibility.key_segments
    if mask is not None:
        mask = mask if mask.shape[-2] == 1 else pad_axis(mask, mask.ndim - 2, num_rows)
        mask = mask if mask.shape[-1] == 1 else pad_axis(mask, mask.ndim - 1, num_columns)
    return visibility._replace(
        mask=mask,
        query_segments=None if of_queries is None else pad_axis(of_queries, 1, num_rows),
        key_segments=None if of_keys is None else pad_axis(of_keys, 1, num_columns),
    )


def key_range(extent: Extent, rows: tuple[ArrayLike, int]) -> tuple[ArrayLike, ArrayLike]:
    """The half-open range of key positions outside of which no row of a block sees anything."""
    low = 0 if extent.left is None else jnp.maximum(rows[0] - extent.left, 0)
    high = extent.num_keys
    if extent.right is not None:
        high = jnp.clip(rows[0] + rows[1] + extent.right, 0, high)
    return low, high


def count_visible(
    visibility: Visibility, extent: Extent, broken: Bool[Array, "batch heads keys"]
) -> tuple[Int[Array, "#batch #heads #groups queries"], Bool[Array, "batch heads #groups queries"]]:
    """The number of keys that each row sees, and whether it sees a broken one, in linear memory.

    Without masks and segments a row sees an interval, and both follow from its ends. Otherwise the visible keys are
    counted block by block.

    Args:
      visibility: unpadded.
      extent: the static part.
      broken: keys that hold a value which is not finite.
    """
    rows = (0, extent.num_queries)
    if visibility.mask is None and visibility.query_segments is None:
        i = jnp.arange(extent.num_queries)[None]
        low = jnp.zeros_like(i) if extent.left is None else jnp.clip(i - extent.left, 0, extent.num_keys)
        high = jnp.full_like(i, extent.num_keys)
        if extent.right is not None:
            high = jnp.clip(i + extent.right + 1, 0, extent.num_keys)
        if visibility.key_lengths is not None:
            high = jnp.minimum(high, visibility.key_lengths[:, None])
        high = jnp.maximum(high, low)
        if visibility.query_lengths is not None:
            high = jnp.where(i < visibility.query_lengths[:, None], high, low)
        sums = jnp.pad(jnp.cumsum(broken, -1, dtype=jnp.int32), [(0, 0), (0, 0), (1, 0)])
        low, high = (jnp.broadcast_to(x[:, None], (*sums.shape[:2], x.shape[-1])) for x in (low, high))
        between = jnp.take_along_axis(sums, high, -1) - jnp.take_along_axis(sums, low, -1)
        return (high - low)[:, :, None].astype(jnp.int32), (between > 0)[:, :, None]

    size = min(COUNT_BLOCK, extent.num_keys)
    blocks = -(-extent.num_keys // size)
    padded = pad_visibility(visibility, extent.num_queries, blocks * size)
    broken = pad_axis(broken, 2, blocks * size)
    shape = jax.eval_shape(lambda: visible_block(padded, extent, rows, (0, size))).shape[:4]

    def count(block, carry):
        number, sees_broken = carry
        columns = (block * size, size)
        seen = visible_block(padded, extent, rows, columns)
        here = jax.lax.dynamic_slice_in_dim(broken, *columns, axis=2)[:, :, None, None]
        return number + seen.sum(-1, dtype=jnp.int32), sees_broken | (seen & here).any(-1)

    pairs = jnp.broadcast_shapes(shape, (*broken.shape[:2], 1, 1))
    return jax.lax.fori_loop(0, blocks, count, (jnp.zeros(shape, jnp.int32), jnp.zeros(pairs, bool)))
