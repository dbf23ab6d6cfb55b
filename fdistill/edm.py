"""EDM's training: loss weights, losses, and noise levels, drawn or on a grid."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from poise.core import mean_over
from poise.core.arguments import check_choice, check_range, is_concrete
from poise.core.arrays import at_least_float32, expand_like
from poise.nets import EDMCoefficients, edm_coefficients

__all__ = [
    "EDMCoefficients",
    "edm2_loss",
    "edm_coefficients",
    "edm_loss",
    "estimate_sigma_data",
    "karras_levels",
    "karras_sigmas",
    "loss_weight",
    "sample_karras_sigma",
    "sample_sigma",
    "sample_ve_sigma",
    "sample_vp_sigma",
]

WEIGHTINGS = ("edm", "inverse_variance")


def loss_weight(sigma: Float[Array, "*shape"], sigma_data: float | int = 0.5) -> Float[Array, "*shape"]:
    r"""EDM's weight $\lambda(\sigma) = (\sigma^2 + \sigma_d^2)/(\sigma\sigma_d)^2$ of the squared denoising error.

    It is $1/c_\mathrm{out}^2$, so that every noise level has the same loss for an untrained network.

    Args:
      sigma: noise levels, positive.
      sigma_data: the data's standard deviation $\sigma_d$.

    Returns:
      The weights, in float32 at least.

    Raises:
      ValueError: if a concrete level or ``sigma_data`` isn't positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import loss_weight
      >>> loss_weight(jnp.array([0.5, 1.0])).tolist()
      [8.0, 5.0]

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    check_range("sigma", sigma, low=0.0, open_low=True)
    check_range("sigma_data", sigma_data, low=0.0, open_low=True)
    sigma = at_least_float32(sigma)
    return 1.0 / sigma**2 + 1.0 / sigma_data**2


def _noised(images: Array, sigma: Array, noise: Array) -> tuple[Array, Array]:
    if jnp.shape(noise) != jnp.shape(images):
        raise ValueError(f"noise must have the images' shape {jnp.shape(images)}, got {jnp.shape(noise)}")
    if jnp.shape(sigma) != jnp.shape(images)[:1]:
        raise ValueError(f"sigma must have shape {jnp.shape(images)[:1]}, one level per image, got {jnp.shape(sigma)}")
    images, noise = at_least_float32(images), at_least_float32(noise)
    return images, images + expand_like(at_least_float32(sigma), images) * noise


def edm_loss(
    denoise: Callable[[Array, Array], Array],
    images: Float[Array, "batch *event"],
    sigma: Float[Array, " batch"],
    noise: Float[Array, "batch *event"],
    sigma_data: float | int = 0.5,
    weighting: str = "edm",
) -> Float[Array, "batch *event"]:
    r"""The unreduced denoising loss $\lambda(\sigma)\,(D(y + \sigma n; \sigma) - y)^2$.

    EDM's training loss is its sum over the event and mean over the batch.

    Args:
      denoise: $D$, called with noised images (in float32 at least) and levels ``[batch]``, gives clean images.
      images: $y$.
      sigma: one noise level per image, from :func:`sample_sigma`, :func:`sample_vp_sigma` or
        :func:`sample_ve_sigma`.
      noise: $n$, standard normal.
      sigma_data: the data's standard deviation.
      weighting: ``"edm"`` for :func:`loss_weight`, or ``"inverse_variance"`` for $1/\sigma^2$, which is the loss of the
        VP and VE formulations.

    Returns:
      The loss of every element, in float32 at least.

    Raises:
      ValueError: if shapes don't fit, a concrete level isn't positive, or ``weighting`` is unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import edm_loss
      >>> images, noise = jnp.zeros((1, 2)), jnp.array([[1.0, -2.0]])
      >>> edm_loss(lambda x, sigma: x, images, jnp.array([0.5]), noise).tolist()
      [[2.0, 8.0]]

    References:
      Karras et al., https://arxiv.org/abs/2206.00364; NVlabs/edm
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    images, noised = _noised(images, sigma, noise)
    if weighting == "edm":
        weight = loss_weight(sigma, sigma_data)
    else:
        check_range("sigma", sigma, low=0.0, open_low=True)
        weight = at_least_float32(sigma) ** -2
    error = at_least_float32(denoise(noised, sigma)) - images
    return expand_like(weight, images) * error**2


def edm2_loss(
    denoise: Callable[[Array, Array], tuple[Array, Array]],
    images: Float[Array, "batch *event"],
    sigma: Float[Array, " batch"],
    noise: Float[Array, "batch *event"],
    sigma_data: float | int = 0.5,
) -> Float[Array, "batch *event"]:
    r"""EDM2's unreduced loss with a learned uncertainty, $\lambda(\sigma) e^{-u(\sigma)} (D - y)^2 + u(\sigma)$.

    At its minimum over $u$, $e^{u(\sigma)}$ is the mean weighted error of the level, so levels contribute alike.

    Args:
      denoise: called with noised images and levels ``[batch]``; gives clean images and $u$ ``[batch]``.
      images: $y$.
      sigma: one noise level per image; EDM2 draws $\ln\sigma$ with mean -0.4 and standard deviation 1.
      noise: $n$, standard normal.
      sigma_data: the data's standard deviation.

    Returns:
      The loss of every element, in float32 at least.

    Raises:
      ValueError: if shapes don't fit or a concrete level isn't positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import edm2_loss
      >>> images, noise = jnp.zeros((1, 2)), jnp.array([[1.0, -2.0]])
      >>> loss = edm2_loss(lambda x, sigma: (x, jnp.log(2.0) + 0 * sigma), images, jnp.array([0.5]), noise)
      >>> [round(x, 3) for x in loss[0].tolist()]
      [1.693, 4.693]

    References:
      Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models",
      https://arxiv.org/abs/2312.02696; NVlabs/edm2
    """
    images, noised = _noised(images, sigma, noise)
    denoised, u = denoise(noised, sigma)
    if jnp.shape(u) != jnp.shape(sigma):
        raise ValueError(f"denoise must give an uncertainty of shape {jnp.shape(sigma)}, got {jnp.shape(u)}")
    u = at_least_float32(u)
    error = at_least_float32(denoised) - images
    weight = loss_weight(sigma, sigma_data) * jnp.exp(-u)
    return expand_like(weight, images) * error**2 + expand_like(u, images)


def sample_sigma(
    key: PRNGKeyArray,
    shape: tuple[int, ...] = (),
    p_mean: float | int = -1.2,
    p_std: float | int = 1.2,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    r"""Draws EDM's training levels, $\ln\sigma \sim N(P_\mathrm{mean}, P_\mathrm{std}^2)$.

    Args:
      key: a random key.
      shape: the shape wanted.
      p_mean: mean of $\ln\sigma$; EDM2 has -0.4.
      p_std: its standard deviation; EDM2 has 1.0.
      dtype: the type wanted.

    Returns:
      Positive levels.

    Raises:
      ValueError: if ``p_std`` is negative.

    Example:
      >>> import jax
      >>> from poise.fdistill import sample_sigma
      >>> sample_sigma(jax.random.key(0), (4,)).shape
      (4,)

    References:
      Karras et al., https://arxiv.org/abs/2206.00364
    """
    check_range("p_std", p_std, low=0.0)
    return jnp.exp(p_mean + p_std * jax.random.normal(key, shape, dtype))


def sample_vp_sigma(
    key: PRNGKeyArray,
    shape: tuple[int, ...] = (),
    beta_d: float | int = 19.9,
    beta_min: float | int = 0.1,
    epsilon_t: float = 1e-5,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    r"""Draws the VP formulation's levels, $\sigma(t) = \sqrt{e^{\beta_d t^2/2 + \beta_\min t} - 1}$, uniform $t$.

    Args:
      key: a random key.
      shape: the shape wanted.
      beta_d: slope of the noise schedule.
      beta_min: the schedule at time 0.
      epsilon_t: the earliest time; $t \in (\epsilon_t, 1]$.
      dtype: the type wanted.

    Returns:
      Positive levels.

    Example:
      >>> import jax
      >>> from poise.fdistill import sample_vp_sigma
      >>> bool((sample_vp_sigma(jax.random.key(0), (4,)) > 0).all())
      True

    References:
      Song et al., https://arxiv.org/abs/2011.13456; as in Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    check_range("epsilon_t", epsilon_t, low=0.0, high=1.0, open_low=True, open_high=True)
    t = 1.0 + jax.random.uniform(key, shape, dtype) * (epsilon_t - 1.0)
    return jnp.sqrt(jnp.expm1(0.5 * beta_d * t**2 + beta_min * t))


def sample_ve_sigma(
    key: PRNGKeyArray,
    shape: tuple[int, ...] = (),
    sigma_min: float | int = 0.02,
    sigma_max: float | int = 100.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    r"""Draws the VE formulation's levels: $\ln\sigma$ uniform between the ends.

    Args:
      key: a random key.
      shape: the shape wanted.
      sigma_min: the lowest level.
      sigma_max: the highest.
      dtype: the type wanted.

    Returns:
      Positive levels.

    Raises:
      ValueError: if the ends aren't ``0 < sigma_min < sigma_max``.

    Example:
      >>> import jax
      >>> from poise.fdistill import sample_ve_sigma
      >>> sample_ve_sigma(jax.random.key(0), (4,)).shape
      (4,)

    References:
      Song et al., https://arxiv.org/abs/2011.13456; as in Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    _check_ends(sigma_min, sigma_max)
    return sigma_min * (sigma_max / sigma_min) ** jax.random.uniform(key, shape, dtype)


def _check_ends(sigma_min, sigma_max) -> None:
    check_range("sigma_min", sigma_min, low=0.0, open_low=True)
    if is_concrete(sigma_min):
        check_range("sigma_max", sigma_max, low=float(sigma_min), high=np.inf, open_low=True, open_high=True)


def karras_sigmas(
    num: int,
    sigma_min: float | int | Float[Array, ""] = 0.002,
    sigma_max: float | int | Float[Array, ""] = 80.0,
    rho: float | int = 7.0,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, " {num}"]:
    r"""Descending levels, evenly spaced in $\sigma^{1/\rho}$.

    $$\sigma_i = \Big(\sigma_\max^{1/\rho} + \tfrac{i}{n-1}(\sigma_\min^{1/\rho} - \sigma_\max^{1/\rho})\Big)^\rho$$

    The final 0 of a sampler's schedule isn't among them; :func:`heun_sampler` goes there from the last level.

    Args:
      num: $n$, how many levels, at least 2.
      sigma_min: the last level.
      sigma_max: the first.
      rho: the curvature; 1 is linear.
      dtype: the type wanted; by default jax's default float.

    Returns:
      The levels, from ``sigma_max`` down to ``sigma_min``. Concrete ends are evaluated in float64 and then rounded.

    Raises:
      ValueError: if ``num`` is below 2, the ends aren't ``0 < sigma_min < sigma_max``, or ``rho`` isn't positive.

    Example:
      >>> from poise.fdistill import karras_sigmas
      >>> [round(x, 3) for x in karras_sigmas(4).tolist()]
      [80.0, 9.723, 0.47, 0.002]

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, equation 5
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    _check_ends(sigma_min, sigma_max)
    check_range("rho", rho, low=0.0, open_low=True)
    dtype = jnp.result_type(float) if dtype is None else dtype
    if is_concrete(sigma_min) and is_concrete(sigma_max) and is_concrete(rho):
        low, high = (float(x) ** (1.0 / float(rho)) for x in (sigma_min, sigma_max))
        sigmas = (high + np.arange(num) / (num - 1) * (low - high)) ** float(rho)
        sigmas[0], sigmas[-1] = float(sigma_max), float(sigma_min)
        return jnp.asarray(sigmas, dtype)
    low, high = (jnp.asarray(x, dtype) ** (1.0 / rho) for x in (sigma_min, sigma_max))
    return (high + jnp.arange(num, dtype=dtype) / (num - 1) * (low - high)) ** rho


def karras_levels(
    num_levels: int = 1000,
    sigma_min: float | int | Float[Array, ""] = 0.002,
    sigma_max: float | int | Float[Array, ""] = 80.0,
    rho: float | int = 7.0,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, " {num_levels}"]:
    r"""The Karras grid ascending, from which distillation draws its levels by index.

    Args:
      num_levels: how many levels.
      sigma_min: the first level.
      sigma_max: the last.
      rho: the curvature.
      dtype: the type wanted; by default jax's default float.

    Returns:
      The levels of :func:`karras_sigmas` in ascending order.

    Raises:
      ValueError: as :func:`karras_sigmas`.

    Example:
      >>> from poise.fdistill import karras_levels
      >>> [round(x, 3) for x in karras_levels(4).tolist()]
      [0.002, 0.47, 9.723, 80.0]

    References:
      tianweiy/DMD2, https://arxiv.org/abs/2405.14867
    """
    return karras_sigmas(num_levels, sigma_min, sigma_max, rho, dtype)[::-1]


def sample_karras_sigma(
    key: PRNGKeyArray,
    shape: tuple[int, ...] = (),
    sigma_min: float | int = 0.002,
    sigma_max: float | int = 80.0,
    rho: float | int = 7.0,
    *,
    num_levels: int = 1000,
    min_level: int = 0,
    max_level: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "..."]:
    r"""Draws levels of :func:`karras_levels` with indices uniform from ``min_level`` to ``max_level``, both included.

    DMD2 draws from 20 to 980 of 1000 for the student and from all for the critics; FastGen from 2 to 998.

    Args:
      key: a random key.
      shape: the shape wanted.
      sigma_min: the grid's lowest level.
      sigma_max: the grid's highest.
      rho: the grid's curvature.
      num_levels: the grid's size.
      min_level: the lowest index drawn.
      max_level: the highest index drawn; by default the grid's last.
      dtype: the type wanted; by default jax's default float.

    Returns:
      Levels that lie on the grid.

    Raises:
      ValueError: unless ``0 <= min_level <= max_level < num_levels``, and as :func:`karras_sigmas`.

    Example:
      >>> import jax
      >>> from poise.fdistill import sample_karras_sigma
      >>> sample_karras_sigma(jax.random.key(0), (3,), min_level=999).tolist()
      [80.0, 80.0, 80.0]

    References:
      tianweiy/DMD2, https://arxiv.org/abs/2405.14867; NVlabs/FastGen
    """
    max_level = num_levels - 1 if max_level is None else max_level
    if not 0 <= min_level <= max_level < num_levels:
        raise ValueError(
            f"min_level and max_level must satisfy 0 <= min_level <= max_level < {num_levels}, "
            f"got {min_level} and {max_level}"
        )
    grid = karras_levels(num_levels, sigma_min, sigma_max, rho, dtype)
    return grid[jax.random.randint(key, shape, min_level, max_level + 1)]


def estimate_sigma_data(
    images: Float[Array, "batch *event"], center: bool = True, axis_name: str | None = None
) -> Float[Array, ""]:
    r"""The standard deviation $\sigma_d$ over all elements of a batch, the scale that the preconditioning wants.

    Args:
      images: data, any event shape.
      center: whether the mean of all elements is taken out, as EDM's 0.5 for images in [-1, 1] does; without it the
        root mean square.
      axis_name: the mapped device axis over which the batch is spread, or None.

    Returns:
      $\sigma_d$, in float32 at least.

    Raises:
      ValueError: if there are no elements.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.fdistill import estimate_sigma_data
      >>> float(estimate_sigma_data(jnp.array([[0.0, 4.0], [4.0, 0.0]])))
      2.0

    References:
      Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    if images.size == 0:
        raise ValueError(f"images must have elements, got shape {images.shape}")
    images = at_least_float32(images)
    mean = mean_over(axis_name, jnp.mean(images)) if center else 0.0
    return jnp.sqrt(mean_over(axis_name, jnp.mean((images - mean) ** 2)))
