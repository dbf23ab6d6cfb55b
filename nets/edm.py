"""Preconditioning: a network becomes a denoiser whose inputs and outputs have unit size at every noise level."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from poise.core.arrays import at_least_float32
from poise.nets.labels import label_vectors

PRECONDITIONINGS = ("edm", "vp", "ve", "iddpm")


class EDMCoefficients(NamedTuple):
    r"""The four coefficients of $D(x;\sigma) = c_\text{skip}\,x + c_\text{out}\,F(c_\text{in}\,x, c_\text{noise})$.

    Attributes:
      c_skip: of the noisy input.
      c_out: of the network's output.
      c_in: of the network's input.
      c_noise: the network's noise label.
    """

    c_skip: Float[Array, "*batch"]
    c_out: Float[Array, "*batch"]
    c_in: Float[Array, "*batch"]
    c_noise: Float[Array, "*batch"]


def edm_coefficients(
    sigma: Float[Array, "*batch"],
    sigma_data: float | int | Float[Array, ""] = 0.5,
    sigma_min: float | int | Float[Array, ""] = 0,
) -> EDMCoefficients:
    r"""EDM: unit variance of input and training target, and as little amplification of errors as possible.

    $c_\text{skip} = \sigma_d^2/(\sigma^2+\sigma_d^2)$, $c_\text{out} = \sigma\sigma_d/\sqrt{\sigma^2+\sigma_d^2}$,
    $c_\text{in} = 1/\sqrt{\sigma^2+\sigma_d^2}$, $c_\text{noise} = \tfrac14\ln\max(\sigma, \sigma_\text{min})$.

    Args:
      sigma: noise levels of any shape, finite and positive. Zero is allowed with a positive ``sigma_min``; without one
        its noise label is $-\infty$, of which a network makes NaN.
      sigma_data: standard deviation $\sigma_d$ of the data.
      sigma_min: lower bound of the level inside of the logarithm only.

    Returns:
      The coefficients, in at least float32.

    Raises:
      ValueError: if ``sigma_data`` isn't positive or ``sigma_min`` is negative.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import edm_coefficients
      >>> [round(float(c), 4) for c in edm_coefficients(jnp.array(0.5))]
      [0.5, 0.3536, 1.4142, -0.1733]

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364, Table 1
    """
    if not isinstance(sigma_data, jax.core.Tracer) and not sigma_data > 0:
        raise ValueError(f"sigma_data must be positive, got {sigma_data}")
    if not isinstance(sigma_min, jax.core.Tracer) and not sigma_min >= 0:
        raise ValueError(f"sigma_min must be at least 0, got {sigma_min}")
    sigma = at_least_float32(sigma)
    norm = jnp.sqrt(sigma**2 + sigma_data**2)
    return EDMCoefficients(
        c_skip=(sigma_data / norm) ** 2,
        c_out=sigma * sigma_data / norm,
        c_in=1 / norm,
        c_noise=jnp.log(jnp.maximum(sigma, sigma_min)) / 4,
    )


def vp_coefficients(
    sigma: Float[Array, "*batch"], beta_d: float = 19.9, beta_min: float = 0.1, num_levels: int = 1000
) -> EDMCoefficients:
    r"""Variance preserving: the network predicts the noise, and its label is a time on a grid of $M$ steps.

    $c_\text{skip} = 1$, $c_\text{out} = -\sigma$, $c_\text{in} = 1/\sqrt{\sigma^2+1}$,
    $c_\text{noise} = (M-1)\,t(\sigma)$,
    $t = (\sqrt{\beta_\text{min}^2 + 2\beta_d\ln(1+\sigma^2)} - \beta_\text{min})/\beta_d$.

    Args:
      sigma: noise levels of any shape.
      beta_d: slope of the noise schedule.
      beta_min: the schedule at time 0.
      num_levels: $M$.

    Returns:
      The coefficients, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import vp_coefficients
      >>> [round(float(c), 4) for c in vp_coefficients(jnp.array(1.0))]
      [1.0, -1.0, 0.7071, 258.7013]

    References:
      Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*,
      https://arxiv.org/abs/2011.13456; in this form Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    sigma = at_least_float32(sigma)
    time = (jnp.sqrt(beta_min**2 + 2 * beta_d * jnp.log1p(sigma**2)) - beta_min) / beta_d
    return EDMCoefficients(jnp.ones_like(sigma), -sigma, jax.lax.rsqrt(sigma**2 + 1), (num_levels - 1) * time)


def ve_coefficients(sigma: Float[Array, "*batch"], sigma_min: float | int = 0) -> EDMCoefficients:
    r"""Variance exploding: the network predicts the negative noise.

    $c_\text{skip} = 1$, $c_\text{out} = \sigma$, $c_\text{in} = 1$,
    $c_\text{noise} = \ln(\max(\sigma, \sigma_\text{min})/2)$.

    Args:
      sigma: noise levels of any shape, finite and positive; see :func:`edm_coefficients`.
      sigma_min: lower bound of the level inside of the logarithm only.

    Returns:
      The coefficients, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import ve_coefficients
      >>> [float(c) for c in ve_coefficients(jnp.array(2.0))]
      [1.0, 2.0, 1.0, 0.0]

    References:
      Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*,
      https://arxiv.org/abs/2011.13456; in this form Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    sigma = at_least_float32(sigma)
    ones = jnp.ones_like(sigma)
    return EDMCoefficients(ones, sigma, ones, jnp.log(jnp.maximum(sigma, sigma_min) / 2))


@functools.lru_cache
def iddpm_levels(c1: float = 0.001, c2: float = 0.008, num_levels: int = 1000) -> np.ndarray:
    r"""The descending noise levels $u_0 > \dots > u_M = 0$ of improved DDPM's cosine schedule.

    $u_{j-1} = \sqrt{(u_j^2+1)/\max(\bar\alpha_{j-1}/\bar\alpha_j, C_1) - 1}$ from $u_M = 0$, with
    $\bar\alpha_j = \sin^2(\pi j/(2M(1+C_2)))$.

    Args:
      c1: $C_1$, which bounds a step's growth.
      c2: $C_2$, the schedule's offset.
      num_levels: $M$.

    Returns:
      The $M+1$ levels in float64.

    Raises:
      ValueError: if ``num_levels`` is below 1.

    Example:
      >>> from poise.nets import iddpm_levels
      >>> levels = iddpm_levels()
      >>> levels.shape, float(levels[-1]), bool((levels[1:] < levels[:-1]).all())
      ((1001,), 0.0, True)

    References:
      Nichol and Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, https://arxiv.org/abs/2102.09672
    """
    if num_levels < 1:
        raise ValueError(f"num_levels must be at least 1, got {num_levels}")
    alpha_bar = np.sin(np.pi / 2 * np.arange(num_levels + 1) / (num_levels * (1 + c2))) ** 2
    levels = np.zeros(num_levels + 1)
    for j in range(num_levels, 0, -1):
        levels[j - 1] = np.sqrt((levels[j] ** 2 + 1) / max(alpha_bar[j - 1] / alpha_bar[j], c1) - 1)
    levels.flags.writeable = False
    return levels


def iddpm_coefficients(
    sigma: Float[Array, "*batch"], c1: float = 0.001, c2: float = 0.008, num_levels: int = 1000
) -> EDMCoefficients:
    r"""Improved DDPM: the network predicts the noise, and its label is the place of the nearest level of the schedule.

    $c_\text{skip} = 1$, $c_\text{out} = -\sigma$, $c_\text{in} = 1/\sqrt{\sigma^2+1}$,
    $c_\text{noise} = M - 1 - \arg\min_j|u_j - \sigma|$ with the levels of :func:`iddpm_levels`.

    Args:
      sigma: noise levels of any shape.
      c1: $C_1$.
      c2: $C_2$.
      num_levels: $M$.

    Returns:
      The coefficients, in at least float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import iddpm_coefficients, iddpm_levels
      >>> float(iddpm_coefficients(jnp.array(iddpm_levels()[7])).c_noise)
      992.0

    References:
      Nichol and Dhariwal, *Improved Denoising Diffusion Probabilistic Models*, https://arxiv.org/abs/2102.09672; in
      this form Karras et al., https://arxiv.org/abs/2206.00364, Table 1
    """
    sigma = at_least_float32(sigma)
    ascending = jnp.asarray(iddpm_levels(c1, c2, num_levels)[::-1], sigma.dtype)
    middles = (ascending[1:] + ascending[:-1]) / 2
    label = jnp.searchsorted(middles, sigma) - 1  # M - 1 - j, since the ascending place is M - j
    return EDMCoefficients(jnp.ones_like(sigma), -sigma, jax.lax.rsqrt(sigma**2 + 1), label.astype(sigma.dtype))


class EDMPrecond(nn.Module):
    r"""A denoiser made of a raw network $F$.

    $D(x;\sigma) = c_\text{skip}\,x + c_\text{out}\,F(c_\text{in}\,x, c_\text{noise})$.

    Coefficients and sum are in float32 (float64 for float64 input) whatever the network's own dtype, and so is $D$. The
    network is called as
    ``model(x, noise_labels, class_labels, augment_labels, train=..., feature_levels=..., features_only=...)``, as
    :class:`SongUNet` and :class:`DhariwalUNet` define it; any module with this call may stand in, on images
    ``[B, H, W, C]`` or anything else ``[B, ...]``. Its parameters are found under ``model``.

    Attributes:
      model: the raw network $F$.
      sigma_data: standard deviation $\sigma_d$ of the data; EDM alone uses it.
      label_dim: number of classes, 0 for none; None takes the network's own, if it has one.
      preconditioning: ``"edm"``, ``"vp"``, ``"ve"`` or ``"iddpm"``. With iDDPM the network has twice the image's
        channels, of which the first half is used.
      sigma_min: lower bound of the level inside of EDM's and VE's logarithm, for callers with $\sigma = 0$, where
        EDM's $D(x; 0) = x$.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import EDMPrecond, SongUNet
      >>> net = SongUNet(8, 1, label_dim=10, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))
      >>> denoiser = EDMPrecond(net)
      >>> x, sigma, labels = jnp.ones((2, 8, 8, 1)), jnp.array([0.5, 80.0]), jnp.array([3, 7])
      >>> def run(key):
      ...     variables = denoiser.init(key, x, sigma, labels)
      ...     return denoiser.apply(variables, x, sigma, labels, feature_levels=(1,))
      >>> denoised, features = jax.eval_shape(run, jax.random.key(0))  # traced only; jax.jit(run) computes it
      >>> denoised.shape, features[0].shape
      ((2, 8, 8, 1), (2, 4, 4, 16))

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364
    """

    model: nn.Module
    sigma_data: float | int = 0.5
    label_dim: int | None = None
    preconditioning: str = "edm"
    sigma_min: float | int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *event"],
        sigma: Float[Array, "..."] | float | int,
        class_labels: Shaped[Array, "..."] | None = None,
        augment_labels: Float[Array, "..."] | None = None,
        *,
        train: bool = False,
        feature_levels: Sequence[int] = (),
        features_only: bool = False,
    ) -> Any:
        """Denoises ``x``.

        Args:
          x: noisy images ``[B, R, R, C]``, in the data's units.
          sigma: noise levels ``[B]``, or one level as a scalar or ``[1]``, in the data's units; positive.
          class_labels: indices ``[B]`` or label vectors ``[B, label_dim]``; None is a zero vector.
          augment_labels: ``[B, augment_dim]``; None is a zero vector.
          train: whether dropout acts; it needs the rng ``dropout``.
          feature_levels: levels of the encoder (0 is full resolution, -1 the coarsest) whose last block's output is
            wanted.
          features_only: whether to leave out the decoder.

        Returns:
          The denoised images, or ``(denoised, features)`` if levels are named, or the features alone with
          ``features_only``. Features come from the raw network, without preconditioning.

        Raises:
          TypeError: for labels of a wrong type.
          ValueError: for settings or shapes that don't fit.
        """
        if self.preconditioning not in PRECONDITIONINGS:
            raise ValueError(f"preconditioning must be one of {PRECONDITIONINGS}, got {self.preconditioning!r}")
        model_label_dim = getattr(self.model, "label_dim", None)
        label_dim = (model_label_dim or 0) if self.label_dim is None else self.label_dim
        if model_label_dim is not None and model_label_dim != label_dim:
            raise ValueError(f"label_dim must be that of the model, {model_label_dim}, got {label_dim}")
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        sigma = jnp.asarray(sigma, dtype)
        if sigma.ndim > 1 or sigma.size not in (1, x.shape[0]):
            raise ValueError(f"sigma must be a scalar or of shape [1] or [{x.shape[0]}], got shape {sigma.shape}")
        c = self._coefficients(sigma.reshape(-1))
        c_skip, c_out, c_in = (value.reshape(-1, *(1,) * (x.ndim - 1)) for value in (c.c_skip, c.c_out, c.c_in))
        x = x.astype(dtype)
        out = self.model(
            c_in * x,
            c.c_noise,
            label_vectors(class_labels, label_dim, dtype),
            augment_labels,
            train=train,
            feature_levels=feature_levels,
            features_only=features_only,
        )
        if features_only:
            return out
        raw, features = out if feature_levels else (out, None)
        channels = x.shape[-1]
        expected = channels * (2 if self.preconditioning == "iddpm" else 1)
        if raw.shape != (*x.shape[:-1], expected):
            raise ValueError(
                f"x of shape {x.shape} needs a model with an output of {expected} channels for "
                f"preconditioning={self.preconditioning!r}, got an output of shape {raw.shape}"
            )
        denoised = c_skip * x + c_out * raw[..., :channels].astype(dtype)
        return (denoised, features) if feature_levels else denoised

    def _coefficients(self, sigma: Array) -> EDMCoefficients:
        if self.preconditioning == "edm":
            return edm_coefficients(sigma, self.sigma_data, self.sigma_min)
        if self.preconditioning == "ve":
            return ve_coefficients(sigma, self.sigma_min)
        return vp_coefficients(sigma) if self.preconditioning == "vp" else iddpm_coefficients(sigma)
