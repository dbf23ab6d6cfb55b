"""The published settings of DMD2 and f-distill, as values."""

import dataclasses
from types import MappingProxyType
from typing import Any

import numpy as np
import optax

from poise.core.arguments import check_count, check_range
from poise.fdistill.distill_config import FDistillConfig
from poise.fdistill.distill_state import Optimizers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a published run consists of besides the networks and the data.

    Attributes:
      config: the settings of :func:`poise.fdistill.f_distill`.
      learning_rate: of student, fake score and head alike.
      batch_size: images per update, over all devices.
      student_updates: updates of the student, that is, cycles; the codes count iterations, several per cycle.
      feature_levels: the resolutions that the head sees, 0 the finest, -1 the coarsest.
      weight_decay: AdamW's.
      warmup_steps: updates of each network over which its learning rate rises from 0.
      clip_student: bound on the global norm of the student's gradient; 0 for none.
      clip_critics: bound on that of the fake score and of the head; 0 for none.
      source: where the numbers come from.
    """

    config: FDistillConfig
    learning_rate: float
    batch_size: int
    student_updates: int
    feature_levels: tuple[int, ...] = (-1,)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    clip_student: float = 10.0
    clip_critics: float = 0.0
    source: str = ""


def _stable_diffusion_levels() -> tuple[float, ...]:
    """Noise over signal at its 1000 steps: betas whose roots are evenly spaced from 0.00085 to 0.012."""
    kept = np.cumprod(1.0 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    return tuple(np.sqrt((1.0 - kept) / kept).tolist())


_LEVELS = _stable_diffusion_levels()
_LATENT = {"levels": _LEVELS, "sigma_min": _LEVELS[0], "sigma_max": _LEVELS[-1], "sigma_init": _LEVELS[-1]}

_DMD2 = FDistillConfig(
    divergence="reverse_kl",
    min_level=20,
    max_level=980,
    fake_updates=5,
    critics_on_student_step=True,
    matching_eps=0.0,
    bins="none",
    ratio_range=None,
    head_features="fake",
    train_features=True,
    gan_own_noise=True,
    gan_weight=3e-3,
    discriminator_weight=1e-2,
    fake_weighting="edm",
    ema_decays=(0.0,),
)
_DMD2_LATENT = dataclasses.replace(_DMD2, **_LATENT, fake_updates=10, fake_weighting="epsilon", guidance_scale=1.75)
_NO_GAN = {"gan_weight": 0.0, "discriminator_weight": 0.0, "head_features": "teacher", "train_features": False}

_FASTGEN = FDistillConfig(
    divergence="jensen_shannon",
    min_level=2,
    max_level=998,
    fake_min_level=2,
    fake_max_level=998,
    fake_updates=4,
    matching_eps=1e-6,
    bins="linear",
    num_bins=10,
    bins_decay=0.0,
    weight_eps=1e-6,
    ratio_clip=10.0,
    ratio_range=(0.1, 20.0),
    gan_weight=1e-3,
    discriminator_weight=1.0,
    r1_image="clean",
    r1_noise=0.1,
    fake_weighting="none",
    ema_decays=(0.9999**5, 0.99995**5, 0.9996**5),
)
_FASTGEN_LATENT = dataclasses.replace(
    _FASTGEN,
    **_LATENT,
    min_level=1,
    fake_min_level=1,
    fake_updates=9,
    guidance_scale=1.75,
    ema_decays=(0.0,),
)


_DMD2_SOURCE = "tianweiy/DMD2, experiments/"
_FASTGEN_SOURCE = "NVlabs/FastGen, fastgen/configs/experiments/"
_PAPER_SOURCE = "arXiv 2502.15681, table 5; what it leaves open as in NVlabs/FastGen"

PRESETS = MappingProxyType(
    {
        "dmd2": Recipe(
            _DMD2, 2e-6, 280, 40_000, warmup_steps=500, clip_critics=10.0,
            source=_DMD2_SOURCE + "imagenet/imagenet_gan_classifier_genloss3e-3_diffusion1000_lr2e-6_scratch.sh",
        ),
        "dmd2_no_gan": Recipe(
            dataclasses.replace(_DMD2, **_NO_GAN), 2e-6, 280, 82_000, warmup_steps=500, clip_critics=10.0,
            source=_DMD2_SOURCE + "imagenet/imagenet_lr2e-6_scratch.sh",
        ),
        "dmd2_finetune": Recipe(
            _DMD2, 5e-7, 280, 28_000, warmup_steps=500, clip_critics=10.0,
            source=_DMD2_SOURCE + "imagenet/imagenet_gan_classifier_genloss3e-3_diffusion1000_lr5e-7_resume.sh",
        ),
        "dmd2_sd15": Recipe(
            dataclasses.replace(_DMD2_LATENT, **_NO_GAN), 1e-5, 2048, 3_900, warmup_steps=500, clip_critics=10.0,
            source=_DMD2_SOURCE + "sdv1.5/laion6.25_..._guidance1.75_lr1e-5_seed10_dfake10_from_scratch.sh",
        ),
        "dmd2_sd15_finetune": Recipe(
            dataclasses.replace(_DMD2_LATENT, gan_weight=1e-3), 5e-7, 2048, 200, warmup_steps=500, clip_critics=10.0,
            source=_DMD2_SOURCE + "sdv1.5/laion6.25_..._lr5e-7_seed10_dfake10_diffusion1000_gan1e-3_noode_...",
        ),
        "fastgen": Recipe(
            dataclasses.replace(_FASTGEN, divergence="forward_kl"), 1e-4, 2048, 20_000, (0, 1, 2),
            source=_FASTGEN_SOURCE + "EDM/config_f_distill_cifar10.py",
        ),
        "fastgen_imagenet64": Recipe(
            dataclasses.replace(_FASTGEN, gan_weight=3e-3, bins_decay=0.5), 2e-6, 512, 120_000,
            source=_FASTGEN_SOURCE + "EDM/config_f_distill_in64.py",
        ),
        "fastgen_sd15": Recipe(
            _FASTGEN_LATENT, 1e-5, 2048, 10_000, source=_FASTGEN_SOURCE + "SD15/config_f_distill.py"
        ),
        "paper_cifar10": Recipe(
            dataclasses.replace(_FASTGEN, divergence="forward_kl", fake_updates=5, r1_weight=1.0), 1e-4, 2048, 60_000,
            (0, 1, 2), source=_PAPER_SOURCE,
        ),
        "paper_imagenet64": Recipe(
            dataclasses.replace(_FASTGEN, fake_updates=5, gan_weight=3e-3, bins_decay=0.5), 2e-6, 512, 380_000,
            source=_PAPER_SOURCE,
        ),
        "paper_sd15": Recipe(
            dataclasses.replace(_FASTGEN_LATENT, fake_updates=10, r1_weight=1.0), 1e-5, 1024, 60_000,
            source=_PAPER_SOURCE,
        ),
    }
)  # fmt: skip
"""The published runs by name."""


def _recipe(name: str) -> Recipe:
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(sorted(PRESETS))}, got {name!r}")
    return PRESETS[name]


def preset(name: str, **overrides: Any) -> FDistillConfig:
    r"""The settings of a published run.

    ===================  =====================================================================================
    name                 what it is
    ===================  =====================================================================================
    dmd2                 DMD2 on ImageNet-64 with GAN loss, from scratch: FID 1.51 there
    dmd2_no_gan          the same without: FID 2.61
    dmd2_finetune        its second stage, from the run without GAN loss on: FID 1.28
    dmd2_sd15            DMD2 on Stable Diffusion 1.5, without GAN loss: FID 9.28
    dmd2_sd15_finetune   its second stage: FID 8.35
    fastgen              f-distill's released code on CIFAR-10 (forward KL)
    fastgen_imagenet64   on ImageNet-64 (Jensen-Shannon)
    fastgen_sd15         on Stable Diffusion 1.5 (Jensen-Shannon)
    paper_cifar10        the f-distill paper on CIFAR-10 (forward KL, its best there)
    paper_imagenet64     on ImageNet-64 (Jensen-Shannon, its best there)
    paper_sd15           on Stable Diffusion 1.5 (Jensen-Shannon)
    ===================  =====================================================================================

    Where paper and code of f-distill differ: the paper has 5 critic updates per student update (10 for Stable
    Diffusion), the code one iteration in 5 (10) for the student, which leaves 4 (9); the paper has the R1 penalty with
    weight 1 on CIFAR-10 and Stable Diffusion, the code has it off; 60,000 against 100,000 iterations on CIFAR-10 (taken
    as student updates for the paper; the code's hold one in 5), 380,000 against 600,000 on ImageNet-64, batches of 1024
    against 2048 on Stable Diffusion. The paper's noise levels, bins and averages are taken from the code, and the
    decay 0.5 of the bins on ImageNet-64.

    The code averages the student after every iteration, so that its decays count five times per student update; the
    decays here are those powers. DMD2 keeps no average, which is a decay of 0.

    Stable Diffusion's are for a network that is called as a denoiser of latents with noise of level $\sigma$; the grid
    of levels is its own 1000 steps, $\sigma^2 = (1-\bar\alpha)/\bar\alpha$, from which both codes draw evenly.

    Args:
      name: the run, see the table; :data:`poise.fdistill.PRESETS` holds all of them with learning rate, batch size and
        source.
      **overrides: fields of :class:`FDistillConfig` that shall differ.

    Returns:
      The settings.

    Raises:
      TypeError: if an override is no field.
      ValueError: if the name is unknown, or an override isn't allowed.

    Example:
      >>> from poise.fdistill import preset
      >>> config = preset("dmd2", fake_updates=10)
      >>> config.divergence, config.fake_updates, config.gan_weight
      ('reverse_kl', 10, 0.003)
      >>> preset("fastgen").ratio_range
      (0.1, 20.0)

    References:
      Yin et al., DMD2, https://arxiv.org/abs/2405.14867, and its code, https://github.com/tianweiy/DMD2; Xu et al.,
      f-distill, https://arxiv.org/abs/2502.15681, and its code, https://github.com/NVlabs/FastGen
    """
    config = _recipe(name).config
    known = {field.name for field in dataclasses.fields(config)}
    for key in overrides:
        if key not in known:
            raise TypeError(f"overrides must be fields of FDistillConfig ({', '.join(sorted(known))}), got {key!r}")
    return dataclasses.replace(config, **overrides)


def preset_optimizers(
    name: str,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    weight_decay: float | None = None,
    warmup_steps: int | None = None,
    clip_student: float | None = None,
    clip_critics: float | None = None,
) -> Optimizers:
    """The optimizers of a published run: AdamW with $b_1 = 0.9$, $b_2 = 0.999$ for each network.

    DMD2 clips the gradients of student and critics to the global norm 10 and warms up over 500 updates (it says so; its
    schedule advances once per device, so that 7 devices take 72 updates); f-distill's code clips the student's only and
    doesn't warm up.

    Args:
      name: the run, as for :func:`preset`.
      learning_rate: instead of the run's, for all networks. A schedule is used as it stands, without warm-up.
      weight_decay: instead of the run's.
      warmup_steps: instead of the run's; the first update after 0 of them has the whole learning rate.
      clip_student: instead of the run's; 0 for no clipping.
      clip_critics: instead of the run's; 0 for no clipping.

    Returns:
      The optimizers. With ``train_features`` (DMD2) the one of the fake score moves the head, too, and clips both
      together; the one of the head is there for settings that train it alone.

    Raises:
      TypeError: if ``warmup_steps`` is no integer.
      ValueError: if the name is unknown, or a number is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import preset_optimizers
      >>> optimizer = preset_optimizers("fastgen", weight_decay=0.0).student
      >>> updates, _ = optimizer.update(jnp.array([3.0]), optimizer.init(jnp.ones(1)), jnp.ones(1))
      >>> round(float(updates[0]), 6)
      -0.0001

    References:
      https://github.com/tianweiy/DMD2 (``main/edm/train_edm.py``), https://github.com/NVlabs/FastGen
      (``fastgen/configs``)
    """
    recipe = _recipe(name)
    rate = recipe.learning_rate if learning_rate is None else learning_rate
    decay = recipe.weight_decay if weight_decay is None else weight_decay
    warmup = recipe.warmup_steps if warmup_steps is None else warmup_steps
    clips = [
        recipe.clip_student if clip_student is None else clip_student,
        *[recipe.clip_critics if clip_critics is None else clip_critics] * 2,
    ]
    check_range("learning_rate", rate, low=0.0)
    check_range("weight_decay", decay, low=0.0)
    check_count("warmup_steps", warmup, low=0)
    check_range("clip_student", clips[0], low=0.0)
    check_range("clip_critics", clips[1], low=0.0)
    if warmup > 0 and not callable(rate):
        rate = optax.linear_schedule(0.0, rate, warmup)
    adamw = optax.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=decay)
    return Optimizers(*(optax.chain(optax.clip_by_global_norm(clip), adamw) if clip > 0 else adamw for clip in clips))
