"""The phases of a distillation run: teacher (unless there is one), warm-up of the critics, distillation."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import optax

from poise.core import Microbatched
from poise.fdistill import (
    PRESETS,
    FDistillConfig,
    Optimizers,
    edm_teacher,
    f_distill,
    preset,
    student_variables,
    teacher_variables,
)
from poise.launch.data import Data, InMemory, Prefetched, Shuffled
from poise.launch.drawing import Drawer, labels_in_turn, one_step_generate
from poise.launch.image_sets import ArrayImages, ImageSet
from poise.launch.networks import NetworkConfig, build_network
from poise.launch.phase import Phase
from poise.launch.pixels import PixelScale
from poise.launch.quality import Judge
from poise.nets import RatioHead

if TYPE_CHECKING:
    from poise.launch.distill import DistillConfig

_VARIANTS: dict[str, dict[str, Any]] = {
    "ddpmpp": {"model_type": "SongUNet"},
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "resample_filter": (1, 3, 3, 1),
    },
    "adm": {"model_type": "DhariwalUNet"},
}


def network_of(config: "DistillConfig", images: ImageSet) -> NetworkConfig:
    """The network that the flags describe, for these images."""
    size, _, channels = images.image_shape
    architecture = {
        **_VARIANTS[config.architecture],
        "img_resolution": size,
        "img_channels": channels,
        "label_dim": len(images.class_names),
        "model_channels": config.model_channels,
        "channel_mult": config.channel_mult,
        "num_blocks": config.num_blocks,
        "attn_resolutions": config.attn_resolutions,
        "dropout": config.dropout,
        "sigma_data": 0.5,
    }
    return NetworkConfig(architecture, config.precision)


def distill_phases(
    config: "DistillConfig", network: NetworkConfig, images: ImageSet, judge: Judge
) -> tuple[Phase, ...]:
    """Puts the run together.

    Args:
      config: the run's settings.
      network: the denoiser's settings.
      images: what is trained on.
      judge: gives the quick evaluations of the student, and the scale of the images.

    Returns:
      The phases, in order. Without one that trains a teacher, the first receives a teacher's variables.
    """
    net = Microbatched(build_network(network, config.remat), config.microbatches)
    batches = functools.partial(_batches, images, judge.scale, config.seed)
    settings = settings_of(config, network.sigma_data)
    distillation = functools.partial(
        f_distill,
        net,
        RatioHead(label_dim=network.num_classes),
        optimizers=_optimizers(config),
        feature_levels=config.feature_levels,
    )
    warmup = Phase(
        name="warmup",
        make_algorithm=lambda finished, axis_name=None: distillation(
            config=dataclasses.replace(settings, fake_updates=1),
            axis_name=axis_name,
            teacher=finished if config.teacher else teacher_variables(finished),
            update_student=False,
        ),
        data=batches(config.batch_size, 1, config.warmup_steps),
        num_steps=config.warmup_steps,
    )
    distill = Phase(
        name="distill",
        make_algorithm=lambda warm, axis_name=None: distillation(config=settings, start=warm, axis_name=axis_name),
        data=batches(config.batch_size, config.fake_updates, config.steps),
        num_steps=config.steps,
        evaluate=_quick_evaluation(network, judge, settings.sigma_init),
        evaluate_every=config.eval_every,
    )
    return (warmup, distill) if config.teacher else (_teacher_phase(config, network, net, batches), warmup, distill)


def settings_of(config: "DistillConfig", sigma_data: float) -> FDistillConfig:
    """The settings of the distillation: what the flags say, and the preset for what has no flag."""
    base = FDistillConfig() if config.preset == "none" else preset(config.preset)
    return dataclasses.replace(
        base,
        divergence=config.divergence,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        fake_updates=config.fake_updates,
        bins=config.bins,
        bins_decay=config.bins_decay,
        ratio_range=(config.ratio_min, config.ratio_max) if config.ratio_max else None,
        gan_weight=config.gan_weight,
        r1_weight=config.r1_weight,
        guidance_scale=config.guidance_scale,
        sigma_data=sigma_data,
        ema_decays=(config.ema_decay,),
    )


def _batches(
    images: ImageSet, scale: PixelScale, seed: int, batch_size: int, cycle: int | None, num_steps: int
) -> Data:
    """Shuffled batches in the network's scale; of images that aren't in memory, some in advance."""

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        found = images.read(indices)
        return {**found, "image": scale.to_network(found["image"])}

    if isinstance(images, ArrayImages):
        return InMemory(read(np.arange(len(images))), batch_size, seed, cycle)
    return Prefetched(Shuffled(read, len(images), batch_size, seed, cycle), num_steps)


def _teacher_phase(config: "DistillConfig", network: NetworkConfig, net: Any, batches: Any) -> Phase:
    peak, warmup, steps = config.teacher_learning_rate, config.teacher_warmup_steps, config.teacher_steps
    rate: Any = peak
    if config.teacher_decay:
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    elif warmup:  # without, optax's schedule stays at its first value
        rate = optax.warmup_constant_schedule(0.0, peak, warmup)
    optimizer = optax.adamw(rate, weight_decay=1e-4)
    return Phase(
        name="teacher",
        make_algorithm=lambda _, axis_name=None: edm_teacher(
            net,
            optimizer,
            axis_name=axis_name,
            sigma_data=network.sigma_data,
            ema_halflife=config.teacher_ema_halflife,
            ema_rampup=config.teacher_ema_rampup or None,
        ),
        data=batches(config.teacher_batch_size, None, steps),
        num_steps=steps,
    )


def _optimizers(config: "DistillConfig") -> Optimizers:
    """AdamW at the flags' rates; clipping and the head's momentum are a preset's where there is one."""
    published = None if config.preset == "none" else PRESETS[config.preset]
    clip_critics, b1 = (10.0, 0.5) if published is None else (published.clip_critics, 0.9)
    rate: Any = config.learning_rate
    if config.decay_steps:
        rate = optax.cosine_decay_schedule(rate, config.decay_steps, alpha=0.1)

    def adamw(learning_rate, **options):
        return optax.adamw(learning_rate, weight_decay=config.weight_decay, **options)

    def clipped(optimizer, norm):
        return optax.chain(optax.clip_by_global_norm(norm), optimizer) if norm else optimizer

    head = adamw(config.head_learning_rate, b1=b1)
    return Optimizers(
        student=clipped(adamw(rate), 10.0),
        fake=clipped(adamw(config.fake_learning_rate), clip_critics),
        head=head if published is None else clipped(head, clip_critics),
    )


def _quick_evaluation(network: NetworkConfig, judge: Judge, sigma_init: float):
    """The student's Fréchet distance and class consistency from one draw as large as the training set."""
    labels = labels_in_turn(judge.num_train, network.num_classes)
    draw = Drawer(one_step_generate(network, sigma_init), network.image_shape, judge.num_train, labels)

    def evaluate(state, key):
        images = judge.scale.to_pixels(draw(student_variables(state), key))
        return {
            "frechet": judge.frechet(images),
            "frechet_train": judge.frechet(images, "train"),
            "class_consistency": judge.class_consistency(images, labels),
        }

    return evaluate
