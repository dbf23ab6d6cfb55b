"""Attention functions in the place of Flax's own."""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from poise.attention.softplus_attention import softplus_attention


def attention_fn(attention: Callable[..., Array] = softplus_attention, **options: Any) -> Callable[..., Array]:
    """Makes the argument ``attention_fn`` of Flax's multi-head attention, for ``flax.linen`` and ``flax.nnx`` alike.

    Flax passes what its modules know: masks (of any dtype, also in decoding, where the number of keys that a row sees
    is the length of the cache), dropout, dtype and precision. Masks and ``is_causal`` are handed on; the rest has no
    place in these functions and raises where it would matter.

    Args:
      attention: :func:`poise.attention.softplus_attention`, :func:`poise.attention.dot_product_attention` or any
        function with their arguments.
      **options: its options, such as ``power=3.0`` or ``implementation="xla_chunked"``.

    Returns:
      A function of query, key and value ``[*batch, length, heads, width]`` and of what Flax passes by name.

    Raises:
      TypeError: if the attention function doesn't know an option.
      ValueError: when the result is called with dropout, with weights to be recorded, or with a window in decoding.

    Example:
      >>> import flax.linen as nn, jax
      >>> from poise.attention import attention_fn
      >>> layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=attention_fn(power=3.0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 6, 8))
      >>> layer.init_with_output(jax.random.key(1), x, mask=nn.make_causal_mask(x[..., 0]))[0].shape
      (1, 6, 8)
    """
    known = inspect.signature(attention).parameters
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for option in options:
        if option not in known and not free:
            raise TypeError(f"{option} is no argument of the attention function, which knows {', '.join(known)}")

    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Any = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
    ) -> Array:
        if dropout_rate > 0 and not deterministic:
            raise ValueError(
                f"dropout_rate must be 0: attention weights are never held to be dropped, got {dropout_rate}"
            )
        if module is not None:
            raise ValueError("sow_weights must be False: attention weights are never held to be recorded")
        if precision is not None:
            raise ValueError("precision must be None; set jax.default_matmul_precision around the call instead")
        window = options.get("local_window_size", getattr(attention, "keywords", {}).get("local_window_size"))
        if window is not None and query.shape[-3] != key.shape[-3]:
            raise ValueError(
                "local_window_size must be None where queries and keys differ in number, as in decoding with Flax's "
                f"cache, whose place it can't know, got {window} for {query.shape[-3]} queries and {key.shape[-3]} keys"
            )
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
        batch = query.shape[:-3]
        flat = [x.reshape(-1, *x.shape[-3:]) for x in (query, key, value)]
        more = dict(options)
        if is_causal:
            more["is_causal"] = True
        if mask is not None:
            more["mask"] = _flat(jnp.asarray(mask) != 0, batch)
        if bias is not None:
            more["bias"] = _flat(bias, batch)
        out = attention(*flat, **more)
        return out.reshape(*batch, *out.shape[1:])

    return attend


def _flat(x: Array, batch: tuple[int, ...]) -> Array:
    """An array that broadcasts to ``[*batch, heads, queries, keys]`` with one batch axis."""
    x = x.reshape((1,) * (len(batch) + 3 - x.ndim) + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(-1, *x.shape[-3:])
