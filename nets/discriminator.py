"""Discriminator heads on the features of a diffusion network."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from poise.nets.group_norm import GroupNorm
from poise.nets.initializers import LayerInit

_INIT = LayerInit("kaiming_uniform", gain=3**-0.5, bias_gain=3**-0.5)


def head_group_count(num_channels: int) -> int:
    r"""The number of groups in a discriminator head's normalizations.

    $\max(1, \lfloor C/4\rfloor)$ up to 32 channels, above that the largest divisor of $C$ that is at most 32.

    Args:
      num_channels: $C$, positive.

    Returns:
      The number of contiguous channel groups.

    Raises:
      ValueError: if $C$ isn't positive, or isn't divisible by the result.

    Example:
      >>> from poise.nets import head_group_count
      >>> [head_group_count(c) for c in (3, 12, 48, 96, 768)]
      [1, 3, 24, 32, 32]
    """
    if num_channels < 1:
        raise ValueError(f"num_channels must be positive, got {num_channels}")
    if num_channels > 32:
        return max(groups for groups in range(1, 33) if num_channels % groups == 0)
    groups = max(1, num_channels // 4)
    if num_channels % groups:
        raise ValueError(f"num_channels must be divisible by num_channels // 4 = {groups}, got {num_channels}")
    return groups


class DiscriminatorHead(nn.Module):
    r"""One convolutional head per feature map, each with one logit.

    A head halves its map with 4x4 convolutions of stride 2 until it is at most 4x4 (32x32 takes three of them, 8x8
    one), covers what is left with one convolution of just that size, and maps it to the logit with a 1x1 convolution.
    All but the last are followed by group normalization and SiLU. Every head is as wide as its feature map. Names
    within ``head{k}``: ``conv0, norm0, conv1, norm1, ..., out``.

    The optimal logit against equal numbers of both kinds is the log density ratio $\log p - \log q$.

    Attributes:
      dtype: of the activations; None keeps that of the features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import DiscriminatorHead
      >>> features = [jnp.ones((2, 16, 16, 8)), jnp.ones((2, 8, 8, 16))]
      >>> logits, variables = jax.eval_shape(DiscriminatorHead().init_with_output, jax.random.key(0), features)
      >>> logits.shape, sorted(variables["params"]["head1"])
      ((2, 2), ['conv0', 'conv1', 'norm0', 'norm1', 'out'])

    References:
      Yin et al., *Improved Distribution Matching Distillation for Fast Image Synthesis*,
      https://arxiv.org/abs/2405.14867; Xu et al., *One-step Diffusion Models with f-Divergence Distribution Matching*,
      https://arxiv.org/abs/2502.15681. The layout is that of the latter's code (NVlabs/FastGen), which is defined for
      maps of 8x8 and larger.
    """

    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        features: Sequence[Float[Array, "batch _ _ _"]],
        sigma: Float[Array, "..."] | None = None,
        class_labels: Shaped[Array, "..."] | None = None,
    ) -> Float[Array, "batch heads"]:
        """Judges feature maps.

        Args:
          features: $K$ maps ``[B, h, w, C]``, square, of any sizes and widths.
          sigma: ignored; here so that this head and :class:`RatioHead` are called alike.
          class_labels: ignored likewise.

        Returns:
          Logits ``[B, K]``, in at least float32.

        Raises:
          ValueError: if there are no features, or for one that isn't square or whose width can't be grouped.
        """
        del sigma, class_labels
        if not features:
            raise ValueError("features must hold at least one map, got none")
        logits = [
            _Head(name=f"head{k}")(x if self.dtype is None else x.astype(self.dtype)) for k, x in enumerate(features)
        ]
        return jnp.concatenate(logits, axis=-1)


class _Head(nn.Module):
    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch 1"]:
        _, height, width, channels = x.shape
        if height != width:
            raise ValueError(f"features must be square maps, got shape {x.shape}")
        groups = head_group_count(channels)
        layer = 0
        while x.shape[1] > 1 or layer == 0:
            halve = x.shape[1] > 4
            size, stride, padding = (4, 2, 1) if halve else (x.shape[1], 1, 0)
            x = nn.Conv(
                channels,
                (size, size),
                stride,
                [(padding, padding)] * 2,
                dtype=x.dtype,
                kernel_init=_INIT.kernel(),
                bias_init=_INIT.bias(channels * size**2, channels * size**2),
                name=f"conv{layer}",
            )(x)
            x = nn.silu(GroupNorm(1e-5, groups, name=f"norm{layer}")(x))
            layer += 1
        out = nn.Conv(
            1, (1, 1), dtype=x.dtype, kernel_init=_INIT.kernel(), bias_init=_INIT.bias(channels, 1), name="out"
        )(x)
        return out.reshape(-1, 1).astype(jnp.promote_types(x.dtype, jnp.float32))
