"""The arguments that all attention functions share: checked, with heads grouped and every row's keys counted."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from poise.attention.visibility import Extent, Visibility, count_visible
from poise.core.arguments import check_count, check_range
from poise.core.arrays import at_least_float32

SMALLEST_NORM = 1e-12


class Rows(NamedTuple):
    """One attention problem behind its checks; axes batch B, key head K, group G, query T, key S.

    Attributes:
      query: ``[B, K, G, T, d]``, times the row's scale, so that scores are plain inner products.
      key: ``[B, K, S, d]``.
      value: ``[B, K, S, h]``.
      bias: ``[B|1, K|1, G|1, T|1, S|1]``, added to the scores, or None.
      count: ``[B, K, G, T]``, the number of keys that the row sees.
      broken: ``[B, K, G, T]``, whether one of those holds a value that is not finite.
      visibility: the arrays that say who sees whom.
    """

    query: Float[Array, "..."]
    key: Float[Array, "..."]
    value: Float[Array, "..."]
    bias: Float[Array, "..."] | None
    count: Int[Array, "..."]
    broken: Bool[Array, "..."]
    visibility: Visibility


def length_scale(head_dim: int, num_keys: ArrayLike) -> Float[Array, "..."]:
    r"""The factor $\log d\cdot\log n$ that keeps attention sharp however many keys a row sees.

    Args:
      head_dim: $d$, at least 2.
      num_keys: $n$, the number of keys that the row sees; 0 counts as 1.

    Returns:
      The factor in float32 (float64 for a float64 ``num_keys``), in the shape of ``num_keys``; 0 for one key.

    Raises:
      ValueError: if ``head_dim`` is below 2.

    Example:
      >>> from poise.attention import length_scale
      >>> round(float(length_scale(64, 1024)), 2)
      28.83

    References:
      *Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models*,
      https://arxiv.org/abs/2501.13428
    """
    check_count("head_dim", head_dim, 2)
    number = at_least_float32(num_keys)
    return math.log(head_dim) * jnp.log(jnp.maximum(number, 1))


def l2_normalize(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    r"""Vectors of length one, $x/\max(\|x\|_2, 10^{-12})$, whatever their magnitude.

    Squares of very large or small entries neither overflow nor vanish. A vector shorter than $10^{-12}$ has no
    direction worth following: its gradient is zero.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.attention.inputs import l2_normalize
      >>> l2_normalize(jnp.array([[3e30, 4e30], [0.0, 0.0]])).round(3).tolist()
      [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), -1, keepdims=True))
    shrunk = x / jnp.where(largest > 0, largest, 1)
    norm = jnp.sqrt(jnp.where(largest > 0, jnp.sum(shrunk * shrunk, -1, keepdims=True), 1))
    return jnp.where(norm * largest > SMALLEST_NORM, shrunk / norm, jax.lax.stop_gradient(x) / SMALLEST_NORM)


def _check_shapes(query: Any, key: Any, value: Any) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must have a floating dtype, got {x.dtype}")
        if x.ndim != query.ndim or x.ndim not in (3, 4):
            raise ValueError(
                f"{name} must have the axes [batch, length, heads, width] or [length, heads, width] like query, "
                f"got shape {x.shape} for a query of shape {query.shape}"
            )
        if 0 in x.shape:
            raise ValueError(f"{name} must not be empty, got shape {x.shape}")
        if x.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {x.dtype}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"value must have the batch, length and heads of key {key.shape}, got {value.shape}")
    if query.ndim == 4 and key.shape[0] != query.shape[0]:
        raise ValueError(f"key must have the batch of query {query.shape}, got {key.shape}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have the head width of query {query.shape}, got {key.shape}")
    if query.shape[-2] % key.shape[-2]:
        raise ValueError(f"the heads of query must be a multiple of those of key, got {query.shape} and {key.shape}")


def _grouped(name: str, x: Array, batched: bool, shape: tuple[int, int, int, int], key_heads: int) -> Array:
    """An array that broadcasts to ``[B, N, T, S]`` as ``[B|1, K|1, G|1, T|1, S|1]``."""
    x = x if batched else x[None]
    if x.ndim != 4 or any(a not in (1, b) for a, b in zip(x.shape, shape, strict=True)):
        raise ValueError(f"{name} must have 4 axes (3 without a batch) that broadcast to {shape}, got {x.shape}")
    heads = (1, 1) if x.shape[1] == 1 else (key_heads, shape[1] // key_heads)
    return x.reshape(x.shape[0], *heads, *x.shape[2:])


def _lengths(name: str, x: Any, batch: int, high: int) -> Array | None:
    if x is None:
        return None
    check_count(name, x, 0, high)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    if x.shape not in ((), (batch,)):
        raise ValueError(f"{name} must have shape ({batch},), got {x.shape}")
    return jnp.broadcast_to(x, (batch,))


def _segments(segment_ids: Any, batched: bool, batch: int, num_queries: int, num_keys: int) -> tuple:
    if segment_ids is None:
        return None, None
    pair = segment_ids if isinstance(segment_ids, tuple | list) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ValueError(f"segment_ids must be one array or a pair for queries and keys, got {len(pair)} of them")
    found = []
    for x, length in zip(pair, (num_queries, num_keys), strict=True):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"segment_ids must be integers, got {x.dtype}")
        x = x if batched else x[None]
        if x.shape != (batch, length):
            raise ValueError(f"segment_ids must have shape ({batch}, {length}) here, got {x.shape}")
        found.append(x)
    return tuple(found)


def _extent(num_queries: int, num_keys: int, is_causal: Any, window: Any) -> Extent:
    if not isinstance(is_causal, bool | np.bool_):
        raise TypeError(f"is_causal must be True or False, got {is_causal!r}")
    left = right = None
    if window is not None:
        left, right = window if isinstance(window, tuple | list) else (window, window)
        for side in (left, right):
            if not isinstance(side, int | np.integer) or isinstance(side, bool):
                raise TypeError(f"local_window_size must be an integer or a pair (left, right), got {window!r}")
            check_count("local_window_size", side, 0)
        left, right = int(left), int(right)
    if is_causal:
        right = 0
    return Extent(num_queries, num_keys, left, right)


def prepare(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any,
    bias: Any,
    is_causal: Any,
    query_seq_lengths: Any,
    key_value_seq_lengths: Any,
    local_window_size: Any,
    segment_ids: Any,
    qk_norm: bool,
    scale: Any,
    default_scale: Any,
) -> tuple[Rows, Extent]:
    """Checks the arguments of an attention function and brings them into one form.

    Statistics are at least float32, and so are the arrays here. Keys that hold a value which is not finite are
    replaced by zeros, and the rows that see one are marked: so nothing leaks from a value that is masked out.
    """
    query, key, value = jnp.asarray(query), jnp.asarray(key), jnp.asarray(value)
    _check_shapes(query, key, value)
    batched = query.ndim == 4
    query, key, value = (at_least_float32(x if batched else x[None]) for x in (query, key, value))
    batch, num_queries, heads, width = query.shape
    num_keys, key_heads = key.shape[1:3]
    full = (batch, heads, num_queries, num_keys)
    if mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be boolean, True where a key is seen, got {mask.dtype}")
        mask = _grouped("mask", mask, batched, full, key_heads)
    if bias is not None:
        bias = at_least_float32(bias).astype(query.dtype)
        bias = _grouped("bias", bias, batched, full, key_heads)
    extent = _extent(num_queries, num_keys, is_causal, local_window_size)
    query_segments, key_segments = _segments(segment_ids, batched, batch, num_queries, num_keys)
    visibility = Visibility(
        mask,
        query_segments,
        key_segments,
        _lengths("query_seq_lengths", query_seq_lengths, batch, num_queries),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, batch, num_keys),
    )

    query = query.reshape(batch, num_queries, key_heads, heads // key_heads, width).transpose(0, 2, 3, 1, 4)
    key, value = key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)
    broken = ~(jnp.isfinite(key).all(-1) & jnp.isfinite(value).all(-1))
    key, value = (jnp.where(broken[..., None], 0, x) for x in (key, value))
    count, sees_broken = count_visible(visibility, extent, broken)
    count, sees_broken = (jnp.broadcast_to(x, query.shape[:-1]) for x in (count, sees_broken))
    query = jnp.where((count > 0)[..., None], query, 0)
    if qk_norm:
        query, key = l2_normalize(query), l2_normalize(key)
    factor = _scale(default_scale if scale is None else scale, width, count, query.dtype)
    return Rows(query * factor, key, value, bias, count, sees_broken, visibility), extent


def _scale(scale: Any, width: int, count: Array, dtype: Any) -> Array:
    if isinstance(scale, str):
        if scale != "length":
            raise ValueError(f"scale must be a number or 'length', got {scale!r}")
        if width < 2:
            raise ValueError(f"the head width must be at least 2 for scale='length', since log(1) = 0, got {width}")
        return length_scale(width, count.astype(dtype))[..., None]
    check_range("scale", scale, 0.0, open_low=True, open_high=True)
    scale = jnp.asarray(scale, dtype)
    if scale.ndim:
        raise ValueError(f"scale must be a single number, got shape {scale.shape}")
    return scale


def ungroup(x: Float[Array, "batch heads groups queries *width"], like: Array) -> Float[Array, "..."]:
    """From ``[B, K, G, T, ...]`` back to ``[B, T, N, ...]``, without the batch axis if ``like`` has none."""
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 2)
    return x if like.ndim == 4 else x[0]
