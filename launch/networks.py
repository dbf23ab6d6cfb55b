"""The denoiser of a run, from plain settings that travel with its weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from poise.nets import EDMPrecond, SongUNet


class NetworkConfig(NamedTuple):
    """Settings of a class-conditional U-Net with EDM preconditioning.

    Attributes:
      image_shape: height (equal to width), width and channels.
      num_classes: classes, labelled ``0 .. num_classes - 1``.
      model_channels: channels of the finest level.
      channel_mult: channel multiplier of each level.
      num_blocks: residual blocks per level.
      attn_resolutions: resolutions with self-attention.
      dropout: used in training only.
      precision: ``"float32"`` or ``"bfloat16"``.
      sigma_data: the data's standard deviation.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_blocks: int
    attn_resolutions: tuple[int, ...]
    dropout: float = 0.0
    precision: str = "float32"
    sigma_data: float = 0.5

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "NetworkConfig":
        """From a JSON object; lists become tuples.

        Raises:
          ValueError: if a field is missing or unknown.
        """
        if set(values) != set(cls._fields):
            raise ValueError(f"network settings must be {sorted(cls._fields)}, got {sorted(values)}")
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**fields)


def build_network(config: NetworkConfig) -> nn.Module:
    """The network of these settings."""
    height, _, channels = config.image_shape
    unet = SongUNet(
        img_resolution=height,
        out_channels=channels,
        label_dim=config.num_classes,
        model_channels=config.model_channels,
        channel_mult=config.channel_mult,
        num_blocks=config.num_blocks,
        attn_resolutions=config.attn_resolutions,
        dropout=config.dropout,
        dtype=jnp.bfloat16 if config.precision == "bfloat16" else None,
    )
    return EDMPrecond(unet, sigma_data=config.sigma_data, label_dim=config.num_classes)
