"""The U-Nets DDPM++ and NCSN++."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from poise.nets.embeddings import FourierEmbedding, PositionalEmbedding
from poise.nets.initializers import LayerInit
from poise.nets.labels import label_vectors
from poise.nets.unet_block import BlockStyle
from poise.nets.unet_trunk import (
    UNetDecoder,
    UNetEncoder,
    check_augment_labels,
    check_feature_levels,
    check_images,
    check_rng,
)

_TYPES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "residual", "skip"),
    "decoder_type": ("standard", "skip"),
}


class SongUNet(nn.Module):
    r"""The U-Net of Song et al. as EDM trains it: DDPM++ by default, NCSN++ with :func:`poise.nets.ncsnpp`'s settings.

    The noise embedding is $e = [\sin, \cos]$ of the noise label, plus the label term
    $W(\sqrt{\text{label\_dim}}\; y) + b$ and the augmentation term, then two dense layers with SiLU. Every residual
    sum is scaled by $\sqrt{1/2}$. Parameters carry the official names: ``enc/32x32_block0/conv0/kernel``.

    Attributes:
      img_resolution: height and width $R$ of the images, divisible by $2^{L-1}$ for $L$ levels.
      out_channels: channels of the result.
      label_dim: number of classes; 0 for an unconditional network.
      augment_dim: size of the augmentation labels; 0 for none.
      model_channels: base width; even.
      channel_mult: the width of each level in units of ``model_channels``.
      channel_mult_emb: the width of the embedding in the same unit.
      num_blocks: residual blocks per level of the encoder; the decoder has one more.
      attn_resolutions: resolutions with self-attention.
      dropout: probability of zeroing an activation in training; needs the rng ``dropout``.
      label_dropout: probability of zeroing a label vector in training; needs the rng ``label_dropout``.
      embedding_type: ``"positional"`` or ``"fourier"``.
      channel_mult_noise: the width of the noise features in units of ``model_channels``.
      encoder_type: ``"standard"``, ``"residual"`` or ``"skip"``.
      decoder_type: ``"standard"`` or ``"skip"``.
      resample_filter: taps of the resampling filter.
      dtype: of the activations; None keeps that of the input. The embedding path stays in at least float32.
      remat: recompute the blocks' activations in the backward pass.
      in_channels: channels of the images; None takes those of the input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import SongUNet
      >>> net = SongUNet(8, 1, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
      >>> x, noise_labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2)
      >>> y, variables = jax.eval_shape(net.init_with_output, jax.random.key(0), x, noise_labels)
      >>> y.shape, variables["params"]["enc"]["4x4_down"]["conv0"]["kernel"].shape
      ((2, 8, 8, 1), (3, 3, 8, 8))

    References:
      Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*,
      https://arxiv.org/abs/2011.13456; Karras et al., *Elucidating the Design Space of Diffusion-Based Generative
      Models*, https://arxiv.org/abs/2206.00364, whose official code is followed.
    """

    img_resolution: int
    out_channels: int
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: Sequence[int] = (1, 2, 2, 2)
    channel_mult_emb: int = 4
    num_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float | int = 0.1
    label_dropout: float | int = 0
    embedding_type: str = "positional"
    channel_mult_noise: int = 1
    encoder_type: str = "standard"
    decoder_type: str = "standard"
    resample_filter: Sequence[float | int] = (1, 1)
    dtype: Any = None
    remat: bool = False
    in_channels: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        noise_labels: Float[Array, " noise_batch"],
        class_labels: Shaped[Array, "..."] | None = None,
        augment_labels: Float[Array, "..."] | None = None,
        *,
        train: bool = False,
        feature_levels: Sequence[int] = (),
        features_only: bool = False,
    ) -> Any:
        """Applies the network.

        Args:
          x: images ``[B, R, R, C]``.
          noise_labels: ``[B]``, or ``[1]`` for all images.
          class_labels: indices ``[B]`` or label vectors ``[B, label_dim]``; None is a zero vector.
          augment_labels: ``[B, augment_dim]``; None is a zero vector.
          train: whether dropout and label dropout act.
          feature_levels: levels of the encoder (0 is full resolution, -1 the coarsest) whose last block's output is
            wanted.
          features_only: whether to leave out the decoder.

        Returns:
          The output ``[B, R, R, out_channels]``, or ``(output, features)`` if levels are named, or the features alone
          with ``features_only``. Features are a list of ``[B, R/2^level, R/2^level, C_level]`` in
          ascending order of level.

        Raises:
          TypeError: for labels of a wrong type.
          ValueError: for settings or shapes that don't fit, or if training lacks an rng.
        """
        for name, allowed in _TYPES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        check_images(x, self.img_resolution, len(self.channel_mult), self.in_channels, noise_labels)
        levels = check_feature_levels(feature_levels, features_only, len(self.channel_mult))
        check_augment_labels(augment_labels, self.augment_dim)
        check_rng(self, "dropout", self.dropout, train)
        if self.num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {self.num_blocks}")
        noise_channels = self.model_channels * self.channel_mult_noise
        if self.model_channels < 2 or self.model_channels % 2:
            raise ValueError(f"model_channels must be even and positive, got {self.model_channels}")

        init = LayerInit("xavier_uniform")
        style = BlockStyle(
            dropout=self.dropout,
            skip_scale=0.5**0.5,
            eps=1e-6,
            adaptive_scale=False,
            resample_proj=True,
            resample_filter=tuple(self.resample_filter),
            channels_per_head=None,
            init=init,
            init_zero=LayerInit("xavier_uniform", gain=1e-5),
            init_attention=LayerInit("xavier_uniform", gain=0.2**0.5),
        )

        if self.embedding_type == "positional":
            emb = PositionalEmbedding(noise_channels, endpoint=True, name="map_noise")(noise_labels)
        else:
            emb = FourierEmbedding(noise_channels, name="map_noise")(noise_labels)
        emb = jnp.concatenate(jnp.split(emb, 2, axis=-1)[::-1], axis=-1)
        labels = label_vectors(class_labels, self.label_dim, emb.dtype)
        if labels is not None:
            if train and self.label_dropout:
                check_rng(self, "label_dropout", self.label_dropout, train)
                shape = (x.shape[0], 1)
                keep = jax.random.bernoulli(self.make_rng("label_dropout"), 1 - self.label_dropout, shape)
                labels = labels * keep
            dense = nn.Dense(noise_channels, dtype=emb.dtype, kernel_init=init.kernel(), name="map_label")
            emb = emb + dense(labels * self.label_dim**0.5)
        if self.augment_dim:
            if augment_labels is None:
                augment_labels = jnp.zeros((1, self.augment_dim), emb.dtype)
            dense = nn.Dense(
                noise_channels, use_bias=False, dtype=emb.dtype, kernel_init=init.kernel(), name="map_augment"
            )
            emb = emb + dense(augment_labels.astype(emb.dtype))
        emb_channels = self.model_channels * self.channel_mult_emb
        for name in ("map_layer0", "map_layer1"):
            dense = nn.Dense(emb_channels, dtype=emb.dtype, kernel_init=init.kernel(), name=name)
            emb = nn.silu(dense(emb))
        self.sow("intermediates", "emb", emb)

        features = tuple(self.model_channels * mult for mult in self.channel_mult)
        trunk = (features, self.num_blocks, tuple(self.attn_resolutions), style)
        encoder = UNetEncoder(
            self.img_resolution, self.model_channels, *trunk, self.encoder_type, remat=self.remat, name="enc"
        )
        skips, level_outputs = encoder(x if self.dtype is None else x.astype(self.dtype), emb, train)
        taps = [level_outputs[level] for level in levels]
        if features_only:
            return taps
        decoder = UNetDecoder(
            self.img_resolution,
            *trunk,
            decoder_type=self.decoder_type,
            out_channels=self.out_channels,
            remat=self.remat,
            name="dec",
        )
        out = decoder(skips, emb, train)
        return (out, taps) if levels else out
