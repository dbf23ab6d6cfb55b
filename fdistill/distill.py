"""f-distill: one-step generation by matching noised distributions in an f-divergence."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray, PyTree

from poise.core import Algorithm, Batch, Metrics, Microbatched, sum_over
from poise.fdistill.critics import critic_updates
from poise.fdistill.distill_config import FDistillConfig
from poise.fdistill.distill_state import FDistillState, Optimizers
from poise.fdistill.networks import Distance, Networks
from poise.fdistill.oracles import Oracles
from poise.fdistill.ratio import init_ratio_bins
from poise.fdistill.student import student_update


def f_distill(
    net: nn.Module | Microbatched,
    head: nn.Module,
    config: FDistillConfig,
    optimizers: Optimizers,
    *,
    teacher: PyTree | None = None,
    start: FDistillState | None = None,
    student_net: nn.Module | Microbatched | None = None,
    feature_levels: tuple[int, ...] = (-1,),
    update_student: bool = True,
    distance: Distance | None = None,
    oracles: Oracles | None = None,
    axis_name: str | None = None,
) -> Algorithm:
    r"""Distils a denoiser into a one-step generator, as an :class:`poise.core.Algorithm`.

    One step is a whole cycle: an update of the student, then ``config.fake_updates`` updates of its critics.

    *Student.* With $x = G_\theta(z)$ and $x_t = x + \sigma\epsilon$, the head gives the log density ratio
    $\ell = \log p_t(x_t) - \log q_t(x_t)$, whose mean ratio is set to 1 in each bin of noise levels, and the
    f-divergence turns it into a weight $h(e^\ell)$ of mean 1. The student follows

    $$g = h \, \frac{D_\mathrm{fake}(x_t) - D_\mathrm{teacher}(x_t)}{\mathrm{mean}|x - D_\mathrm{teacher}(x_t)|}$$

    plus ``gan_weight`` times the non-saturating adversarial gradient. Reverse-KL has $h = 1$: that is DMD2.

    *Critics.* The fake score, a denoiser that starts as the teacher's copy, is fitted to samples of the student; the
    head learns to tell real from generated images at random noise levels, from the frozen teacher's features, from the
    fake score's (which it may train, too), or from the noised images themselves: ``config.head_features``.

    Every draw of example ``i`` depends on the step's key and ``i`` alone, and every mean over the batch is one over the
    global batch, so the numbers do not depend on the number of devices. Networks run without dropout. The ratio, the
    weight and the normalisation are computed in float32 at least, whatever the network's precision.

    Args:
      net: the denoiser of teacher, student and fake score; with ``feature_levels=...`` it must return
        ``(D, features)`` and with ``features_only=True`` the features, as :class:`poise.nets.EDMPrecond` does, unless
        the head has features of its own. Its ``label_dim`` says how many classes there are; the student's labels are
        uniform over them. A :class:`poise.core.Microbatched` one takes its batches part by part.
      head: gives logits ``[B, K]`` from ``(features, sigma, labels)``, one for each of ``feature_levels`` or as many as
        it likes; their mean over K is the log ratio. With ``head_features="own"`` the features are the noised images.
      config: the settings.
      optimizers: for student, fake score and head. Clipping and schedules go in here. With ``train_features`` the
        second one moves ``{"fake": ..., "head": ...}``.
      teacher: the teacher's variables, unless ``start`` is given.
      start: a state to begin from, such as one whose critics are warmed up; its student is kept.
      student_net: a network for the student instead of a copy of the teacher, called alike; it starts from its own
        initialization.
      feature_levels: the resolutions whose last encoder block feeds the head, 0 the finest, -1 the coarsest.
      update_student: False trains the critics alone: the warm-up that makes the first ratios meaningful.
      distance: of the regression loss, ``(x, target) -> [B]``, such as a perceptual one; by default the mean squared
        error.
      oracles: what is known exactly and needn't be learned.
      axis_name: the axis of an enclosing ``pmap`` or ``shard_map``.

    Returns:
      An algorithm with state :class:`FDistillState`. A batch is a dict of ``image`` ``[fake_updates, B, H, W, C]`` and,
      for a conditional network, ``label`` ``[fake_updates, B]``. With a regression loss it also holds the teacher's
      ``target`` ``[n, B, H, W, C]`` for ``latents`` of the same shape (unit normal; ``target`` is what an ODE sampler
      makes of them) and, for a conditional network, ``target_label`` ``[n, B]``; the first of the n is used, so that
      all arrays are split over devices along one axis. Metrics of the critics (of the cycle's last update):
      ``fake_loss``, ``discriminator_loss``, ``logit_real``, ``logit_fake``, gradient norms; of the student:
      ``matching_norm`` (the mean size of the matching gradient), ``generator_loss``, ``regression_loss``,
      ``weight_min``, ``weight_max``, ``effective_sample_size`` (of the global batch), ``ratio_bin_<i>`` (mean ratio
      before normalisation, 1 for a perfect head), gradient norm.

    Raises:
      ValueError: if not exactly one of ``teacher`` and ``start`` is given, a head must be trained without optimizer, an
        oracle stands for the fake score whose features the head would see, guidance or labels don't fit the network, or
        a batch lacks something, has fewer than 2 examples (the weights' mean would make each weight 1, whatever the
        divergence) or not ``fake_updates`` of them.

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
      1; the defaults here are bins of equal probability with a running mean, and DMD2's weight.
      :func:`poise.fdistill.preset` has the settings of both codes.
    """
    if (teacher is None) == (start is None):
        raise ValueError(
            "exactly one of teacher and start must be given, got " + ("neither" if start is None else "both")
        )
    oracles = Oracles() if oracles is None else oracles
    networks = Networks(net, head, config, optimizers, feature_levels, axis_name, student_net, oracles, distance)
    if oracles.fake is not None and config.head_features == "fake":
        raise ValueError("head_features must not be 'fake' when an oracle stands for the fake score")
    if networks.learns_ratio and not networks.joint and optimizers.head is None:
        raise ValueError("optimizers must have one for the head, which is trained on its own here, got None")
    if config.guidance_scale != 1.0 and not networks.label_dim:
        raise ValueError(f"guidance_scale must be 1 for a network without classes, got {config.guidance_scale}")

    def init(key: PRNGKeyArray, batch: Batch) -> FDistillState:
        if start is not None:
            return start
        assert teacher is not None
        variables = dict(teacher)
        params = variables["params"]
        frozen = {"teacher": variables}
        image, labels = batch["image"][0, :1], batch.get("label")
        labels = None if labels is None else labels[0, :1]
        sigma = jnp.ones((1,), image.dtype)
        student = params
        if student_net is not None:
            made = dict(student_net.init(jax.random.fold_in(key, 1), image, sigma, labels))
            student = made.pop("params")
            frozen["student"] = made
        state = FDistillState(
            frozen=frozen,
            student=student,
            student_opt=optimizers.student.init(student),
            fake=params,
            fake_opt=(),
            head=(),
            head_opt=(),
            bins=init_ratio_bins(config.num_bins),
            ema=tuple(student for _ in config.ema_decays),
            step=jnp.zeros((), jnp.int32),
        )
        head_params = head.init(key, networks.features(state, params, image, sigma, labels), sigma, labels)["params"]
        if networks.joint:
            return state._replace(
                head=head_params, fake_opt=optimizers.fake.init({"fake": params, "head": head_params})
            )
        head_opt = () if optimizers.head is None else optimizers.head.init(head_params)
        return state._replace(head=head_params, fake_opt=optimizers.fake.init(params), head_opt=head_opt)

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
        generated = None
        if update_student:
            if config.regression_weight > 0:
                _check_pairs(batch, bool(networks.label_dim))
            state, metrics, generated = student_update(networks, state, batch, jax.random.fold_in(key, 0))
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(1, config.fake_updates + 1))
        reused = generated if config.critics_on_student_step else None
        state, critic_metrics = critic_updates(networks, state, batch, keys, reused)
        return state, {**metrics, **critic_metrics}

    return Algorithm(init, step)


def _check_pairs(batch: Batch, conditional: bool) -> None:
    missing = [name for name in ("latents", "target") if name not in batch]
    if missing or conditional != (batch.get("target_label") is not None):
        raise ValueError(
            "batch must hold 'latents' and 'target' for the regression loss and 'target_label' if and only if the "
            f"network has classes, got {sorted(batch)}"
        )
    shape, image = batch["latents"].shape, batch["image"].shape
    if batch["target"].shape != shape or len(shape) != len(image) or shape[2:] != image[2:]:
        raise ValueError(
            f"latents and target must have one shape [n, B, ...] with images of shape {image[2:]}, "
            f"got {shape} and {batch['target'].shape}"
        )
