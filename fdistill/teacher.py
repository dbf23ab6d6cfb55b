"""Training of a diffusion teacher by denoising score matching (EDM)."""

from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from poise.core import Algorithm, Batch, Metrics, Microbatched, fold_in_examples, mean_over, sum_over
from poise.fdistill.edm import edm_loss, sample_sigma
from poise.fdistill.ema import ema_decay, update_ema


class TeacherState(NamedTuple):
    """Everything that changes while a teacher is trained.

    Attributes:
      params: the parameters that the optimizer moves.
      opt_state: the optimizer's state.
      ema: the average of the parameters that sampling uses.
      constants: the network's other variables (fixed Fourier frequencies); empty for most networks.
      step: the number of finished updates.
    """

    params: PyTree
    opt_state: PyTree
    ema: PyTree
    constants: PyTree
    step: Int[Array, ""]


def teacher_variables(state: TeacherState) -> dict[str, Any]:
    """The variables that a finished teacher is used with: averaged parameters and constants.

    Args:
      state: a state of :func:`edm_teacher`.

    Returns:
      Variables for ``net.apply``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import TeacherState, teacher_variables
      >>> state = TeacherState(params={"w": 1.0}, opt_state=(), ema={"w": 2.0}, constants={}, step=jnp.array(1))
      >>> teacher_variables(state)
      {'params': {'w': 2.0}}
    """
    return {**state.constants, "params": state.ema}


def edm_teacher(
    net: nn.Module | Microbatched,
    optimizer: optax.GradientTransformation,
    *,
    sigma_data: float = 0.5,
    p_mean: float = -1.2,
    p_std: float = 1.2,
    ema_halflife: float = 500_000.0,
    ema_rampup: float | None = 0.05,
    axis_name: str | None = None,
) -> Algorithm:
    r"""Trains a denoiser $D(x, \sigma)$ by the EDM loss, as an :class:`poise.core.Algorithm`.

    With $\ln\sigma \sim N(P_\mathrm{mean}, P_\mathrm{std}^2)$ and $n \sim N(0, I)$, each step lowers

    $$\frac1B \sum_i \frac{\sigma_i^2 + \sigma_d^2}{(\sigma_i \sigma_d)^2}
      \|D(y_i + \sigma_i n_i, \sigma_i) - y_i\|^2 ,$$

    summed over the event dimensions, and keeps an average of the parameters with a half-life counted in images.
    Noise levels and noise of example ``i`` depend only on the step's key and ``i``, so that the same numbers come out
    on any number of devices; a network's dropout is exempt from that.

    Args:
      net: a denoiser such as :class:`poise.nets.EDMPrecond`: ``net.apply(variables, x, sigma, labels, train=True)``
        gives an estimate of the clean images.
      optimizer: an optax transformation.
      sigma_data: the data's standard deviation $\sigma_d$.
      p_mean: mean of $\ln\sigma$.
      p_std: standard deviation of $\ln\sigma$.
      ema_halflife: half-life of the average, in images.
      ema_rampup: the half-life never exceeds this share of the images seen; None for no ramp-up.
      axis_name: the axis of an enclosing ``pmap`` or ``shard_map``.

    Returns:
      An algorithm with state :class:`TeacherState`. A batch is a dict of ``image`` ``[B, H, W, C]`` and, for a
      conditional network, ``label`` ``[B]`` (integers) or ``[B, classes]``. The metrics are ``loss`` (the objective
      divided by the number of event dimensions), ``grad_norm`` and ``ema_decay``.

    Raises:
      ValueError: if ``sigma_data``, ``p_std`` or ``ema_halflife`` is not positive.

    Example:
      >>> import jax, optax
      >>> from poise.fdistill import edm_teacher
      >>> from poise.nets import EDMPrecond, SongUNet
      >>> unet = SongUNet(8, 1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=())
      >>> teacher = edm_teacher(EDMPrecond(unet), optax.adam(1e-3))
      >>> batch = {"image": jax.numpy.zeros((2, 8, 8, 1))}
      >>> state = jax.eval_shape(teacher.init, jax.random.key(0), batch)
      >>> state, metrics = jax.eval_shape(teacher.step, state, batch, jax.random.key(1))  # jax.jit computes it
      >>> sorted(metrics)
      ['ema_decay', 'grad_norm', 'loss']

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364.
    """
    for name, value in (("sigma_data", sigma_data), ("p_std", p_std), ("ema_halflife", ema_halflife)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")

    def init(key: PRNGKeyArray, batch: Batch) -> TeacherState:
        image = batch["image"]
        variables = dict(net.init(key, image[:1], jnp.ones((1,), image.dtype), _first(batch.get("label"))))
        params = variables.pop("params")
        return TeacherState(params, optimizer.init(params), params, variables, jnp.zeros((), jnp.int32))

    def step(state: TeacherState, batch: Batch, key: PRNGKeyArray) -> tuple[TeacherState, Metrics]:
        image, label = batch["image"], batch.get("label")
        noise_key, dropout_key = jax.random.split(key)

        def draw(example_key):
            level_key, pixel_key = jax.random.split(example_key)
            return (
                sample_sigma(level_key, (), p_mean, p_std, dtype=image.dtype),
                jax.random.normal(pixel_key, image.shape[1:], image.dtype),
            )

        sigma, noise = jax.vmap(draw)(fold_in_examples(noise_key, image.shape[0], axis_name))

        def objective(params):
            def denoise(x, levels):
                variables = {**state.constants, "params": params}
                rngs = {"dropout": dropout_key, "label_dropout": jax.random.fold_in(dropout_key, 1)}
                return cast(Any, net).apply(variables, x, levels, label, train=True, rngs=rngs)

            loss = edm_loss(denoise, image, sigma, noise, sigma_data).sum() / image.shape[0]
            return mean_over(axis_name, loss)  # inside, so that shard_map's own sums of gradients come out right

        loss, grads = jax.value_and_grad(objective)(state.params)
        grads = mean_over(axis_name, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        global_batch = image.shape[0] * sum_over(axis_name, 1)
        images_seen = state.step.astype(jnp.float32) * global_batch  # billions, more than an int32 holds
        decay = ema_decay(images_seen, global_batch, ema_halflife, ema_rampup)
        new_state = TeacherState(
            params, opt_state, update_ema(state.ema, params, decay), state.constants, state.step + 1
        )
        metrics = {
            "loss": loss / image[0].size,
            "grad_norm": optax.tree.norm(grads),
            "ema_decay": jnp.asarray(decay, jnp.float32),
        }
        return new_state, metrics

    return Algorithm(init, step)


def _first(label):
    return None if label is None else label[:1]
