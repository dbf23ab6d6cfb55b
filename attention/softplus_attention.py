"""Softplus attention with re-weighting: one function over several implementations."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from poise.attention.blocks import Plan
from poise.attention.chunked import chunked_softplus
from poise.attention.dense import dense_softplus
from poise.attention.inputs import prepare, ungroup
from poise.attention.pallas_softplus import BLOCKS as PALLAS_BLOCKS
from poise.attention.pallas_softplus import pallas_softplus
from poise.attention.visibility import Extent
from poise.core.arguments import check_choice, check_count, check_range, is_concrete

IMPLEMENTATIONS = ("xla", "xla_chunked", "pallas", "pallas_interpret")
DENSE_SCORES = 2**20  # by default, score matrices of up to this size per head are held in memory
BLOCKS = (256, 512)


def softplus_attention(
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
    reweight: bool = True,
    offset_min_keys: int = 4,
    qk_norm: bool = True,
    scale: Any = None,
    bias: ArrayLike | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    block_size: int | tuple[int, int] | None = None,
) -> Any:
    r"""Attention by softplus instead of the exponential, sharpened so that it stays sharp over long contexts.

    With unit vectors $\hat q_i, \hat k_j$ and the number $n_i$ of keys that row $i$ sees ($M_{ij} = 1$),

    $$f_{ij} = M_{ij}\,\mathrm{softplus}(\log d\,\log n_i\;\hat q_i\cdot\hat k_j), \qquad
    h_{ij} = M_{ij}\max\Big(f_{ij} - \frac{o_i}{n_i}\sum_k f_{ik}, 0\Big), \qquad
    \mathrm{out}_i = \sum_j \frac{h_{ij}^p}{\sum_k h_{ik}^p}\,v_j .$$

    Without ``reweight`` (LSSA) the weights are $f_{ij}/\sum_k f_{ik}$; with it (LSSAR) the keys above the row's mean
    share all of the weight, and with $p = 15$ a handful of keys matters among 4096 as among 64. Positions (RoPE) are
    applied before. The layouts and masks are those of :func:`jax.nn.dot_product_attention`.

    A row that sees nothing gives zeros and zero gradients. A row whose visible $f$ are all equal keeps plain softplus
    weights. A key or value that is not finite turns the rows that see it into NaN and no others.

    Args:
      query: ``[batch, queries, heads, width]`` or without the batch.
      key: ``[batch, keys, key_heads, width]``; ``heads`` is a multiple of ``key_heads`` (grouped queries).
      value: ``[batch, keys, key_heads, value_width]``.
      mask: booleans that broadcast to ``[batch, heads, queries, keys]``, True where a key is seen.
      is_causal: whether query i sees keys 0 to i only.
      query_seq_lengths: ``[batch]``; later queries are padding.
      key_value_seq_lengths: ``[batch]``; later keys are padding, whatever they hold. In decoding, the cache's length.
      local_window_size: (left, right), or one number for both: query i sees keys from i - left to i + right.
      segment_ids: integers ``[batch, length]``, or a pair for queries and keys: only equal ones see each other.
      power: the static number $p \ge 1$; 15 for contexts longer than in training, 3 the best at the training length.
      reweight: whether to re-weight at all; has no parameters, so a model may be trained without and run with it.
      offset_min_keys: rows that see fewer keys have $o_i = 0$, the others $o_i = 1$.
      qk_norm: whether queries and keys are normalized. Without, scores may be of any size.
      scale: a number instead of $\log d\log n_i$ (None or ``"length"``). There is no $1/\sqrt d$.
      bias: added to the scores, broadcasts like the mask; needs ``qk_norm=False``, since it takes the scores out of
        the range in which normalization keeps them.
      implementation: ``"xla"`` holds the score matrix; ``"xla_chunked"`` needs memory linear in the lengths, also
        backward; ``"pallas"`` is the same as kernels for a GPU or TPU, without ``mask`` and ``bias``, and
        ``"pallas_interpret"`` interprets these anywhere. None takes the first up to 1024 by 1024 scores, then the
        second. Forward-mode and second derivatives need ``"xla"``.
      return_residual: whether to return the row statistics, too, without gradients.
      block_size: rows and columns at a time, or one number for both; not for ``"xla"``.

    Returns:
      ``[batch, queries, heads, value_width]`` in the dtype of the query; sums are at least float32. With
      ``return_residual``, a pair of it and ``(r,)``, the row sums of f, or ``(m, rho)``, the means of f and the
      p-norms of h (0 where the row keeps plain weights), each ``[batch, queries, heads]``.

    Raises:
      ValueError: if shapes don't fit, ``power`` is below 1, the width is below 2 with the length scale, ``bias`` comes
        with ``qk_norm``, or the implementation is unknown, not available here, or doesn't know an argument.
      TypeError: if the mask is not boolean, or an argument has the wrong type.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.attention import softplus_attention
      >>> x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
      >>> out = softplus_attention(x, x, x, is_causal=True)
      >>> bool(jnp.allclose(out[:, 0], x[:, 0], atol=1e-6)), out.shape
      (True, (1, 5, 2, 8))

    References:
      *Softplus Attention with Re-weighting Boosts Length Extrapolation in Large Language Models*,
      https://arxiv.org/abs/2501.13428, version 5. Published code adds a small number to both denominators, which with
      $p = 15$ may be larger than they are; here rows are divided by their largest entry first and nothing is added.
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
        default_scale="length",
    )
    implementation = choose_implementation(implementation, extent, block_size)
    if implementation == "xla":
        out, statistics = dense_softplus(rows, extent, exponent, offset_min_keys, return_residual)
    else:
        kernels = implementation.startswith("pallas")
        sizes = PALLAS_BLOCKS if kernels and block_size is None else block_size
        plan = Plan(extent, exponent, offset_min_keys, *check_blocks(sizes, extent.num_queries, extent.num_keys))
        if kernels:
            out, statistics = pallas_softplus(rows, plan, interpret=implementation == "pallas_interpret")
        else:
            out, statistics = chunked_softplus(rows, plan)
    return finish(out, statistics, rows.broken, jnp.asarray(query), return_residual)


def finish(out: Array, statistics: tuple[Array, ...], broken: Array, query: Array, return_residual: bool) -> Any:
    """Marks the rows that saw a value which is not finite, and restores layout and dtype."""
    out = out + jnp.where(broken, jnp.nan, 0).astype(out.dtype)[..., None]
    out = ungroup(out, query).astype(query.dtype)
    return (out, tuple(ungroup(x, query) for x in statistics)) if return_residual else out


def check_softplus_arguments(power: Any, offset_min_keys: Any, reweight: Any, qk_norm: Any, bias: Any) -> float | None:
    """The power as a number, or None for no re-weighting.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if the power is traced.
    """
    if not is_concrete(power) or not is_concrete(offset_min_keys):
        raise TypeError("power and offset_min_keys must be known when the function is traced, got a tracer")
    check_range("power", power, 1.0, open_high=True)
    check_count("offset_min_keys", offset_min_keys, 0)
    for name, flag in (("reweight", reweight), ("qk_norm", qk_norm)):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(f"{name} must be True or False, got {flag!r}")
    if bias is not None and qk_norm:
        raise ValueError(
            "bias takes the scores out of the range of normalized queries and keys: pass qk_norm=False with it "
            "(and normalized queries and keys, if they are wanted)"
        )
    return float(power) if reweight else None


def check_implementation(implementation: Any, known: tuple[str, ...]) -> None:
    """Raises a ValueError that lists the known implementations."""
    if implementation is not None:
        check_choice("implementation", implementation, known)


def choose_implementation(implementation: str | None, extent: Extent, block_size: Any) -> str:
    """The implementation asked for, or the dense one unless the score matrix is large or blocks are named."""
    if implementation is None:
        large = extent.num_queries * extent.num_keys > DENSE_SCORES
        return "xla_chunked" if large or block_size is not None else "xla"
    if implementation == "xla" and block_size is not None:
        raise ValueError("block_size is not for implementation='xla', which holds the whole score matrix")
    return implementation


def check_blocks(block_size: Any, num_queries: int, num_keys: int) -> tuple[int, int]:
    """Rows and columns at a time, no more than there are."""
    sizes = BLOCKS if block_size is None else block_size
    sizes = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
    if len(sizes) != 2:
        raise ValueError(f"block_size must be one number or a pair (queries, keys), got {block_size!r}")
    for size in sizes:
        check_count("block_size", size)
    return min(int(sizes[0]), num_queries), min(int(sizes[1]), num_keys)
