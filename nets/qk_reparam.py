"""Self-attention with quantized weights and activations, whose query and key weights are quantized as a product."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_count, check_range
from poise.nets.quantizers import LSQQuantizer
from poise.quant.checks import check_bits
from poise.quant.qk_product import qk_product
from poise.quant.rounding import grad_scale
from poise.quant.statsq import high_confidence_mask, statsq


class _Weights(nn.Module):
    """The parameters of a dense layer, under the names that ``nn.Dense`` gives them."""

    features: int
    use_bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array | None]:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (width, self.features), self.param_dtype)
        if not self.use_bias:
            return kernel, None
        return kernel, self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)


class QKReparamSelfAttention(nn.Module):
    r"""Self-attention of the oscillation-free method: StatsQ of $W_{q,h}^\top W_{k,h}$, not of $W_q$ and $W_k$.

    With $Q$ an LSQ quantizer of activations with a learned shift before and after it,

    $$x' = Q(x),\qquad t_{mh} = Q\big(\widehat M_hx'_m\big),\qquad
    A_{hnm} = \mathrm{lsq}\Big(\mathrm{softmax}_m\big(d^{-1/2}\,x'_n\cdot t_{mh}\big)\Big),$$

    $\widehat M$ the rows of :func:`poise.quant.qk_product` quantized by :func:`poise.quant.statsq`. Values are
    $Q(\widehat W_vx' + b_v)$, the output $\widehat W_oQ(\cdot) + b_o$. Query and key have no bias. The steps of
    activations are one per token position (for $t$ one per position and head, for values one per channel), so the
    number of tokens is fixed. Shifts and steps live in the collection ``"quant"`` and the steps start from the batch
    that ``init`` is called with.

    A change of the queries' and keys' basis in a head does not change the output, up to rounding, while two
    quantizers of $W_q$ and $W_k$ on their own see other numbers. For inference, $HC^2$ quantized weights take the place
    of $2C^2$.

    The weights have the names and shapes of ``query``, ``key``, ``value`` and ``proj`` in :class:`SelfAttention`, so
    that trained ones fit after dropping the biases of query and key. They are quantized here: let no
    :class:`poise.quant.QuantRule` do it again.

    Attributes:
      num_heads: they divide the width.
      weight_bits: from 1 to 8.
      act_bits: from 2 to 8.
      freeze_product: whether the confidence mask of the product, if there is a ``boundary_range``, stops the gradient
        of its frozen entries: frozen entries pass no gradient; they still move with their factors, which the gradients
        of other entries, momentum and weight decay change. False is what the released code does in effect.
      boundary_range: of :func:`poise.quant.high_confidence_mask`, for confidence-guided annealing; None before that.
      dtype: of the computation; None for that of the input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import QKReparamSelfAttention
      >>> attention, x = QKReparamSelfAttention(2, weight_bits=2, act_bits=2), jnp.ones((3, 5, 4))
      >>> y, variables = jax.eval_shape(attention.init_with_output, jax.random.key(0), x)
      >>> y.shape, variables["quant"]["product_quantizer"]["step"].shape
      ((3, 5, 4), (1, 5, 2, 1))

    References:
      Liu, Liu and Cheng, *Oscillation-free Quantization for Low-bit Vision Transformers*,
      https://arxiv.org/abs/2302.02210. The released code computes the mask of the product during annealing, but a
      straight-through estimator around it undoes it; ``freeze_product=False`` gives that.
    """

    num_heads: int
    weight_bits: int
    act_bits: int
    freeze_product: bool = True
    boundary_range: float | int | None = None
    dtype: Any = None

    def _check(self, width: int) -> None:
        check_count("num_heads", self.num_heads)
        check_bits(self.weight_bits, name="weight_bits")
        check_bits(self.act_bits, 2, name="act_bits")
        check_range("boundary_range", self.boundary_range, 0.0, 0.5)
        if width % self.num_heads:
            raise ValueError(f"num_heads must divide the width {width} of x, got {self.num_heads}")

    def _quantizer(self, name: str, axis: tuple[int, ...], shift: int) -> LSQQuantizer:
        return LSQQuantizer(self.act_bits, axis=axis, shift=shift, collection="quant", name=name)

    def _product(self, query: Array, key: Array) -> Array:
        """The quantized product, ``[heads, width, width]``."""
        product = qk_product(query.T, key.T, self.num_heads)
        quantized = statsq(product, bits=self.weight_bits, axis=1)
        if self.boundary_range is not None and self.freeze_product:
            frozen = high_confidence_mask(product, bits=self.weight_bits, boundary_range=self.boundary_range, axis=1)
            quantized = grad_scale(quantized, jnp.where(frozen, 0.0, 1.0))
        return quantized.reshape(self.num_heads, -1, query.shape[0])

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
        batch, tokens, width = x.shape
        self._check(width)
        dtype = x.dtype if self.dtype is None else jnp.dtype(self.dtype)
        param_dtype = jnp.promote_types(dtype, jnp.float32)

        def weights(name: str, use_bias: bool) -> tuple[Array, Array | None]:
            return _Weights(width, use_bias, param_dtype, name=name)(width)

        def dense(name: str, inputs: Array) -> Array:
            kernel, bias = weights(name, True)
            return inputs @ statsq(kernel, bits=self.weight_bits, axis=0).astype(dtype) + jnp.asarray(bias, dtype)

        product = self._product(weights("query", False)[0], weights("key", False)[0]).astype(dtype)
        x = self._quantizer("input_quantizer", (0, 2), 1)(x.astype(dtype))
        keys = jnp.einsum("hce,bme->bmhc", product, x)
        keys = self._quantizer("product_quantizer", (0, 3), 2)(keys)
        scores = jnp.einsum("bnc,bmhc->bhnm", x, keys) * (width // self.num_heads) ** -0.5
        attention = jax.nn.softmax(scores.astype(param_dtype)).astype(dtype)
        attention = LSQQuantizer(
            self.act_bits, signed=False, axis=(0, 1, 3), collection="quant", name="softmax_quantizer"
        )(attention)
        value = self._quantizer("value_quantizer", (0, 1), 1)(dense("value", x))
        heads = value.reshape(batch, tokens, self.num_heads, -1)
        out = jnp.einsum("bhnm,bmhd->bnhd", attention, heads).reshape(batch, tokens, width)
        return dense("proj", self._quantizer("proj_quantizer", (0, 2), 1)(out))
