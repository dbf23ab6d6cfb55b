"""f-distill: one-step generation by matching noised distributions in an f-divergence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from poise.core import Algorithm, Batch, Metrics, sum_over
from poise.fdistill.critics import critic_updates
from poise.fdistill.distill_config import FDistillConfig
from poise.fdistill.distill_state import FDistillState, Optimizers
from poise.fdistill.networks import Networks
from poise.fdistill.ratio import init_ratio_bins
from poise.fdistill.student import student_update


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
      >>> optimizers = Optimizers(optax.adam(1e-4), optax.adam(1e-4), optax.adam(1e-3))
      >>> def first_step(key, batch):
      ...     teacher = net.init(key, batch["image"][0], jnp.ones(4))  # a trained one, in earnest
      ...     config = FDistillConfig(divergence="jensen_shannon", fake_updates=1)
      ...     algorithm = f_distill(net, RatioHead(), config, optimizers, teacher=teacher)
      ...     return algorithm.step(algorithm.init(key, batch), batch, key)
      >>> batch = {"image": jnp.zeros((1, 4, 8, 8, 1))}
      >>> state, metrics = jax.eval_shape(first_step, jax.random.key(0), batch)  # traced only; jax.jit computes it
      >>> "effective_sample_size" in metrics
      True

    References:
      Xu, Nie, Vahdat, *One-step Diffusion Models with f-Divergence Distribution Matching*,
      https://arxiv.org/abs/2502.15681; Yin et al., *Improved Distribution Matching Distillation for Fast Image
      Synthesis* (DMD2), https://arxiv.org/abs/2405.14867. The authors' released code normalises ratios over bins that
      are linear in sigma, by the batch alone (``bins="linear"``, ``bins_decay=0``), and weighs the fake score's loss by
      1; the defaults here are bins of equal probability with a running mean, and DMD2's weight. Its whole weighting, to
      the last small constant, is :func:`poise.fdistill.fastgen_weight`.
    """
    if (teacher is None) == (start is None):
        raise ValueError(
            "exactly one of teacher and start must be given, got " + ("neither" if start is None else "both")
        )
    networks = Networks(net, head, config, optimizers, feature_levels, axis_name)
    if config.guidance_scale != 1.0 and not networks.label_dim:
        raise ValueError(f"guidance_scale must be 1 for a network without classes, got {config.guidance_scale}")

    def init(key: PRNGKeyArray, batch: Batch) -> FDistillState:
        if start is not None:
            return start
        assert teacher is not None
        variables = dict(teacher)
        params = variables["params"]
        image, labels = batch["image"][0, :1], batch.get("label")
        labels = None if labels is None else labels[0, :1]
        sigma = jnp.ones((1,), image.dtype)
        head_params = head.init(key, networks.features(variables, image, sigma, labels), sigma, labels)["params"]
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

    def step(state: FDistillState, batch: Batch, key: PRNGKeyArray) -> tuple[FDistillState, Metrics]:
        image = batch["image"]
        if image.shape[0] != config.fake_updates:
            raise ValueError(
                f"batch must hold fake_updates = {config.fake_updates} batches on its first axis, got {image.shape[0]}"
            )
        if bool(networks.label_dim) != (batch.get("label") is not None):
            raise ValueError(
                "batch must hold 'label' if and only if the network has classes; the network has "
                f"{networks.label_dim}, the batch holds {sorted(batch)}"
            )
        batch_size = image.shape[1] * sum_over(axis_name, 1)
        if batch_size < 2:
            raise ValueError(f"the batch size must be at least 2, got {batch_size}")
        metrics: Metrics = {}
        if update_student:
            state, metrics = student_update(networks, state, image[0], jax.random.fold_in(key, 0))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(1, config.fake_updates + 1))
        state, critic_metrics = critic_updates(networks, state, batch, keys)
        return state, {**metrics, **critic_metrics}

    return Algorithm(init, step)
