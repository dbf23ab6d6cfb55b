"""Softmax attention with the arguments of softplus attention, so that a model switches by name."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.attention.blocks import Plan
from poise.attention.chunked_softmax import chunked_softmax
from poise.attention.dense import dense_scores
from poise.attention.inputs import Rows, prepare
from poise.attention.softplus_attention import (
    check_blocks,
    check_implementation,
    check_softplus_arguments,
    choose_implementation,
    finish,
)
from poise.attention.visibility import Extent
from poise.attention.weights import reweight_attention

IMPLEMENTATIONS = ("xla", "xla_chunked")


def dot_product_attention(
    query: Float[Array, "*batch queries heads width"],
    key: Float[Array, "*batch keys key_heads width"],
    value: Float[Array, "*batch keys key_heads value_width"],
    *,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    segment_ids: Any = None,
    power: float | int = 15.0,
    reweight: bool = False,
    offset_min_keys: int = 4,
    qk_norm: bool = False,
    scale: Any = None,
    bias: ArrayLike | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    block_size: int | tuple[int, int] | None = None,
) -> Any:
    r"""Softmax attention, $\mathrm{out}_i = \sum_j \mathrm{softmax}_j(s_{ij})\,v_j$ over the keys that row $i$ sees.

    $s_{ij} = q_i\cdot k_j/\sqrt d$ by default. With ``qk_norm=True, scale="length"`` the scores are those of
    :func:`poise.attention.softplus_attention`, $\log d\log n_i\;\hat q_i\cdot\hat k_j$: the control that tells what
    softplus adds to the scale alone. ``reweight=True`` sharpens the softmax weights in the same way as there.

    Differs from :func:`jax.nn.dot_product_attention` where a row sees nothing: zeros and zero gradients instead of a
    mean of masked values. A key or value that is not finite turns the rows that see it into NaN and no others.

    Args:
      query: ``[batch, queries, heads, width]`` or without the batch.
      key: ``[batch, keys, key_heads, width]``; ``heads`` is a multiple of ``key_heads`` (grouped queries).
      value: ``[batch, keys, key_heads, value_width]``.
      mask: booleans that broadcast to ``[batch, heads, queries, keys]``, True where a key is seen.
      is_causal: whether query i sees keys 0 to i only.
      query_seq_lengths: ``[batch]``; later queries are padding.
      key_value_seq_lengths: ``[batch]``; later keys are padding, whatever they hold.
      local_window_size: (left, right), or one number for both: query i sees keys from i - left to i + right.
      segment_ids: integers ``[batch, length]``, or a pair for queries and keys: only equal ones see each other.
      power: the power of the re-weighting; see :func:`poise.attention.reweight_attention`.
      reweight: whether to re-weight; only ``"xla"`` does.
      offset_min_keys: likewise.
      qk_norm: whether queries and keys are normalized.
      scale: a number, ``"length"`` for $\log d\log n_i$, or None for $1/\sqrt d$.
      bias: added to the scores, broadcasts like the mask; not together with ``qk_norm``.
      implementation: ``"xla"`` holds the score matrix; ``"xla_chunked"`` needs memory linear in the lengths, also
        backward; None takes the first up to 1024 by 1024 scores and for ``reweight``.
      return_residual: whether to return the logarithm of each row's sum of exponentials, too, without gradients.
      block_size: rows and columns at a time, or one number for both; for ``"xla_chunked"`` only.

    Returns:
      ``[batch, queries, heads, value_width]`` in the dtype of the query; sums are at least float32. With
      ``return_residual``, a pair of it and ``(logsumexp,)`` of shape ``[batch, queries, heads]``, minus infinity for a
      row that sees nothing.

    Raises:
      ValueError: if shapes don't fit, an argument is out of range, or the implementation is unknown or doesn't know an
        argument.
      TypeError: if the mask is not boolean, or an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.attention import dot_product_attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
      >>> out = dot_product_attention(x, x, x, is_causal=True)
      >>> bool(jnp.allclose(out, jax.nn.dot_product_attention(x, x, x, is_causal=True), atol=1e-6))
      True

    References:
      Vaswani et al., *Attention Is All You Need*, https://arxiv.org/abs/1706.03762
    """
    exponent = check_softplus_arguments(power, offset_min_keys, reweight, qk_norm, bias)
    check_implementation(implementation, IMPLEMENTATIONS)
    rows, extent = prepare(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        segment_ids=segment_ids,
        qk_norm=qk_norm,
        scale=scale,
        default_scale=jnp.shape(query)[-1] ** -0.5,
    )
    if implementation is None and reweight and block_size is None:
        implementation = "xla"
    implementation = choose_implementation(implementation, extent, block_size)
    if implementation == "xla":
        out, statistics = _dense(rows, extent, exponent, offset_min_keys)
    elif reweight:
        raise ValueError(f"reweight=True is not for implementation={implementation!r}; use 'xla'")
    else:
        blocks = check_blocks(block_size, extent.num_queries, extent.num_keys)
        out, statistics = chunked_softmax(rows, Plan(extent, None, offset_min_keys, *blocks))
    return finish(out, statistics, rows.broken, jnp.asarray(query), return_residual)


def _dense(rows: Rows, extent: Extent, power: float | None, offset_min_keys: int) -> tuple[Array, tuple[Array]]:
    scores, seen = dense_scores(rows, extent)
    weights = jax.nn.softmax(scores, where=jnp.broadcast_to(seen, scores.shape))
    if power is not None:
        weights = reweight_attention(weights, seen, power=power, offset_min_keys=offset_min_keys, num_keys=rows.count)
    statistics = jax.nn.logsumexp(jax.lax.stop_gradient(scores), axis=-1, where=seen)
    return jnp.einsum("bkgts,bksh->bkgth", weights, rows.value), (statistics,)
