"""Self-attention on the product of query and key weights: what a trained reparameterized attention is deployed as."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from poise.core.arguments import check_count
from poise.nets.quantizers import LSQQuantizer
from poise.quant.checks import check_bits
from poise.quant.qk_product import qk_product


class QKProductSelfAttention(nn.Module):
    r"""Self-attention whose scores come from one matrix for each head, with quantized activations.

    With $Q$ a quantizer of activations as in :class:`QKReparamSelfAttention`,

    $$x' = Q(x),\qquad t_{mh} = Q(M_hx'_m),\qquad A_{hnm} = Q\big(\mathrm{softmax}_m(d^{-1/2}x'_n\cdot t_{mh})\big).$$

    The matrices are the kernel of a dense layer ``product`` (width to heads times width), beside ``value`` and
    ``proj``. Weights are used as they are: quantize them by :func:`poise.quant.export`, and :func:`integer_apply` runs
    all three layers in integers. :func:`qk_product_params` makes the parameters from those of
    :class:`QKReparamSelfAttention`, whose ``"quant"`` collection fits as it stands.

    Attributes:
      num_heads: they divide the width.
      act_bits: from 2 to 8.
      dtype: of the computation; None for that of the input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import QKProductSelfAttention
      >>> attention, x = QKProductSelfAttention(2, act_bits=8), jnp.ones((3, 5, 4))
      >>> y, variables = jax.eval_shape(attention.init_with_output, jax.random.key(0), x)
      >>> y.shape, variables["params"]["product"]["kernel"].shape
      ((3, 5, 4), (4, 8))

    References:
      Liu, Liu and Cheng, *Oscillation-free Quantization for Low-bit Vision Transformers*,
      https://arxiv.org/abs/2302.02210
    """

    num_heads: int
    act_bits: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Attends.

        Args:
          x: tokens, of the same number as at ``init``.

        Returns:
          Tokens.

        Raises:
          ValueError: if the heads don't divide the width, or an attribute is out of range.
        """
        check_count("num_heads", self.num_heads)
        check_bits(self.act_bits, 2, name="act_bits")
        batch, tokens, width = x.shape
        if width % self.num_heads:
            raise ValueError(f"num_heads must divide the width {width} of x, got {self.num_heads}")
        dtype = x.dtype if self.dtype is None else jnp.dtype(self.dtype)

        def quantized(name: str, axis: tuple[int, ...], shift: int, value: Array, signed: bool = True) -> Array:
            module = LSQQuantizer(self.act_bits, signed, axis, shift=shift, collection="quant", name=name)
            return module(value)

        x = quantized("input_quantizer", (0, 2), 1, x.astype(dtype))
        keys = nn.Dense(self.num_heads * width, use_bias=False, dtype=dtype, name="product")(x)
        keys = quantized("product_quantizer", (0, 3), 2, keys.reshape(batch, tokens, self.num_heads, width))
        scores = jnp.einsum("bnc,bmhc->bhnm", x, keys) * (width // self.num_heads) ** -0.5
        attention = jax.nn.softmax(scores.astype(jnp.promote_types(dtype, jnp.float32))).astype(dtype)
        attention = quantized("softmax_quantizer", (0, 1, 3), 0, attention, signed=False)
        value = quantized("value_quantizer", (0, 1), 1, nn.Dense(width, dtype=dtype, name="value")(x))
        heads = value.reshape(batch, tokens, self.num_heads, -1)
        out = jnp.einsum("bhnm,bmhd->bnhd", attention, heads).reshape(batch, tokens, width)
        return nn.Dense(width, dtype=dtype, name="proj")(quantized("proj_quantizer", (0, 2), 1, out))


def qk_product_params(params: Mapping[str, Any], num_heads: int) -> PyTree:
    r"""The parameters of :class:`QKProductSelfAttention` from those of :class:`QKReparamSelfAttention`.

    Args:
      params: with ``query``, ``key``, ``value`` and ``proj``, each a mapping with a ``kernel``.
      num_heads: the number of heads.

    Returns:
      ``product``, ``value`` and ``proj``. Column $hC + c$ of the product's kernel is row $c$ of
      $M_h = W_{q,h}^\top W_{k,h}$, so a scale for each column is one for each row of $M_h$.

    Raises:
      ValueError: if the heads don't divide the width.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import qk_product_params
      >>> layer = {"kernel": jnp.eye(4)}
      >>> new = qk_product_params({"query": layer, "key": layer, "value": layer, "proj": layer}, num_heads=2)
      >>> sorted(new), new["product"]["kernel"].shape
      (['product', 'proj', 'value'], (4, 8))
    """
    kernel = qk_product(params["query"]["kernel"].T, params["key"]["kernel"].T, num_heads).T
    return {"product": {"kernel": kernel}, "value": dict(params["value"]), "proj": dict(params["proj"])}
