"""The losses of distribution-matching distillation, as functions of network outputs.

Means over the batch are over the examples that are given; across devices the gradients of such means are averaged by
the caller, which is exact for equal shares.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.core.arguments import check_choice, check_range
from poise.core.arrays import at_least_float32, expand_like


def _event_axes(x: Array) -> tuple[int, ...]:
    return tuple(range(1, x.ndim))


def _same_shape(**arrays: Array) -> None:
    shapes = {name: jnp.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{' and '.join(shapes)} must have one shape, got {shown}")


def _per_example(name: str, values: Array, x: Array) -> None:
    if jnp.shape(values) != jnp.shape(x)[:1]:
        raise ValueError(f"{name} must have shape {jnp.shape(x)[:1]}, one value per example, got {jnp.shape(values)}")


def guided(
    x0_cond: Float[Array, "*shape"], x0_uncond: Float[Array, "*shape"], scale: float | int | Float[Array, ""]
) -> Float[Array, "*shape"]:
    r"""Classifier-free guidance of clean-image predictions, $D + (s-1)(D - D_\varnothing)$.

    Args:
      x0_cond: the prediction with labels.
      x0_uncond: the prediction without.
      scale: $s$; 1 gives ``x0_cond`` exactly, 0 the unconditional prediction.

    Returns:
      The guided prediction.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import guided
      >>> guided(jnp.array([1.0]), jnp.array([0.5]), 3.0).tolist()
      [2.0]

    References:
      Ho, Salimans, "Classifier-Free Diffusion Guidance", https://arxiv.org/abs/2207.12598, whose $w$ is $s - 1$.
    """
    _same_shape(x0_cond=x0_cond, x0_uncond=x0_uncond)
    return x0_cond + (jnp.asarray(scale, x0_cond.dtype) - 1) * (x0_cond - x0_uncond)


def matching_gradient(
    x: Float[Array, "batch *event"],
    x0_real: Float[Array, "batch *event"],
    x0_fake: Float[Array, "batch *event"],
    weight: Float[Array, " batch"] | None = None,
    eps: float | int = 1e-6,
    nan_to_num: bool | None = None,
    normalizer: Float[Array, " batch"] | None = None,
) -> Float[Array, "batch *event"]:
    r"""The gradient of distribution matching with respect to the student's images, weighted per example.

    $$g_i = h_i \frac{D_\mathrm{fake}(x_{t,i}) - D_\mathrm{real}(x_{t,i})}
    {\mathrm{mean}\,|x_i - D_\mathrm{real}(x_{t,i})| + \epsilon}$$

    With $h = 1$ this is DMD's reverse-KL direction; weights $h = r^2 f''(r)$ make it that of any f-divergence.

    Args:
      x: the student's clean images.
      x0_real: the teacher's prediction at the noised images.
      x0_fake: the fake score's prediction at the same noised images.
      weight: $h$, one per example; None for 1.
      eps: added to the mean absolute difference; FastGen has 1e-6, DMD2 has 0.
      nan_to_num: whether infinities and NaN become finite, as DMD2 does; by default only for ``eps=0``.
      normalizer: what each example's difference is divided by; None for the mean absolute difference and ``eps``. With
        $\sigma^2$ it is the difference of the two scores, and $g$ the gradient of the f-divergence itself.

    Returns:
      $g$, a constant (no gradient passes to anything), in float32 for narrower images.

    Raises:
      ValueError: if shapes differ or ``eps`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import matching_gradient
      >>> x, real, fake = jnp.array([[1.0, 3.0]]), jnp.array([[0.0, 2.0]]), jnp.array([[2.0, 2.0]])
      >>> matching_gradient(x, real, fake, eps=0).tolist()
      [[2.0, 0.0]]

    References:
      Xu, Nie, Vahdat, https://arxiv.org/abs/2502.15681; Yin et al., DMD2, https://arxiv.org/abs/2405.14867 and
      tianweiy/DMD2. DMD's paper has one more factor $\alpha_t$, which is 1 for EDM.
    """
    _same_shape(x=x, x0_real=x0_real, x0_fake=x0_fake)
    check_range("eps", eps, low=0.0)
    x, x0_real, x0_fake = (jax.lax.stop_gradient(at_least_float32(a)) for a in (x, x0_real, x0_fake))
    if normalizer is None:
        factor = 1.0 / (jnp.mean(jnp.abs(x - x0_real), axis=_event_axes(x)) + eps)
    else:
        _per_example("normalizer", normalizer, x)
        factor = 1.0 / jax.lax.stop_gradient(normalizer.astype(x.dtype))
    if weight is not None:
        _per_example("weight", weight, x)
        factor = factor * jax.lax.stop_gradient(at_least_float32(weight)).astype(factor.dtype)
    gradient = (x0_fake - x0_real) * expand_like(factor, x)
    if nan_to_num or (nan_to_num is None and eps == 0):
        gradient = jnp.nan_to_num(gradient)
    return gradient


def surrogate_loss(x: Float[Array, "batch *event"], grad: Float[Array, "batch *event"]) -> Float[Array, ""]:
    r"""A scalar whose gradient with respect to ``x`` is exactly ``grad / x.size``.

    Its value is $\frac12 \mathrm{mean}(g^2)$, that of $\frac12\mathrm{mean}((x - \mathrm{sg}(x - g))^2)$, which it
    equals but for the rounding of $x - g$.

    Args:
      x: the student's images.
      grad: the gradient wanted, up to the mean over batch and event.

    Returns:
      The loss.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.fdistill import surrogate_loss
      >>> jax.grad(surrogate_loss)(jnp.array([[5.0, 6.0]]), jnp.array([[2.0, -4.0]])).tolist()
      [[1.0, -2.0]]

    References:
      Yin et al., DMD, https://arxiv.org/abs/2311.18828
    """
    _same_shape(x=x, grad=grad)
    grad = jax.lax.stop_gradient(at_least_float32(grad))
    x = at_least_float32(x)
    return 0.5 * jnp.mean((x - jax.lax.stop_gradient(x) + grad) ** 2)


def fake_score_loss(
    x0_pred: Float[Array, "batch *event"],
    x0: Float[Array, "batch *event"],
    sigma: Float[Array, " batch"],
    sigma_data: float | int = 0.5,
    weighting: str = "edm",
) -> Float[Array, ""]:
    r"""Denoising loss of the fake score on the student's images, $\mathrm{mean}\; w(\sigma)(D(x+\sigma n) - x)^2$.

    Args:
      x0_pred: the fake score's prediction.
      x0: the student's clean images; no gradient passes to them.
      sigma: noise levels.
      sigma_data: standard deviation $\sigma_d$ of the data.
      weighting: ``"edm"`` for $w = 1/\sigma^2 + 1/\sigma_d^2$ (EDM, DMD2), ``"epsilon"`` for $1/\sigma^2$, the mean
        squared error of the predicted noise (DMD2 on Stable Diffusion), or ``"none"`` for 1 (FastGen).

    Returns:
      The loss, a mean over batch and event.

    Raises:
      ValueError: if shapes differ, ``weighting`` is unknown, or ``sigma_data`` isn't positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import fake_score_loss
      >>> float(fake_score_loss(jnp.ones((1, 2)), jnp.zeros((1, 2)), jnp.array([1.0])))
      5.0

    References:
      tianweiy/DMD2, https://arxiv.org/abs/2405.14867
    """
    _same_shape(x0_pred=x0_pred, x0=x0)
    check_choice("weighting", weighting, ("edm", "epsilon", "none"))
    check_range("sigma_data", sigma_data, low=0.0, open_low=True)
    error = (at_least_float32(x0_pred) - jax.lax.stop_gradient(at_least_float32(x0))) ** 2
    if weighting == "none":
        return jnp.mean(error)
    _per_example("sigma", sigma, x0)
    weight = at_least_float32(sigma) ** -2 + (float(sigma_data) ** -2 if weighting == "edm" else 0.0)
    return jnp.mean(expand_like(weight, error) * error)


class GanLosses(NamedTuple):
    """The two sides of the non-saturating logistic GAN loss.

    Attributes:
      discriminator: to be minimised by the discriminator.
      generator: to be minimised by the generator.
    """

    discriminator: Float[Array, ""]
    generator: Float[Array, ""]


def gan_losses(logits_real: Float[Array, "*real"], logits_fake: Float[Array, "*fake"]) -> GanLosses:
    r"""Non-saturating logistic losses, means over examples and heads.

    $L_D = \mathrm{mean}\,\mathrm{softplus}(\ell_\mathrm{fake}) + \mathrm{mean}\,\mathrm{softplus}(-\ell_\mathrm{real})$
    and $L_G = \mathrm{mean}\,\mathrm{softplus}(-\ell_\mathrm{fake})$.

    Args:
      logits_real: logits of data, any shape.
      logits_fake: logits of the student's images.

    Returns:
      Both losses. The caller decides what is differentiated: the discriminator's images carry no gradient for $L_D$.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import gan_losses
      >>> losses = gan_losses(jnp.array([[-8.0]]), jnp.array([[-50.0]]))
      >>> round(float(losses.discriminator), 4), float(losses.generator)
      (8.0003, 50.0)

    References:
      Goodfellow et al., https://arxiv.org/abs/1406.2661; as in tianweiy/DMD2 and NVlabs/FastGen.
    """
    real, fake = at_least_float32(logits_real), at_least_float32(logits_fake)
    return GanLosses(
        discriminator=jnp.mean(jax.nn.softplus(fake)) + jnp.mean(jax.nn.softplus(-real)),
        generator=jnp.mean(jax.nn.softplus(-fake)),
    )


def approx_r1(logits: Float[Array, "*shape"], logits_perturbed: Float[Array, "*shape"]) -> Float[Array, ""]:
    r"""The R1 penalty by finite differences, $\mathrm{mean}\,(\ell(x) - \ell(x + s n))^2$.

    For small $s$ it is $s^2 E\|\nabla\ell\|^2$.

    Args:
      logits: logits of real images.
      logits_perturbed: logits of the same images with a little noise added.

    Returns:
      The penalty, to be multiplied by its weight.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import approx_r1
      >>> float(approx_r1(jnp.array([[1.0], [2.0]]), jnp.array([[1.0], [4.0]])))
      2.0

    References:
      Lin et al., "Diffusion Adversarial Post-Training", https://arxiv.org/abs/2501.08316; NVlabs/FastGen.
    """
    _same_shape(logits=logits, logits_perturbed=logits_perturbed)
    return jnp.mean((at_least_float32(logits) - at_least_float32(logits_perturbed)) ** 2)
