"""The three phases of a distillation run: teacher, warm-up of the critics, distillation."""

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import optax

from poise.fdistill import (
    FDistillConfig,
    Optimizers,
    edm_teacher,
    f_distill,
    one_step,
    student_variables,
    teacher_variables,
)
from poise.launch.data import InMemory
from poise.launch.networks import NetworkConfig, build_network
from poise.launch.phase import Phase
from poise.launch.quality import Judge
from poise.nets import RatioHead

if TYPE_CHECKING:
    from poise.launch.distill import DistillConfig


def distill_phases(
    config: "DistillConfig", network: NetworkConfig, train: dict[str, np.ndarray], judge: Judge
) -> tuple[Phase, ...]:
    """Puts the run together.

    Args:
      config: the run's settings.
      network: the denoiser's settings.
      train: ``image`` in pixel values and ``label``.
      judge: gives the quick evaluations of the student.

    Returns:
      The phases, in order.
    """
    net = build_network(network)
    images = {"image": judge.scale.to_network(train["image"]), "label": train["label"].astype(np.int32)}
    sigma_data = judge.scale.sigma_data

    teacher = Phase(
        name="teacher",
        make_algorithm=lambda _: edm_teacher(
            net,
            optax.adamw(
                optax.cosine_decay_schedule(config.teacher_learning_rate, config.teacher_steps), weight_decay=1e-4
            ),
            sigma_data=sigma_data,
            ema_halflife=config.teacher_ema_halflife,
            ema_rampup=None,
        ),
        data=InMemory(images, config.teacher_batch_size, config.seed),
        num_steps=config.teacher_steps,
    )

    settings = FDistillConfig(
        divergence=config.divergence,
        sigma_min=config.sigma_min,
        sigma_max=config.sigma_max,
        fake_updates=config.fake_updates,
        bins=config.bins,
        bins_decay=config.bins_decay,
        ratio_range=None,  # these settings were found with bounded log-ratios alone
        gan_weight=config.gan_weight,
        sigma_data=sigma_data,
        ema_decays=(config.ema_decay,),
    )
    clip = optax.clip_by_global_norm(10.0)
    student_rate = optax.cosine_decay_schedule(config.learning_rate, config.decay_steps, alpha=0.1)
    optimizers = Optimizers(
        student=optax.chain(clip, optax.adamw(student_rate, weight_decay=0.0)),
        fake=optax.chain(clip, optax.adamw(config.fake_learning_rate, weight_decay=0.0)),
        head=optax.adam(config.head_learning_rate, b1=0.5),
    )

    head = RatioHead(label_dim=network.num_classes)
    distillation = functools.partial(f_distill, net, head, optimizers=optimizers)
    warmup = Phase(
        name="warmup",
        make_algorithm=lambda finished: distillation(
            config=dataclasses.replace(settings, fake_updates=1),
            teacher=teacher_variables(finished),
            update_student=False,
        ),
        data=InMemory(images, config.batch_size, config.seed, cycle=1),
        num_steps=config.warmup_steps,
    )
    distill = Phase(
        name="distill",
        make_algorithm=lambda warm: distillation(config=settings, start=warm),
        data=InMemory(images, config.batch_size, config.seed, cycle=config.fake_updates),
        num_steps=config.steps,
        evaluate=_quick_evaluation(net, network, settings, judge),
        evaluate_every=config.eval_every,
    )
    return teacher, warmup, distill


def _quick_evaluation(net, network: NetworkConfig, settings: FDistillConfig, judge: Judge):
    """The student's Fréchet distance and class consistency from one draw as large as the training set."""
    labels = np.arange(judge.num_train, dtype=np.int32) % network.num_classes

    @jax.jit
    def generate(variables, key):
        latents = jax.random.normal(key, (len(labels), *network.image_shape), jnp.float32)
        return one_step(net, variables, latents, jnp.asarray(labels), sigma_init=settings.sigma_init)

    def evaluate(state, key):
        images = judge.scale.to_pixels(jax.device_get(generate(student_variables(state), key)))
        return {
            "frechet": judge.frechet(images),
            "frechet_train": judge.frechet(images, "train"),
            "class_consistency": judge.class_consistency(images, labels),
        }

    return evaluate
