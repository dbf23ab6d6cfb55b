"""Attention token by token, with the keys and values so far in a cache."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from poise.attention.softplus_attention import softplus_attention
from poise.core.arguments import check_count

_OF_THE_CACHE = ("is_causal", "mask", "query_seq_lengths", "key_value_seq_lengths", "segment_ids")


class KeyValueCache(NamedTuple):
    """Keys and values so far; a pytree for ``scan``.

    Attributes:
      key: ``[batch, max_length, key_heads, width]``.
      value: ``[batch, max_length, key_heads, value_width]``.
      num_keys: ``[batch]``, how many of them each row of the batch has.
    """

    key: Float[Array, "batch max_length key_heads width"]
    value: Float[Array, "batch max_length key_heads value_width"]
    num_keys: Int[Array, " batch"]


def init_cache(
    batch: int, max_length: int, key_heads: int, width: int, value_width: int | None = None, dtype: Any = jnp.float32
) -> KeyValueCache:
    """An empty cache.

    Args:
      batch: the number of sequences.
      max_length: the most keys that fit.
      key_heads: heads of keys and values.
      width: the width of a key.
      value_width: the width of a value; None for that of a key.
      dtype: of both.

    Raises:
      ValueError: if a size is below 1.

    Example:
      >>> from poise.attention import init_cache
      >>> init_cache(2, 16, 4, 8).key.shape
      (2, 16, 4, 8)
    """
    value_width = width if value_width is None else value_width
    sizes = {
        "batch": batch,
        "max_length": max_length,
        "key_heads": key_heads,
        "width": width,
        "value_width": value_width,
    }
    for name, size in sizes.items():
        check_count(name, size)
    shape = (batch, max_length, key_heads)
    return KeyValueCache(
        jnp.zeros((*shape, width), dtype), jnp.zeros((*shape, value_width), dtype), jnp.zeros(batch, jnp.int32)
    )


def attend_with_cache(
    query: Float[Array, "batch new heads width"],
    key: Float[Array, "batch new key_heads width"],
    value: Float[Array, "batch new key_heads value_width"],
    cache: KeyValueCache,
    *,
    attention: Callable[..., Array] = softplus_attention,
    new_lengths: ArrayLike | None = None,
    **options: Any,
) -> tuple[Float[Array, "batch new heads value_width"], KeyValueCache]:
    r"""Appends keys and values to a cache and attends to all of it: what a causal call gives for these rows.

    New query $t$ of a sequence with $n$ cached keys sees $n + t + 1$ of them, and that is the number in its length
    scale. Positions (RoPE) are applied before, from ``cache.num_keys`` on. Works for a whole prompt, a part of one, or
    one token; scores of new queries by ``max_length`` are held.

    Args:
      query: ``[batch, new, heads, width]``.
      key: ``[batch, new, key_heads, width]``.
      value: ``[batch, new, key_heads, value_width]``.
      cache: the cache so far. It must have room: what is beyond its end is not kept, and its rows are NaN.
      attention: :func:`poise.attention.softplus_attention`, :func:`poise.attention.dot_product_attention` or any
        function with their arguments.
      new_lengths: ``[batch]``, how many of the new entries count; later ones are padding. None for all.
      **options: options of the attention function, added to those that a ``functools.partial`` has bound. A
        ``local_window_size`` counts from each entry's place in the whole sequence. Causality and lengths are the
        cache's business.

    Returns:
      Outputs and the longer cache. Outputs of padding are zeros.

    Raises:
      ValueError: if shapes don't fit the cache, or an option says what the cache already knows.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.attention import attend_with_cache, init_cache, softplus_attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 6, 2, 4))
      >>> cache, rows = init_cache(1, 8, 2, 4), []
      >>> for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
      ...     out, cache = attend_with_cache(part, part, part, cache)
      ...     rows.append(out)
      >>> whole = softplus_attention(x, x, x, is_causal=True)
      >>> bool(jnp.allclose(jnp.concatenate(rows, 1), whole, atol=1e-5)), int(cache.num_keys[0])
      (True, 6)
    """
    for name, new, old in (("key", key, cache.key), ("value", value, cache.value)):
        if new.shape[:1] + new.shape[2:] != old.shape[:1] + old.shape[2:]:
            raise ValueError(f"{name} must fit the cache of shape {old.shape}, got {new.shape}")
    bound = {**getattr(attention, "keywords", {}), **options}
    for name in _OF_THE_CACHE:
        if bound.get(name) is not None and bound[name] is not False:
            raise ValueError(f"{name} must not be given, since the cache knows what each entry sees, got {bound[name]}")
    window = bound.get("local_window_size")
    if "local_window_size" in bound:
        options = {**options, "local_window_size": None}
    batch, length = query.shape[:2]
    max_length = cache.key.shape[1]
    steps = jnp.arange(length)
    new_lengths = jnp.full(batch, length) if new_lengths is None else jnp.broadcast_to(new_lengths, (batch,))
    counted = steps < new_lengths[:, None]
    places = jnp.where(counted, cache.num_keys[:, None] + steps, max_length)

    def append(old: Array, new: Array, place: Array) -> Array:
        return old.at[place].set(new.astype(old.dtype), mode="drop")

    keys = jax.vmap(append)(cache.key, key, places)
    values = jax.vmap(append)(cache.value, value, places)
    mask = (jnp.arange(max_length) <= places[..., None]) & counted[..., None]
    if window is not None:
        left = window if isinstance(window, int) else window[0]
        mask &= jnp.arange(max_length) >= places[..., None] - left
    out = attention(query, keys.astype(query.dtype), values.astype(query.dtype), mask=mask[:, None], **options)
    full = counted & (places >= max_length)
    out = jnp.where(full[..., None, None], jnp.nan, out)
    return out, KeyValueCache(keys, values, cache.num_keys + new_lengths.astype(jnp.int32))
