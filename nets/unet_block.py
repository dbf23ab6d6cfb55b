"""The residual block of the diffusion U-Nets, with attention among pixels."""

import dataclasses
import warnings
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.nets.group_norm import GroupNorm
from poise.nets.initializers import LayerInit
from poise.nets.resampling import ResampleConv

_XAVIER = LayerInit()
_ZERO = LayerInit(gain=0)


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """What all blocks of one U-Net have in common.

    Attributes:
      dropout: probability of zeroing an activation in front of the second convolution, in training.
      skip_scale: factor of every residual sum.
      eps: of the group normalizations.
      adaptive_scale: the noise embedding scales and shifts after the second normalization, else it is added before it.
      resample_proj: blocks that change the resolution have a learned 1x1 convolution on their shortcut.
      resample_filter: taps of the resampling filter.
      channels_per_head: width of an attention head; None for a single head.
      init: of convolutions and dense layers.
      init_zero: of the last convolution of each residual branch.
      init_attention: of the queries, keys and values.
    """

    dropout: float | int = 0
    skip_scale: float | int = 1
    eps: float = 1e-5
    adaptive_scale: bool = True
    resample_proj: bool = False
    resample_filter: Sequence[float | int] = (1, 1)
    channels_per_head: int | None = 64
    init: LayerInit = _XAVIER
    init_zero: LayerInit = _ZERO
    init_attention: LayerInit = _XAVIER

    def __post_init__(self):
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.channels_per_head is not None and self.channels_per_head < 1:
            raise ValueError(f"channels_per_head must be positive or None, got {self.channels_per_head}")

    def num_heads(self, channels: int) -> int:
        """Attention heads for a width; 0, with a warning, if a head is wider than the block.

        The official ADM drops attention there without a word. The parameter layout is the same here.
        """
        if self.channels_per_head is None:
            return 1
        if channels < self.channels_per_head:
            warnings.warn(
                f"no attention in a block of {channels} channels: channels_per_head={self.channels_per_head} is more",
                stacklevel=2,
            )
            return 0
        if channels % self.channels_per_head:
            raise ValueError(f"channels_per_head={self.channels_per_head} must divide the block's {channels} channels")
        return channels // self.channels_per_head


_STYLE = BlockStyle()


def pixel_attention(
    qkv: Float[Array, "batch height width qkv_channels"], num_heads: int
) -> Float[Array, "batch height width channels"]:
    r"""Multi-head attention of every pixel to every pixel: $a = \operatorname{softmax}(q k^\top/\sqrt{c_h})\,v$.

    Args:
      qkv: queries, keys and values ``[B, H, W, 3C]`` in the channel order ``(head, c, j)`` with ``j`` fastest: 0 query,
        1 key, 2 value.
      num_heads: the number of heads of $c_h$ channels each.

    Returns:
      ``[B, H, W, C]`` in the channel order ``(head, c)`` and the dtype of ``qkv``; logits and softmax are in at least
      float32.

    Raises:
      ValueError: if the channels aren't a multiple of ``3 * num_heads``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import pixel_attention
      >>> qkv = jnp.zeros((1, 2, 2, 3)).at[..., 2].set(jnp.array([[1.0, 2.0], [3.0, 6.0]]))
      >>> pixel_attention(qkv, 1).ravel().tolist()
      [3.0, 3.0, 3.0, 3.0]
    """
    batch, height, width, channels = qkv.shape
    if num_heads < 1 or channels % (3 * num_heads):
        raise ValueError(f"the channels of qkv must be a multiple of 3 * num_heads={3 * num_heads}, got {channels}")
    q, k, v = jnp.unstack(qkv.reshape(batch, height * width, num_heads, -1, 3), axis=-1)
    out = jax.nn.dot_product_attention(q, k, v)
    return out.reshape(batch, height, width, channels // 3)


class UNetBlock(nn.Module):
    r"""Two normalized, activated convolutions around a shortcut, conditioned on the noise embedding; then attention.

    With $s$ = ``skip_scale`` and $p$ = ``affine(emb)``:

    1. $h = \text{conv}_0(\text{silu}(\text{norm}_0(x)))$, which also resamples;
    2. $h = \text{silu}(\text{norm}_1(h + p))$, or $\text{silu}((1+p_1)\,\text{norm}_1(h) + p_2)$ with
       ``adaptive_scale`` ($p_1$ the first half of the channels of $p$);
    3. $x = s\,(\text{conv}_1(\text{dropout}(h)) + \text{skip}(x))$;
    4. with attention, $x = s\,(\text{proj}(\text{attention}(\text{qkv}(\text{norm}_2(x)))) + x)$.

    ``emb`` comes activated. ``skip`` is the identity unless the width or the resolution changes.

    Attributes:
      features: channels of the result.
      style: what the block shares with the others of its network.
      up: double the resolution.
      down: halve the resolution.
      attention: whether step 4 exists.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import BlockStyle, UNetBlock
      >>> block = UNetBlock(16, BlockStyle(channels_per_head=8), down=True, attention=True)
      >>> x, emb = jnp.ones((2, 8, 8, 12)), jnp.ones((2, 32))
      >>> jax.eval_shape(block.init_with_output, jax.random.key(0), x, emb)[0].shape
      (2, 4, 4, 16)

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364; Dhariwal and Nichol, *Diffusion Models Beat GANs on Image Synthesis*,
      https://arxiv.org/abs/2105.05233
    """

    features: int
    style: BlockStyle = _STYLE
    up: bool = False
    down: bool = False
    attention: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        emb: Float[Array, "emb_batch emb_channels"],
        train: bool = False,
    ) -> Float[Array, "batch new_height new_width features"]:
        """Applies the block in the dtype of ``x``.

        Args:
          x: images ``[B, H, W, C]``.
          emb: the activated noise embedding ``[B, E]``, or ``[1, E]`` for all images.
          train: whether dropout acts; it needs the rng ``dropout``.

        Returns:
          Images ``[B, H', W', features]``.
        """
        style = self.style
        resampling = {"up": self.up, "down": self.down, "resample_filter": style.resample_filter}
        h = nn.silu(GroupNorm(style.eps, name="norm0")(x))
        h = ResampleConv(self.features, 3, **resampling, layer_init=style.init, name="conv0")(h)
        affine_features = self.features * (2 if style.adaptive_scale else 1)
        p = nn.Dense(
            affine_features,
            dtype=emb.dtype,
            kernel_init=style.init.kernel(),
            bias_init=style.init.bias(emb.shape[-1], affine_features),
            name="affine",
        )(emb)
        p = p.astype(h.dtype)[:, None, None, :]
        norm1 = GroupNorm(style.eps, name="norm1")
        if style.adaptive_scale:
            scale, shift = jnp.split(p, 2, axis=-1)
            h = nn.silu(norm1(h) * (1 + scale) + shift)
        else:
            h = nn.silu(norm1(h + p))
        h = nn.Dropout(style.dropout, deterministic=not train)(h)
        h = ResampleConv(self.features, 3, layer_init=style.init_zero, name="conv1")(h)
        new_width = x.shape[-1] != self.features
        if new_width or self.up or self.down:
            kernel_size = 1 if new_width or style.resample_proj else 0
            x = ResampleConv(self.features, kernel_size, **resampling, layer_init=style.init, name="skip")(x)
        x = (h + x) * style.skip_scale
        num_heads = style.num_heads(self.features) if self.attention else 0
        if num_heads:
            h = GroupNorm(style.eps, name="norm2")(x)
            h = ResampleConv(3 * self.features, 1, layer_init=style.init_attention, name="qkv")(h)
            h = pixel_attention(h, num_heads)
            h = ResampleConv(self.features, 1, layer_init=style.init_zero, name="proj")(h)
            x = (h + x) * style.skip_scale
        return x
