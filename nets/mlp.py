"""Perceptrons for distributions on a few dimensions: a denoiser's network, a discriminator, an affine generator."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from poise.nets.embeddings import positional_embedding
from poise.nets.labels import label_vectors


def _perceive(
    x: Array, noise_labels: Array, vectors: Array | None, hidden: Sequence[int], noise_channels: int, dtype: Any
) -> list[Array]:
    """The hidden layers' activations; a helper inside of a compact call."""
    batch = x.shape[0]
    inputs = [x.reshape(batch, -1), positional_embedding(noise_labels, noise_channels)]
    if vectors is not None:
        inputs.append(vectors)
    h = jnp.concatenate([jnp.broadcast_to(part, (batch, part.shape[1])).astype(dtype) for part in inputs], axis=1)
    layers = []
    for i, width in enumerate(hidden):
        h = nn.silu(nn.Dense(width, dtype=dtype, name=f"dense{i}")(h))
        layers.append(h)
    return layers


class MLP(nn.Module):
    r"""A perceptron in the place of a diffusion U-Net, for data ``[B, ...]`` of few dimensions.

    $F = W\,h_n + b$ with $h_i = \mathrm{silu}(W_i h_{i-1} + b_i)$ and $h_0 = [x, \mathrm{emb}(c), y]$. Wrapped in
    :class:`EDMPrecond` it is a denoiser. The last layer starts at zero, so that a fresh denoiser gives
    $c_\mathrm{skip} x$. Features are the hidden layers ``[B, width]``, 0 being the first.

    Attributes:
      hidden: widths of the hidden layers.
      label_dim: number of classes; 0 for none.
      noise_channels: size of the positional embedding of the noise level, even.
      dtype: of the activations; None keeps that of the input.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import MLP, EDMPrecond
      >>> denoiser, x, sigma = EDMPrecond(MLP((16, 16))), jnp.ones((3, 2)), jnp.array([0.1, 1.0, 80.0])
      >>> variables = denoiser.init(jax.random.key(0), x, sigma)
      >>> [round(float(d), 3) for d in denoiser.apply(variables, x, sigma)[:, 0]]  # a fresh one: x / (1 + 4 sigma^2)
      [0.962, 0.2, 0.0]
    """

    hidden: Sequence[int] = (64, 64)
    label_dim: int = 0
    noise_channels: int = 16
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *event"],
        noise_labels: Float[Array, "..."],
        class_labels: Shaped[Array, "..."] | None = None,
        augment_labels: None = None,
        *,
        train: bool = False,
        feature_levels: Sequence[int] = (),
        features_only: bool = False,
    ) -> Any:
        """Evaluates the network.

        Args:
          x: data, scaled by the preconditioning.
          noise_labels: $c$, ``[B]`` or ``[1]``.
          class_labels: indices ``[B]`` or vectors ``[B, label_dim]``; None is a zero vector.
          augment_labels: must be None; here so that all networks are called alike.
          train: ignored, since there is no dropout.
          feature_levels: hidden layers whose activations are wanted.
          features_only: whether to leave out the last layer.

        Returns:
          The output, of the shape of ``x``, or ``(output, features)``, or the features.

        Raises:
          TypeError: for labels of a wrong type.
          ValueError: for settings, levels or shapes that don't fit, or augmentation labels.
        """
        del train
        if augment_labels is not None:
            raise ValueError("augment_labels must be None, since this network knows no augmentation")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must hold one or more positive widths, got {tuple(self.hidden)}")
        for level in feature_levels:
            if not -len(self.hidden) <= level < len(self.hidden):
                raise ValueError(f"feature_levels must be those of {len(self.hidden)} hidden layers, got {level}")
        dtype = x.dtype if self.dtype is None else jnp.dtype(self.dtype)
        vectors = label_vectors(class_labels, self.label_dim, jnp.promote_types(dtype, jnp.float32))
        layers = _perceive(x, noise_labels.reshape(-1), vectors, self.hidden, self.noise_channels, dtype)
        features = [layers[level] for level in feature_levels]
        if features_only:
            return features
        size = x[0].size
        out = nn.Dense(size, dtype=dtype, kernel_init=nn.initializers.zeros, name="out")(layers[-1]).reshape(x.shape)
        return (out, features) if feature_levels else out


class MLPHead(nn.Module):
    r"""A discriminator of noised data that sees nothing but them: for ``FDistillConfig(head_features="own")``.

    A perceptron on $[x_t/\sqrt{\sigma^2+\sigma_d^2},\ \mathrm{emb}(\tfrac14\ln\sigma),\ y]$. The last layer starts
    small, so that a fresh head gives ratios near 1.

    Attributes:
      hidden: widths of the hidden layers.
      label_dim: number of classes; 0 for none.
      sigma_data: the data's standard deviation $\sigma_d$.
      noise_channels: size of the positional embedding of the noise level, even.
      dtype: of the activations; None keeps that of the data.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import MLPHead
      >>> head, x, sigma = MLPHead((16, 16)), jnp.ones((3, 2)), jnp.array([0.1, 1.0, 80.0])
      >>> head.apply(head.init(jax.random.key(0), x, sigma), x, sigma).shape
      (3, 1)
    """

    hidden: Sequence[int] = (64, 64)
    label_dim: int = 0
    sigma_data: float | int = 0.5
    noise_channels: int = 16
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch *event"],
        sigma: Float[Array, "..."],
        class_labels: Shaped[Array, "..."] | None = None,
    ) -> Float[Array, "batch 1"]:
        """Judges noised data.

        Args:
          x: the data, in their own units.
          sigma: noise levels ``[B]`` or ``[1]``; positive.
          class_labels: indices ``[B]`` or vectors ``[B, label_dim]``; None is a zero vector.

        Returns:
          Logits, in at least float32.

        Raises:
          TypeError: for labels of a wrong type.
          ValueError: for settings or labels that don't fit.
        """
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must hold one or more positive widths, got {tuple(self.hidden)}")
        dtype = x.dtype if self.dtype is None else jnp.dtype(self.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        sigma = jnp.asarray(sigma, wide).reshape(-1)
        scaled = x.reshape(x.shape[0], -1).astype(wide) / jnp.sqrt(sigma**2 + self.sigma_data**2)[:, None]
        vectors = label_vectors(class_labels, self.label_dim, wide)
        layers = _perceive(scaled, jnp.log(sigma) / 4, vectors, self.hidden, self.noise_channels, dtype)
        small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        return nn.Dense(1, dtype=dtype, kernel_init=small, name="out")(layers[-1]).astype(wide)


class AffineGenerator(nn.Module):
    r"""A one-step generator whose law is a Gaussian, $x = A z + b$, called as a denoiser: $z = x_\sigma/\sigma$.

    Its density, score and ratio to any mixture are known at every noise level, which makes it the student on which a
    distillation can be checked.

    Attributes:
      scale: $A$ starts as this multiple of the identity.
      shift: where $b$ starts; one number for each dimension, or none for zeros.
      label_dim: number of classes, which must be 0.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import AffineGenerator
      >>> net, x, sigma = AffineGenerator(0.5, (1.0, 0.0)), jnp.array([[8.0, 4.0]]), jnp.array([4.0])
      >>> net.apply(net.init(jax.random.key(0), x, sigma), x, sigma).tolist()
      [[2.0, 0.5]]
    """

    scale: float = 1.0
    shift: Sequence[float] = ()
    label_dim: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch dim"],
        sigma: Float[Array, "..."],
        class_labels: None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch dim"]:
        """Generates from noise.

        Args:
          x: noise of level ``sigma``.
          sigma: noise levels ``[B]`` or ``[1]``; positive.
          class_labels: must be None.
          train: ignored.

        Returns:
          The points.

        Raises:
          ValueError: if there are labels, or ``shift`` is of another size.
        """
        del train
        if class_labels is not None or self.label_dim:
            raise ValueError("class_labels must be None, since this generator knows no classes")
        size = x.shape[1]
        if len(self.shift) not in (0, size):
            raise ValueError(f"shift must have {size} entries, one for each dimension, or none, got {len(self.shift)}")
        start = jnp.asarray(self.shift or (0.0,) * size, x.dtype)
        kernel = self.param("kernel", lambda _: self.scale * jnp.eye(size, dtype=x.dtype))
        bias = self.param("bias", lambda _: start)
        return (x / sigma.reshape(-1, 1)) @ kernel + bias
