"""f-distill: one-step generation by matching noised distributions in an f-divergence."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from poise.core import Algorithm, Batch, Metrics, fold_in_examples, mean_over, sum_over
from poise.fdistill.distill_config import FDistillConfig
from poise.fdistill.edm import sample_karras_sigma
from poise.fdistill.generator import one_step
from poise.fdistill.losses import approx_r1, fake_score_loss, gan_losses, guided, matching_gradient, surrogate_loss
from poise.fdistill.ratio import (
    RatioBins,
    bin_index,
    effective_sample_size,
    init_ratio_bins,
    log_ratio,
    normalize_log_ratio,
    normalized_weight,
)


class Optimizers(NamedTuple):
    """One optax transformation for each trained network.

    Attributes:
      student: moves the one-step generator.
      fake: moves the fake score, the denoiser of the student's distribution.
      head: moves the head that estimates the density ratio.
    """

    student: optax.GradientTransformation
    fake: optax.GradientTransformation
    head: optax.GradientTransformation


class FDistillState(NamedTuple):
    """Everything that a distillation holds.

    Attributes:
      frozen: ``{"teacher": variables}``; never changes.
      student: parameters of the one-step generator.
      student_opt: its optimizer's state.
      fake: parameters of the fake score.
      fake_opt: its optimizer's state.
      head: parameters of the ratio head.
      head_opt: its optimizer's state.
      bins: running means of the density ratio over noise levels.
      ema: averages of ``student``, one for each of ``FDistillConfig.ema_decays``.
      step: finished student updates.
    """

    frozen: PyTree
    student: PyTree
    student_opt: PyTree
    fake: PyTree
    fake_opt: PyTree
    head: PyTree
    head_opt: PyTree
    bins: RatioBins
    ema: tuple[PyTree, ...]
    step: Int[Array, ""]


def student_variables(state: FDistillState, average: int | None = 0) -> dict[str, Any]:
    """The variables of the one-step generator that a distillation has reached.

    Args:
      state: a state of :func:`f_distill`.
      average: which of the averages to take, or None for the raw parameters.

    Returns:
      Variables for :func:`poise.fdistill.one_step`.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import FDistillState, init_ratio_bins, student_variables
      >>> bins, step = init_ratio_bins(2), jnp.array(0)
      >>> state = FDistillState({"teacher": {"params": 0.0}}, 1.0, (), 2.0, (), 3.0, (), bins, (4.0,), step)
      >>> student_variables(state), student_variables(state, None)
      ({'params': 4.0}, {'params': 1.0})
    """
    params = state.student if average is None else state.ema[average]
    return {**state.frozen["teacher"], "params": params}


class _Draws(NamedTuple):
    """What one pass over a batch draws: latents, labels, noise level and noise of each example."""

    latents: Array
    labels: Array | None
    sigma: Array
    noise: Array


def f_distill(
    net: nn.Module,
    head: nn.Module,
    config: FDistillConfig,
    optimizers: Optimizers,
    *,
    teacher: PyTree | None = None,
    start: FDistillState | None = None,
    feature_levels: tuple[int, ...] = (-1,),
    update_student: bool = True,
    axis_name: str | None = None,
) -> Algorithm:
    r"""Distils a denoiser into a one-step generator, as an :class:`poise.core.Algorithm`.

    One step is a whole cycle: an update of the student, then ``config.fake_updates`` updates of its critics.

    *Student.* With $x = G_\theta(z)$ and $x_t = x + \sigma\epsilon$, the head gives the log density ratio
    $\ell = \log p_t(x_t) - \log q_t(x_t)$, whose mean ratio is set to 1 in each bin of noise levels, and the
    f-divergence turns it into a weight $h(e^\ell)$ of mean 1. The student follows

    $$g = h \, \frac{D_\mathrm{fake}(x_t) - D_\mathrm{teacher}(x_t)}{\mathrm{mean}|x - D_\mathrm{teacher}(x_t)|}$$

    plus ``gan_weight`` times the non-saturating adversarial gradient. Reverse-KL has $h = 1$: that is DMD2.

    *Critics.* The fake score, a denoiser that starts as the teacher's copy, is fitted to fresh samples of the student;
    the head, on the frozen teacher's features, learns to tell real from generated images at random noise levels.

    Every draw of example ``i`` depends on the step's key and ``i`` alone, and every mean over the batch is one over the
    global batch, so the numbers do not depend on the number of devices. Networks run without dropout. The ratio, the
    weight and the normalisation are computed in float32 at least, whatever the network's precision.

    Args:
      net: the denoiser of teacher, student and fake score; with ``feature_levels=...`` it must return
        ``(D, features)`` and with ``features_only=True`` the features, as :class:`poise.nets.EDMPrecond` does. Its
        ``label_dim`` says how many classes there are; the student's labels are uniform over them.
      head: gives logits ``[B, K]`` from ``(features, sigma, labels)``; their mean over K is the log ratio.
      config: the settings.
      optimizers: for student, fake score and head. Clipping and schedules go in here.
      teacher: the teacher's variables, unless ``start`` is given.
      start: a state to begin from, such as one whose critics are warmed up; its student is kept.
      feature_levels: the resolutions whose last encoder block feeds the head, 0 the finest, -1 the coarsest.
      update_student: False trains the critics alone: the warm-up that makes the first ratios meaningful.
      axis_name: the axis of an enclosing ``pmap`` or ``shard_map``.

    Returns:
      An algorithm with state :class:`FDistillState`. A batch is a dict of ``image`` ``[fake_updates, B, H, W, C]`` and,
      for a conditional network, ``label`` ``[fake_updates, B]``. Metrics of the critics (of the cycle's last update):
      ``fake_loss``, ``discriminator_loss``, ``logit_real``, ``logit_fake``, gradient norms; of the student:
      ``matching_norm`` (the mean size of the matching gradient), ``generator_loss``, ``weight_min``, ``weight_max``,
      ``effective_sample_size`` (of the global batch), ``ratio_bin_<i>`` (mean ratio before normalisation, 1 for a
      perfect head), gradient norm.

    Raises:
      ValueError: if not exactly one of ``teacher`` and ``start`` is given, or a batch has fewer than 2 examples (the
        weights' mean would make each weight 1, whatever the divergence) or not ``fake_updates`` of them.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.fdistill import FDistillConfig, Optimizers, f_distill
      >>> from poise.nets import EDMPrecond, RatioHead, SongUNet
      >>> net = EDMPrecond(SongUNet(8, 1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=()))
      >>> batch = {"image": jnp.zeros((1, 4, 8, 8, 1))}
      >>> teacher = net.init(jax.random.key(0), batch["image"][0], jnp.ones(4))
      >>> config = FDistillConfig(divergence="jensen_shannon", fake_updates=1)
      >>> optimizers = Optimizers(optax.adam(1e-4), optax.adam(1e-4), optax.adam(1e-3))
      >>> algorithm = f_distill(net, RatioHead(), config, optimizers, teacher=teacher)
      >>> state = algorithm.init(jax.random.key(1), batch)
      >>> state, metrics = jax.jit(algorithm.step)(state, batch, jax.random.key(2))
      >>> int(state.step)
      1

    References:
      Xu, Nie, Vahdat, *One-step Diffusion Models with f-Divergence Distribution Matching*,
      https://arxiv.org/abs/2502.15681; Yin et al., *Improved Distribution Matching Distillation for Fast Image
      Synthesis* (DMD2), https://arxiv.org/abs/2405.14867. The authors' released code normalises ratios over bins that
      are linear in sigma (``bins="linear"``, ``bins_decay=0``); the default here is bins of equal probability with a
      running mean.
    """
    if (teacher is None) == (start is None):
        raise ValueError(
            "exactly one of teacher and start must be given, got " + ("neither" if start is None else "both")
        )
    div = config.resolved_divergence
    label_dim = int(getattr(net, "label_dim", 0))
    learns_ratio = config.discriminator_weight > 0

    def levels(lowest, highest):
        def sample(key, dtype):
            return sample_karras_sigma(
                key,
                (),
                config.sigma_min,
                config.sigma_max,
                config.rho,
                min_level=lowest,
                max_level=highest,
                dtype=dtype,
            )

        return sample

    matching_level = levels(config.min_level, config.max_level)
    critic_level = levels(0, None)

    def draw(key, image, level) -> _Draws:
        def one(example_key):
            z, c, s, e = jax.random.split(example_key, 4)
            return _Draws(
                jax.random.normal(z, image.shape[1:], image.dtype),
                jax.random.randint(c, (), 0, label_dim) if label_dim else None,
                level(s, image.dtype),
                jax.random.normal(e, image.shape[1:], image.dtype),
            )

        return jax.vmap(one)(fold_in_examples(key, image.shape[0], axis_name))

    def with_constants(state, params):
        return {**state.frozen["teacher"], "params": params}

    def generate(state, params, draws):
        return one_step(net, with_constants(state, params), draws.latents, draws.labels, sigma_init=config.sigma_init)

    def denoise(state, params, x, sigma, labels):
        return net.apply(with_constants(state, params), x, sigma, labels)

    def logits_of(state, head_params, x, sigma, labels):
        features = net.apply(
            state.frozen["teacher"], x, sigma, labels, feature_levels=feature_levels, features_only=True
        )
        return head.apply({"params": head_params}, features, sigma, labels)

    def init(key: PRNGKeyArray, batch: Batch) -> FDistillState:
        if start is not None:
            return start
        variables = dict(teacher)
        params = variables["params"]
        image, labels = batch["image"][0, :1], batch.get("label")
        labels = None if labels is None else labels[0, :1]
        features = net.apply(
            variables, image, jnp.ones((1,), image.dtype), labels, feature_levels=feature_levels, features_only=True
        )
        head_params = head.init(key, features, jnp.ones((1,), image.dtype), labels)["params"]
        return FDistillState(
            frozen={"teacher": variables},
            student=params,
            student_opt=optimizers.student.init(params),
            fake=params,
            fake_opt=optimizers.fake.init(params),
            head=head_params,
            head_opt=optimizers.head.init(head_params),
            bins=init_ratio_bins(config.num_bins),
            ema=tuple(params for _ in config.ema_decays),
            step=jnp.zeros((), jnp.int32),
        )

    def student_update(state: FDistillState, image: Array, key: PRNGKeyArray) -> tuple[FDistillState, Metrics]:
        draws = draw(key, image, matching_level)
        sigma, labels = draws.sigma, draws.labels

        def objective(params):
            x = generate(state, params, draws)
            xt = x + _expand(sigma, x) * draws.noise
            x0_fake = denoise(state, state.fake, jax.lax.stop_gradient(xt), sigma, labels)
            x0_real, features = net.apply(state.frozen["teacher"], xt, sigma, labels, feature_levels=feature_levels)
            x0_real = jax.lax.stop_gradient(x0_real)
            if config.guidance_scale != 1.0 and label_dim:
                nothing = jnp.zeros((x.shape[0], label_dim), x.dtype)
                x0_null = denoise(state, state.frozen["teacher"]["params"], jax.lax.stop_gradient(xt), sigma, nothing)
                x0_real = guided(x0_real, x0_null, config.guidance_scale)
            weight, bins, metrics, generator_loss = None, state.bins, {}, jnp.zeros((), jnp.float32)
            if learns_ratio:
                logits = head.apply({"params": state.head}, features, sigma, labels)
                generator_loss = gan_losses(jax.lax.stop_gradient(logits), logits).generator
                ratio = log_ratio(logits, config.ratio_clip)
                if config.bins != "none":
                    sigma_range = (config.sigma_min, config.sigma_max)
                    index = bin_index(sigma, sigma_range, config.num_bins, config.bins, config.rho)
                    ratio, bins, calibration = normalize_log_ratio(ratio, index, bins, config.bins_decay, axis_name)
                    metrics |= {f"ratio_bin_{i}": calibration[i] for i in range(config.num_bins)}
                weight = normalized_weight(div, ratio, axis_name)
                metrics |= _weight_metrics(weight, axis_name)
            gradient = matching_gradient(x, x0_real, x0_fake, weight)
            metrics["matching_norm"] = jnp.abs(gradient).mean()
            metrics["generator_loss"] = generator_loss
            loss = surrogate_loss(x, gradient) + config.gan_weight * generator_loss
            return loss, (bins, metrics)

        grads, (bins, metrics) = jax.grad(objective, has_aux=True)(state.student)
        grads = mean_over(axis_name, grads)
        for name in ("matching_norm", "generator_loss"):
            metrics[name] = mean_over(axis_name, metrics[name])
        updates, student_opt = optimizers.student.update(grads, state.student_opt, state.student)
        student = optax.apply_updates(state.student, updates)
        metrics["student_grad_norm"] = optax.tree.norm(grads)
        ema = tuple(
            optax.incremental_update(student, average, 1.0 - decay)
            for average, decay in zip(state.ema, config.ema_decays, strict=True)
        )
        return state._replace(
            student=student, student_opt=student_opt, bins=bins, ema=ema, step=state.step + 1
        ), metrics

    def critic_update(state: FDistillState, batch: Batch, key: PRNGKeyArray) -> tuple[FDistillState, Metrics]:
        image, real_labels = batch["image"], batch.get("label")
        fake_key, real_key = jax.random.split(key)
        draws = draw(fake_key, image, critic_level)
        sigma, labels = draws.sigma, draws.labels
        x = jax.lax.stop_gradient(generate(state, state.student, draws))
        xt = x + _expand(sigma, x) * draws.noise

        def fake_objective(params):
            x0 = denoise(state, params, xt, sigma, labels)
            return fake_score_loss(x0, x, sigma, config.sigma_data, config.fake_weighting)

        fake_loss, fake_grads = jax.value_and_grad(fake_objective)(state.fake)
        metrics = {"fake_loss": fake_loss}
        if learns_ratio:
            real = draw(real_key, image, critic_level)
            noised = image + _expand(real.sigma, image) * real.noise

            def head_objective(params):
                logits_real = logits_of(state, params, noised, real.sigma, real_labels)
                logits_fake = logits_of(state, params, xt, sigma, labels)
                loss = config.discriminator_weight * gan_losses(logits_real, logits_fake).discriminator
                if config.r1_weight > 0:
                    perturbed = noised + config.r1_noise * real.latents
                    logits_perturbed = logits_of(state, params, perturbed, real.sigma, real_labels)
                    loss = loss + config.r1_weight * approx_r1(logits_real, logits_perturbed)
                return loss, {"logit_real": logits_real.mean(), "logit_fake": logits_fake.mean()}

            (head_loss, logit_metrics), head_grads = jax.value_and_grad(head_objective, has_aux=True)(state.head)
            metrics |= {"discriminator_loss": head_loss, **logit_metrics}
        metrics = mean_over(axis_name, metrics)
        fake_grads = mean_over(axis_name, fake_grads)
        updates, fake_opt = optimizers.fake.update(fake_grads, state.fake_opt, state.fake)
        metrics["fake_grad_norm"] = optax.tree.norm(fake_grads)
        state = state._replace(fake=optax.apply_updates(state.fake, updates), fake_opt=fake_opt)
        if learns_ratio:
            head_grads = mean_over(axis_name, head_grads)
            updates, head_opt = optimizers.head.update(head_grads, state.head_opt, state.head)
            metrics["head_grad_norm"] = optax.tree.norm(head_grads)
            state = state._replace(head=optax.apply_updates(state.head, updates), head_opt=head_opt)
        return state, metrics

    def step(state: FDistillState, batch: Batch, key: PRNGKeyArray) -> tuple[FDistillState, Metrics]:
        cycles = jax.tree.leaves(batch)[0].shape[0]
        if cycles != config.fake_updates:
            raise ValueError(
                f"batch must hold fake_updates = {config.fake_updates} batches on its first axis, got {cycles}"
            )
        batch_size = batch["image"].shape[1] * sum_over(axis_name, 1)
        if batch_size < 2:
            raise ValueError(f"the batch size must be at least 2, got {batch_size}")
        metrics: Metrics = {}
        if update_student:
            state, metrics = student_update(state, batch["image"][0], jax.random.fold_in(key, 0))
        critic_metrics: Metrics = {}
        for i in range(cycles):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], batch)
            state, critic_metrics = critic_update(state, one, jax.random.fold_in(key, i + 1))
        return state, {**metrics, **critic_metrics}

    return Algorithm(init, step)


def _expand(sigma: Array, x: Array) -> Array:
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def _weight_metrics(weight: Array, axis_name: str | None) -> Metrics:
    smallest, largest = weight.min(), weight.max()
    if axis_name is not None:
        smallest, largest = jax.lax.pmin(smallest, axis_name), jax.lax.pmax(largest, axis_name)
    return {
        "weight_min": smallest,
        "weight_max": largest,
        "effective_sample_size": effective_sample_size(weight, axis_name),
    }
