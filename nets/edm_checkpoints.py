"""What is known of the published EDM networks. No weights come with poise; theirs are CC BY-NC-SA 4.0."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_DDPMPP = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": (1, 1),
}
_NCSNPP = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": (1, 3, 3, 1),
}


def _song(variant: Mapping[str, Any], resolution: int, mult: tuple[int, ...], labels: int, dropout: float) -> Mapping:
    return MappingProxyType(
        {
            "preconditioning": "edm",
            "model_type": "SongUNet",
            "img_resolution": resolution,
            "img_channels": 3,
            "label_dim": labels,
            "augment_dim": 9,
            "model_channels": 128,
            "channel_mult": mult,
            "channel_mult_emb": 4,
            "num_blocks": 4,
            "attn_resolutions": (16,),
            "dropout": dropout,
            "sigma_data": 0.5,
            **variant,
        }
    )


EDM_CHECKPOINTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "cifar10-32x32-cond-vp": _song(_DDPMPP, 32, (2, 2, 2), 10, 0.13),
        "cifar10-32x32-uncond-vp": _song(_DDPMPP, 32, (2, 2, 2), 0, 0.13),
        "cifar10-32x32-cond-ve": _song(_NCSNPP, 32, (2, 2, 2), 10, 0.13),
        "cifar10-32x32-uncond-ve": _song(_NCSNPP, 32, (2, 2, 2), 0, 0.13),
        "ffhq-64x64-uncond-vp": _song(_DDPMPP, 64, (1, 2, 2, 2), 0, 0.05),
        "ffhq-64x64-uncond-ve": _song(_NCSNPP, 64, (1, 2, 2, 2), 0, 0.05),
        "afhqv2-64x64-uncond-vp": _song(_DDPMPP, 64, (1, 2, 2, 2), 0, 0.25),
        "afhqv2-64x64-uncond-ve": _song(_NCSNPP, 64, (1, 2, 2, 2), 0, 0.25),
        "imagenet-64x64-cond-adm": MappingProxyType(
            {
                "preconditioning": "edm",
                "model_type": "DhariwalUNet",
                "img_resolution": 64,
                "img_channels": 3,
                "label_dim": 1000,
                "augment_dim": 0,
                "model_channels": 192,
                "channel_mult": (1, 2, 3, 4),
                "channel_mult_emb": 4,
                "num_blocks": 3,
                "attn_resolutions": (32, 16, 8),
                "channels_per_head": 64,
                "dropout": 0.1,
                "resample_filter": (1, 1),
                "sigma_data": 0.5,
            }
        ),
    }
)
"""Official file name, without ``edm-`` and ``.pkl``, to the configuration that :func:`edm_network` builds.

"vp" and "ve" name the architectures DDPM++ and NCSN++ there; the preconditioning is EDM's in all of them.
"""
