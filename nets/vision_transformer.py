"""A vision transformer in the sizes of DeiT, with class and distillation tokens; its attention is an argument."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.attention import dot_product_attention
from poise.core.arguments import check_choice, check_count

VISION_TRANSFORMER_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"width": 192, "num_heads": 3, "num_layers": 12},
    "small": {"width": 384, "num_heads": 6, "num_layers": 12},
    "base": {"width": 768, "num_heads": 12, "num_layers": 12},
}
"""The sizes of DeiT: attributes of :class:`VisionTransformer` by name."""


class SelfAttention(nn.Module):
    """Multi-head attention of tokens to each other, in full precision.

    Attributes:
      num_heads: they divide the width.
      dtype: of the computation; None for that of the input and the parameters.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import SelfAttention
      >>> attention, x = SelfAttention(num_heads=2), jnp.ones((3, 5, 4))
      >>> y, variables = jax.eval_shape(attention.init_with_output, jax.random.key(0), x)
      >>> y.shape, sorted(variables["params"])
      ((3, 5, 4), ['key', 'proj', 'query', 'value'])
    """

    num_heads: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Attends.

        Args:
          x: tokens.

        Returns:
          Tokens.

        Raises:
          ValueError: if the heads don't divide the width.
        """
        check_count("num_heads", self.num_heads)
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"num_heads must divide the width {width} of x, got {self.num_heads}")

        def heads(name: str) -> Array:
            return nn.Dense(width, dtype=self.dtype, name=name)(x).reshape(*x.shape[:2], self.num_heads, -1)

        out = dot_product_attention(heads("query"), heads("key"), heads("value"))
        return nn.Dense(width, dtype=self.dtype, name="proj")(out.reshape(*x.shape[:2], width))


class TransformerBlock(nn.Module):
    r"""Attention and a perceptron with GELU, each after a layer normalization and added to its input.

    Attributes:
      num_heads: handed to ``attention``.
      hidden: width of the perceptron's hidden layer ``fc1``; ``fc2`` comes after it.
      attention: makes the attention from ``num_heads`` and ``name``.
      dtype: of the computation.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import TransformerBlock
      >>> block, x = TransformerBlock(num_heads=2, hidden=8), jnp.ones((3, 5, 4))
      >>> y, variables = jax.eval_shape(block.init_with_output, jax.random.key(0), x)
      >>> sorted(variables["params"])
      ['attention', 'fc1', 'fc2', 'norm1', 'norm2']
    """

    num_heads: int
    hidden: int
    attention: Callable[..., nn.Module] = SelfAttention
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """Computes the next tokens.

        Args:
          x: tokens.

        Returns:
          Tokens.
        """
        attention: Any = self.attention(num_heads=self.num_heads, dtype=self.dtype, name="attention")
        x = x + attention(nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x))
        h = nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(
            nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        )
        return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(jax.nn.gelu(h, approximate=False))


class VisionTransformer(nn.Module):
    r"""DeiT: patches, a class and a distillation token, learned positions, blocks, and one linear head for each token.

    Parameters are called ``patch_embed``, ``cls_token``, ``dist_token``, ``pos_embed``, ``block_0/norm1``,
    ``block_0/attention/{query,key,value,proj}``, ``block_0/norm2``, ``block_0/fc1``, ``block_0/fc2``, ..., ``norm``,
    ``head`` and ``head_dist``, which is what a :class:`poise.quant.QuantRule` matches.

    Attributes:
      num_classes: logits per head.
      patch_size: side of a square patch, which divides the image's sides.
      width: of a token.
      num_heads: they divide the width.
      num_layers: blocks.
      mlp_ratio: the hidden width of a perceptron over the width.
      distilled: whether there are a distillation token and its head.
      attention: makes the attention of a block from ``num_heads``, ``dtype`` and ``name``: :class:`SelfAttention`, or
        ``functools.partial(QKReparamSelfAttention, weight_bits=2, act_bits=2)``.
      dtype: of the computation; None for that of the images and the parameters.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> from poise.nets import QKReparamSelfAttention, VisionTransformer
      >>> attention = functools.partial(QKReparamSelfAttention, weight_bits=2, act_bits=2)
      >>> model = VisionTransformer(10, patch_size=4, width=8, num_heads=2, num_layers=1, attention=attention)
      >>> logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.ones((2, 8, 8, 1)))
      >>> logits.shape, variables["params"]["pos_embed"].shape
      ((2, 10), (1, 6, 8))

    References:
      Dosovitskiy et al., *An Image is Worth 16x16 Words*, https://arxiv.org/abs/2010.11929; Touvron et al., *Training
      Data-efficient Image Transformers & Distillation Through Attention*, https://arxiv.org/abs/2012.12877
    """

    num_classes: int
    patch_size: int = 16
    width: int = 192
    num_heads: int = 3
    num_layers: int = 12
    mlp_ratio: int = 4
    distilled: bool = True
    attention: Callable[..., nn.Module] = SelfAttention
    dtype: Any = None

    @nn.compact
    def __call__(self, images: Float[Array, "batch height image_width channels"], *, train: bool = False) -> Any:
        """Computes the logits.

        Args:
          images: of the same size as at ``init``.
          train: whether the logits of both heads are wanted apart.

        Returns:
          Logits ``[batch, num_classes]``: of the class token, or if distilled the mean of both tokens'. With ``train``
          and distilled, the pair of the class head's and the distillation head's.

        Raises:
          ValueError: if a size is below 1, the patches don't tile the images or the heads don't divide the width.
          TypeError: if a size is no integer.
        """
        for name in ("num_classes", "patch_size", "width", "num_heads", "num_layers", "mlp_ratio"):
            check_count(name, getattr(self, name))
        side = self.patch_size
        if images.shape[1] % side or images.shape[2] % side:
            raise ValueError(f"patch_size must divide the sides {images.shape[1:3]} of the images, got {side}")
        x = nn.Conv(self.width, (side, side), (side, side), "VALID", dtype=self.dtype, name="patch_embed")(images)
        x = x.reshape(x.shape[0], -1, self.width)
        names = ("cls_token", "dist_token") if self.distilled else ("cls_token",)
        init = nn.initializers.truncated_normal(0.02)
        tokens = [self.param(name, init, (1, 1, self.width)).astype(x.dtype) for name in names]
        x = jnp.concatenate([*(jnp.broadcast_to(t, (x.shape[0], 1, self.width)) for t in tokens), x], axis=1)
        x = x + self.param("pos_embed", init, (1, *x.shape[1:])).astype(x.dtype)
        for layer in range(self.num_layers):
            block = TransformerBlock(
                self.num_heads, self.mlp_ratio * self.width, self.attention, self.dtype, name=f"block_{layer}"
            )
            x = block(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        logits = nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x[:, 0])
        if not self.distilled:
            return logits
        distilled = nn.Dense(self.num_classes, dtype=self.dtype, name="head_dist")(x[:, 1])
        return (logits, distilled) if train else (logits + distilled) / 2


def vision_transformer(size: str, num_classes: int, **options: Any) -> VisionTransformer:
    """A :class:`VisionTransformer` of a published size.

    Args:
      size: ``"tiny"``, ``"small"`` or ``"base"``: widths of 192, 384 and 768, 12 layers, heads of 64.
      num_classes: logits per head.
      **options: other attributes, or some in place of the size's.

    Returns:
      The module.

    Raises:
      ValueError: if there is no such size.

    Example:
      >>> from poise.nets import vision_transformer
      >>> vision_transformer("small", 1000).num_heads, vision_transformer("tiny", 10, num_layers=2).width
      (6, 192)
    """
    check_choice("size", size, VISION_TRANSFORMER_SIZES)
    return VisionTransformer(num_classes, **{**VISION_TRANSFORMER_SIZES[size], **options})
