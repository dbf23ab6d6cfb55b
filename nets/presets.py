"""The networks by name, and from the official constructors' arguments."""

from collections.abc import Mapping
from typing import Any

from poise.nets.dhariwal_unet import DhariwalUNet
from poise.nets.edm import PRECONDITIONINGS, EDMPrecond
from poise.nets.song_unet import SongUNet

_WRAPPERS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}
# Arguments of the official wrappers that don't change what the network computes in full precision.
_WITHOUT_EFFECT = {"sigma_min", "sigma_max", "epsilon_t", "use_fp16"}
_FIXED = {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "C_1": 0.001, "C_2": 0.008}
_WRAPPER_KEYS = {"precond", "class_name", "preconditioning", "model_type", "img_channels", "sigma_data"}


def ddpmpp(img_resolution: int, out_channels: int = 3, **overrides: Any) -> SongUNet:
    """DDPM++, EDM's architecture "vp": :class:`SongUNet` with its default settings.

    Args:
      img_resolution: height and width of the images.
      out_channels: channels of the result.
      **overrides: any other attribute of :class:`SongUNet`.

    Returns:
      The module.

    Example:
      >>> from poise.nets import ddpmpp
      >>> ddpmpp(32, channel_mult=(2, 2, 2), label_dim=10).embedding_type
      'positional'

    References:
      Song et al., https://arxiv.org/abs/2011.13456; Karras et al., https://arxiv.org/abs/2206.00364
    """
    return SongUNet(img_resolution, out_channels, **overrides)


def ncsnpp(img_resolution: int, out_channels: int = 3, **overrides: Any) -> SongUNet:
    """NCSN++, EDM's architecture "ve": Fourier embedding, residual encoder, the filter ``(1, 3, 3, 1)``.

    Args:
      img_resolution: height and width of the images.
      out_channels: channels of the result.
      **overrides: any other attribute of :class:`SongUNet`, or one of these.

    Returns:
      The module.

    Example:
      >>> from poise.nets import ncsnpp
      >>> ncsnpp(32).encoder_type
      'residual'

    References:
      Song et al., https://arxiv.org/abs/2011.13456; Karras et al., https://arxiv.org/abs/2206.00364
    """
    settings: dict[str, Any] = {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": (1, 3, 3, 1),
    }
    return SongUNet(img_resolution, out_channels, **{**settings, **overrides})


def adm(img_resolution: int, out_channels: int = 3, **overrides: Any) -> DhariwalUNet:
    """ADM: :class:`DhariwalUNet` with its default settings, those for ImageNet at 64x64.

    Args:
      img_resolution: height and width of the images.
      out_channels: channels of the result.
      **overrides: any other attribute of :class:`DhariwalUNet`.

    Returns:
      The module.

    Example:
      >>> from poise.nets import adm
      >>> adm(64, label_dim=1000).model_channels
      192

    References:
      Dhariwal and Nichol, https://arxiv.org/abs/2105.05233; Karras et al., https://arxiv.org/abs/2206.00364
    """
    return DhariwalUNet(img_resolution, out_channels, **overrides)


def preconditioning_of(config: Mapping[str, Any]) -> str:
    """The preconditioning that a configuration names: ``preconditioning``, else the official class name, else EDM.

    Args:
      config: see :func:`edm_network`.

    Returns:
      One of ``"edm"``, ``"vp"``, ``"ve"``, ``"iddpm"``.

    Raises:
      ValueError: for an unknown class name, or if two entries contradict each other.

    Example:
      >>> from poise.nets import preconditioning_of
      >>> preconditioning_of({"class_name": "VPPrecond"})
      'vp'
    """
    named = set()
    for key in ("precond", "class_name"):
        if key in config:
            name = str(config[key]).rsplit(".", 1)[-1]
            if name not in _WRAPPERS:
                raise ValueError(f"{key} must be one of {sorted(_WRAPPERS)}, got {config[key]!r}")
            named.add(_WRAPPERS[name])
    if "preconditioning" in config:
        if config["preconditioning"] not in PRECONDITIONINGS:
            raise ValueError(f"preconditioning must be one of {PRECONDITIONINGS}, got {config['preconditioning']!r}")
        named.add(config["preconditioning"])
    if len(named) > 1:
        raise ValueError(f"preconditioning, precond and class_name contradict each other, got {sorted(named)}")
    return named.pop() if named else "edm"


def edm_network(config: Mapping[str, Any], dtype: Any = None, remat: bool = False) -> EDMPrecond:
    """Builds the denoiser that the arguments of an official constructor describe.

    Args:
      config: ``img_resolution``, ``img_channels``, ``label_dim``, ``model_type`` (``"SongUNet"`` or
        ``"DhariwalUNet"``), ``sigma_data`` and any attribute of the network, with the official defaults for what is
        missing; ``class_name``, ``precond`` or ``preconditioning`` names the wrapper. ``sigma_min``, ``sigma_max``,
        ``epsilon_t`` and ``use_fp16`` are accepted and have no effect.
      dtype: of the network's activations.
      remat: recompute the blocks' activations in the backward pass.

    Returns:
      The module, without variables.

    Raises:
      ValueError: for an unknown or missing entry, or a schedule constant that differs from the official default.

    Example:
      >>> from poise.nets import EDM_CHECKPOINTS, edm_network
      >>> edm_network(EDM_CHECKPOINTS["imagenet-64x64-cond-adm"]).model.channel_mult
      (1, 2, 3, 4)

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364
    """
    preconditioning = preconditioning_of(config)
    model_type = config.get("model_type", "DhariwalUNet" if preconditioning in ("edm", "iddpm") else "SongUNet")
    if model_type not in ("SongUNet", "DhariwalUNet"):
        raise ValueError(f"model_type must be 'SongUNet' or 'DhariwalUNet', got {model_type!r}")
    network = SongUNet if model_type == "SongUNet" else DhariwalUNet
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key} must be {value}, got {config[key]}")
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in config.items()
        if key not in _WRAPPER_KEYS and key not in _WITHOUT_EFFECT and key not in _FIXED
    }
    allowed = set(network.__dataclass_fields__) - {"parent", "name", "dtype", "remat", "out_channels", "in_channels"}
    if unknown := sorted(set(settings) - allowed):
        raise ValueError(f"config has entries that {model_type} doesn't know: {unknown}; it knows {sorted(allowed)}")
    if missing := sorted({"img_resolution", "img_channels"} - set(config)):
        raise ValueError(f"config lacks {missing}")
    channels = config["img_channels"]
    model = network(
        **settings,
        out_channels=2 * channels if preconditioning == "iddpm" else channels,
        in_channels=channels,
        dtype=dtype,
        remat=remat,
    )
    return EDMPrecond(model, config.get("sigma_data", 0.5), model.label_dim, preconditioning)
