"""The product of query and key weights, head by head: what attention scores depend on."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_count


def qk_product(
    wq: Float[Array, "out width"], wk: Float[Array, "out width"], num_heads: int
) -> Float[Array, "heads_width width"]:
    r"""The matrices $M_h = W_{q,h}^\top W_{k,h}$ of all heads, one below the other.

    The scores of head $h$ are $x_n^\top M_hx_m$ for all inputs $x$, without biases. A change $W_{q,h}\to RW_{q,h}$,
    $W_{k,h}\to RW_{k,h}$ with an orthogonal $R$ leaves $M_h$ as it is, but not $W_q$ and $W_k$ quantized on their own.

    Args:
      wq: $W_q$ in the layout (out, in): rows $hd\dots(h+1)d-1$ make the queries of head $h$. Flax's kernels are (in,
        out): give their transpose.
      wk: $W_k$, likewise.
      num_heads: the number of heads, which divides the rows.

    Returns:
      Rows $hC\dots(h+1)C-1$ are $M_h$, $C$ being the width. These rows are what :func:`statsq` quantizes, ``axis=1``.

    Raises:
      ValueError: if the heads don't divide the rows.
      TypeError: if ``num_heads`` is no integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import qk_product
      >>> qk_product(jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.array([[1.0, 1.0], [3.0, 0.0]]), num_heads=2).tolist()
      [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [6.0, 0.0]]

    References:
      Liu, Liu and Cheng, *Oscillation-free Quantization for Low-bit Vision Transformers*,
      https://arxiv.org/abs/2302.02210
    """
    check_count("num_heads", num_heads)
    out, width = wq.shape
    if wk.shape != wq.shape:
        raise ValueError(f"wk must have the shape of wq, {wq.shape}, got {wk.shape}")
    if out % num_heads:
        raise ValueError(f"num_heads must divide the {out} rows of wq, got {num_heads}")
    heads = (num_heads, out // num_heads, width)
    return jnp.einsum("hdc,hde->hce", wq.reshape(heads), wk.reshape(heads)).reshape(num_heads * width, width)
