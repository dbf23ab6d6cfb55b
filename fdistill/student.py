"""The update of a one-step student: matching in an f-divergence, plus the adversarial loss."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from poise.core import Metrics, mean_over
from poise.fdistill.distill_state import FDistillState
from poise.fdistill.losses import gan_losses, guided, matching_gradient, surrogate_loss
from poise.fdistill.networks import Networks
from poise.fdistill.ratio import (
    RatioBins,
    bin_index,
    effective_sample_size,
    log_ratio,
    normalize_log_ratio,
    normalized_weight,
)


def student_update(
    networks: Networks, state: FDistillState, image: Array, key: PRNGKeyArray
) -> tuple[FDistillState, Metrics]:
    """Updates the student and its averages once, with a batch of latents as large as ``image``.

    Args:
      networks: the networks.
      state: the state.
      image: a batch ``[B, ...]``, for its shape and type alone.
      key: the update's key.

    Returns:
      The new state and metrics.
    """
    config, teacher = networks.config, state.frozen["teacher"]
    draws = networks.draw(key, image, networks.matching_level)
    sigma, labels = draws.sigma, draws.labels

    def objective(params):
        x = networks.generate(state, params, draws.latents, labels)
        xt = draws.noised(x)
        x0_real, features = networks.net.apply(teacher, xt, sigma, labels, feature_levels=networks.feature_levels)
        x0_real, fixed = jax.lax.stop_gradient((x0_real, xt))
        x0_fake = networks.denoise(state, state.fake, fixed, sigma, labels)
        if config.guidance_scale != 1.0:
            nothing = jnp.zeros((x.shape[0], networks.label_dim), x.dtype)
            x0_null = networks.denoise(state, teacher["params"], fixed, sigma, nothing)
            x0_real = guided(x0_real, x0_null, config.guidance_scale)
        metrics: Metrics = {}
        weight, bins, generator_loss = None, state.bins, jnp.zeros((), jnp.float32)
        if networks.learns_ratio:
            logits = networks.head.apply({"params": state.head}, features, sigma, labels)
            generator_loss = gan_losses(jax.lax.stop_gradient(logits), logits).generator
            weight, bins, metrics = _weight(networks, logits, sigma, state.bins)
        gradient = matching_gradient(x, x0_real, x0_fake, weight)
        metrics |= mean_over(
            networks.axis_name, {"matching_norm": jnp.abs(gradient).mean(), "generator_loss": generator_loss}
        )
        loss = surrogate_loss(x, gradient) + config.gan_weight * generator_loss
        return mean_over(networks.axis_name, loss), (bins, metrics)

    grads, (bins, metrics) = jax.grad(objective, has_aux=True)(state.student)
    grads = mean_over(networks.axis_name, grads)
    updates, student_opt = networks.optimizers.student.update(grads, state.student_opt, state.student)
    student = optax.apply_updates(state.student, updates)
    ema = tuple(
        optax.incremental_update(student, average, 1.0 - decay)
        for average, decay in zip(state.ema, config.ema_decays, strict=True)
    )
    metrics["student_grad_norm"] = optax.tree.norm(grads)
    return state._replace(student=student, student_opt=student_opt, bins=bins, ema=ema, step=state.step + 1), metrics


def _weight(networks: Networks, logits: Array, sigma: Array, bins: RatioBins) -> tuple[Array, RatioBins, Metrics]:
    """Each example's weight, from the head's logits."""
    config, axis_name = networks.config, networks.axis_name
    ratio = log_ratio(logits, config.ratio_clip, config.ratio_range)
    metrics: Metrics = {}
    if config.bins != "none":
        sigma_range = (config.sigma_min, config.sigma_max)
        index = bin_index(sigma, sigma_range, config.num_bins, config.bins, config.rho)
        ratio, bins, calibration = normalize_log_ratio(ratio, index, bins, config.bins_decay, axis_name)
        metrics |= {f"ratio_bin_{i}": calibration[i] for i in range(config.num_bins)}
    weight = normalized_weight(config.resolved_divergence, ratio, axis_name)
    smallest, largest = weight.min(), weight.max()
    if axis_name is not None:
        smallest, largest = jax.lax.pmin(smallest, axis_name), jax.lax.pmax(largest, axis_name)
    effective = effective_sample_size(weight, axis_name)
    return weight, bins, metrics | {
        "weight_min": smallest, "weight_max": largest, "effective_sample_size": effective
    }  # fmt: skip
