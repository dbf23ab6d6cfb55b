"""Encoder and decoder that the diffusion U-Nets share."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.nets.group_norm import GroupNorm
from poise.nets.resampling import ResampleConv
from poise.nets.unet_block import BlockStyle, UNetBlock


def check_images(
    x: Array, img_resolution: int, num_levels: int, in_channels: int | None = None, noise_labels: Array | None = None
) -> None:
    """Raises ValueError unless ``x`` is a batch of square images that can be halved ``num_levels - 1`` times."""
    if num_levels < 1:
        raise ValueError("channel_mult must have at least one entry, got none")
    if img_resolution < 1 or img_resolution % 2 ** (num_levels - 1):
        raise ValueError(
            f"img_resolution must be a multiple of {2 ** (num_levels - 1)} for {num_levels} entries of channel_mult, "
            f"got {img_resolution}"
        )
    if x.ndim != 4 or x.shape[1:3] != (img_resolution, img_resolution):
        raise ValueError(f"x must have shape [batch, {img_resolution}, {img_resolution}, channels], got {x.shape}")
    if in_channels is not None and x.shape[3] != in_channels:
        raise ValueError(f"x must have {in_channels} channels, got shape {x.shape}")
    if noise_labels is not None and (noise_labels.ndim != 1 or noise_labels.shape[0] not in (1, x.shape[0])):
        raise ValueError(f"noise_labels must have shape [1] or [{x.shape[0]}], got {noise_labels.shape}")


def check_feature_levels(feature_levels: Sequence[int], features_only: bool, num_levels: int) -> tuple[int, ...]:
    """Returns the distinct levels in ascending order, negative ones counted from the coarsest.

    Raises ValueError for a level outside the encoder.
    """
    if any(not -num_levels <= level < num_levels for level in feature_levels):
        raise ValueError(f"feature_levels must be in -{num_levels}, ..., {num_levels - 1}, got {tuple(feature_levels)}")
    levels = tuple(sorted({level % num_levels for level in feature_levels}))
    if features_only and not levels:
        raise ValueError("feature_levels must name at least one level when features_only is set, got ()")
    return levels


def check_augment_labels(augment_labels: Array | None, augment_dim: int) -> None:
    """Raises ValueError unless the augmentation labels are None or ``[batch, augment_dim]``."""
    if augment_labels is None:
        return
    if augment_dim == 0:
        raise ValueError(f"augment_labels must be None when augment_dim is 0, got shape {augment_labels.shape}")
    if augment_labels.ndim != 2 or augment_labels.shape[1] != augment_dim:
        raise ValueError(f"augment_labels must have shape [batch, {augment_dim}], got {augment_labels.shape}")


def check_rng(module: nn.Module, name: str, rate: float | int, train: bool) -> None:
    """Raises ValueError if training needs a random stream that ``apply`` wasn't given."""
    if train and rate > 0 and not module.has_rng(name):
        raise ValueError(f"rngs must hold {name!r} for training with {name}={rate}: apply(..., rngs={{{name!r}: key}})")


class UNetEncoder(nn.Module):
    """The contracting half: per level a convolution or halving block, then ``num_blocks`` blocks.

    The types ``residual`` and ``skip`` also carry a resampled copy of the input down the levels: ``residual`` filters
    it with a learned convolution and averages it into the trunk at every level, ``skip`` adds a 1x1 projection of it.

    Attributes:
      img_resolution: height and width of the images.
      stem_features: channels of the first convolution.
      features: channels of the blocks of each level, from full resolution down.
      num_blocks: blocks per level.
      attn_resolutions: resolutions whose blocks have attention.
      style: of all blocks.
      encoder_type: ``"standard"``, ``"residual"`` or ``"skip"``.
      remat: recompute the blocks' activations in the backward pass.
    """

    img_resolution: int
    stem_features: int
    features: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]
    style: BlockStyle
    encoder_type: str = "standard"
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], emb: Float[Array, "emb_batch emb_channels"], train: bool
    ) -> tuple[list[Array], list[Array]]:
        """Returns the outputs for the decoder's concatenations, and the last block's output of every level."""
        block = block_class(self.remat)
        resampling = {"down": True, "resample_filter": self.style.resample_filter, "layer_init": self.style.init}
        skips, level_outputs, aux = [], [], x
        for level, features in enumerate(self.features):
            res = self.img_resolution >> level
            name = f"{res}x{res}"
            if level == 0:
                x = ResampleConv(self.stem_features, 3, layer_init=self.style.init, name=f"{name}_conv")(x)
            else:
                x = block(x.shape[-1], self.style, down=True, name=f"{name}_down")(x, emb, train)
                if self.encoder_type == "residual":
                    aux = ResampleConv(x.shape[-1], 3, **resampling, fused=True, name=f"{name}_aux_residual")(aux)
                    x = aux = (x + aux) * 0.5**0.5
                elif self.encoder_type == "skip":
                    aux = ResampleConv(aux.shape[-1], 0, **resampling, name=f"{name}_aux_down")(aux)
                    x = x + ResampleConv(x.shape[-1], 1, layer_init=self.style.init, name=f"{name}_aux_skip")(aux)
            skips.append(x)
            for i in range(self.num_blocks):
                attention = res in self.attn_resolutions
                x = block(features, self.style, attention=attention, name=f"{name}_block{i}")(x, emb, train)
                skips.append(x)
            level_outputs.append(x)
        return skips, level_outputs


class UNetDecoder(nn.Module):
    """The expanding half: per level two middle blocks or a doubling block, then ``num_blocks + 1`` blocks.

    Each of these blocks gets the trunk concatenated with the latest unused output of the encoder. With an output head
    the decoder also makes the image: at full resolution (``standard``), or as a sum over all resolutions (``skip``).

    Attributes:
      img_resolution: height and width of the images.
      features: channels of the blocks of each level, from full resolution down.
      num_blocks: the encoder's blocks per level.
      attn_resolutions: resolutions with attention.
      style: of all blocks.
      attn_every_block: attention in all blocks of such a resolution, else in the last one.
      decoder_type: ``"standard"`` or ``"skip"``.
      out_channels: channels of the image; 0 returns the last block's output.
      remat: recompute the blocks' activations in the backward pass.
    """

    img_resolution: int
    features: Sequence[int]
    num_blocks: int
    attn_resolutions: Sequence[int]
    style: BlockStyle
    attn_every_block: bool = False
    decoder_type: str = "standard"
    out_channels: int = 0
    remat: bool = False

    @nn.compact
    def __call__(
        self, skips: Sequence[Array], emb: Float[Array, "emb_batch emb_channels"], train: bool
    ) -> Float[Array, "batch height width channels"]:
        """Consumes the encoder's outputs from the last to the first."""
        block = block_class(self.remat)
        skips, aux = list(skips), None
        x = skips[-1]
        for level in reversed(range(len(self.features))):
            features, res = self.features[level], self.img_resolution >> level
            name = f"{res}x{res}"
            if level == len(self.features) - 1:
                x = block(x.shape[-1], self.style, attention=True, name=f"{name}_in0")(x, emb, train)
                x = block(x.shape[-1], self.style, name=f"{name}_in1")(x, emb, train)
            else:
                x = block(x.shape[-1], self.style, up=True, name=f"{name}_up")(x, emb, train)
            for i in range(self.num_blocks + 1):
                attention = res in self.attn_resolutions and (self.attn_every_block or i == self.num_blocks)
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(features, self.style, attention=attention, name=f"{name}_block{i}")(x, emb, train)
            if self.out_channels and (self.decoder_type == "skip" or level == 0):
                h = nn.silu(GroupNorm(self.style.eps, name=f"{name}_aux_norm")(x))
                h = ResampleConv(self.out_channels, 3, layer_init=self.style.init_zero, name=f"{name}_aux_conv")(h)
                if aux is not None:
                    taps = self.style.resample_filter
                    up = ResampleConv(self.out_channels, 0, up=True, resample_filter=taps, name=f"{name}_aux_up")
                    h = h + up(aux)
                aux = h
        return x if aux is None else aux


def block_class(remat: bool) -> Any:
    """The residual block's class, or the one that recomputes its activations in the backward pass."""
    return nn.remat(UNetBlock, static_argnums=(3,)) if remat else UNetBlock
