"""The update of a one-step student: matching in an f-divergence, plus the adversarial and the regression loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from poise.core import Batch, Metrics, mean_over
from poise.fdistill.distill_state import FDistillState
from poise.fdistill.losses import gan_losses, matching_gradient, surrogate_loss
from poise.fdistill.networks import OWN_NOISE, Networks
from poise.fdistill.ratio import (
    RatioBins,
    bin_index,
    effective_sample_size,
    log_ratio,
    normalize_log_ratio,
    normalized_weight,
)


class Generated(NamedTuple):
    """Images of the student.

    Attributes:
      x: the images.
      labels: their classes; None without classes.
    """

    x: Array
    labels: Array | None


def student_update(
    networks: Networks, state: FDistillState, batch: Batch, key: PRNGKeyArray
) -> tuple[FDistillState, Metrics, Generated]:
    """Updates the student and its averages once.

    Args:
      networks: the networks.
      state: the state.
      batch: the cycle's; its ``image`` gives shape and type of the generated ones, its pairs of latents and targets the
        regression loss.
      key: the update's key.

    Returns:
      The new state, metrics, and the images that the student made before it moved.
    """
    config, axis_name = networks.config, networks.axis_name
    image = batch["image"][0]
    draws = networks.draw(key, image, networks.matching_level)
    sigma, labels = draws.sigma, draws.labels

    def objective(params):
        x = networks.generate(state, params, draws.latents, labels)
        xt = draws.noised(x)
        x0_real, x0_fake, features = networks.predictions(state, params, xt, sigma, labels)
        metrics: Metrics = {}
        weight, bins, logits, generator_loss = None, state.bins, None, jnp.zeros((), jnp.float32)
        if networks.learns_ratio:
            logits = networks.judge(state.head, features, sigma, labels)
            judged = logits
            if config.gan_own_noise:
                own = networks.draw(jax.random.fold_in(key, OWN_NOISE), image, networks.critic_level)
                seen = networks.features(state, state.fake, own.noised(x), own.sigma, labels)
                judged = networks.judge(state.head, seen, own.sigma, labels)
            generator_loss = gan_losses(jax.lax.stop_gradient(judged), judged).generator
        if networks.oracles.log_ratio is not None:
            known = networks.oracles.log_ratio(*jax.lax.stop_gradient((params, xt)), sigma, labels)
            logits = known[:, None]
        if logits is not None:
            weight, bins, metrics = _weight(networks, logits, sigma, state.bins)
        gradient = matching_gradient(
            x,
            x0_real,
            x0_fake,
            weight,
            eps=config.matching_eps,
            normalizer=sigma**2 if config.matching_weighting == "score" else None,
        )
        metrics |= mean_over(axis_name, {"matching_norm": jnp.abs(gradient).mean(), "generator_loss": generator_loss})
        loss = surrogate_loss(x, gradient) + config.gan_weight * generator_loss
        if config.regression_weight > 0:
            regression = _regression_loss(networks, state, params, batch)
            metrics |= mean_over(axis_name, {"regression_loss": regression})
            loss = loss + config.regression_weight * regression
        return mean_over(axis_name, loss), (bins, metrics, jax.lax.stop_gradient(x))

    grads, (bins, metrics, x) = jax.grad(objective, has_aux=True)(state.student)
    grads = mean_over(axis_name, grads)
    updates, student_opt = networks.optimizers.student.update(grads, state.student_opt, state.student)
    student = optax.apply_updates(state.student, updates)
    ema = tuple(
        optax.incremental_update(student, average, 1.0 - decay)
        for average, decay in zip(state.ema, config.ema_decays, strict=True)
    )
    metrics["student_grad_norm"] = optax.tree.norm(grads)
    state = state._replace(student=student, student_opt=student_opt, bins=bins, ema=ema, step=state.step + 1)
    return state, metrics, Generated(x, labels)


def _weight(networks: Networks, logits: Array, sigma: Array, bins: RatioBins) -> tuple[Array, RatioBins, Metrics]:
    """Each example's weight, from the head's logits."""
    config, axis_name, eps = networks.config, networks.axis_name, networks.config.weight_eps
    ratio = log_ratio(logits, config.ratio_clip, config.ratio_range)
    metrics: Metrics = {}
    if config.bins != "none":
        sigma_range = (config.sigma_min, config.sigma_max)
        index = bin_index(sigma, sigma_range, config.num_bins, config.bins, config.rho)
        ratio, bins, calibration = normalize_log_ratio(ratio, index, bins, config.bins_decay, axis_name, eps)
        metrics |= {f"ratio_bin_{i}": calibration[i] for i in range(config.num_bins)}
    weight = normalized_weight(config.resolved_divergence, ratio, axis_name, eps)
    smallest, largest = weight.min(), weight.max()
    if axis_name is not None:
        smallest, largest = jax.lax.pmin(smallest, axis_name), jax.lax.pmax(largest, axis_name)
    effective = effective_sample_size(weight, axis_name)
    return weight, bins, metrics | {
        "weight_min": smallest, "weight_max": largest, "effective_sample_size": effective
    }  # fmt: skip


def _regression_loss(networks: Networks, state: FDistillState, params, batch: Batch) -> Array:
    """The mean distance between the student's images and the teacher's from the same latents."""
    latents, target, label = batch["latents"][0], batch["target"][0], batch.get("target_label")
    x = networks.generate(state, params, latents, None if label is None else label[0])
    if networks.distance is None:
        return jnp.mean((x - target) ** 2)
    distance = networks.distance(x, target)
    if distance.shape != x.shape[:1]:
        raise ValueError(
            f"distance must return one number per example, shape {x.shape[:1]}, got shape {distance.shape}"
        )
    return distance.mean()
