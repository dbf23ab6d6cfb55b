"""A small head that estimates log density ratios from the features of a diffusion network."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from poise.nets.embeddings import positional_embedding
from poise.nets.labels import label_vectors


class RatioHead(nn.Module):
    r"""A perceptron per feature map that knows the noise level and the class.

    $\ell_k = \text{MLP}_k([\text{LayerNorm}(\text{vec}(f_k)),\ \text{emb}(\tfrac14\ln\sigma),\ y])$ with SiLU between
    its layers. Trained to tell $p$ from $q$, the logit is the log density ratio $\log p_\sigma - \log q_\sigma$. The
    last layer starts small, so that a fresh head gives ratios near 1.

    Attributes:
      hidden: widths of the hidden layers.
      label_dim: number of classes; 0 for none.
      noise_channels: size of the positional embedding of the noise level.
      pooling: ``"flatten"`` keeps the places of a map apart, ``"mean"`` averages over them.
      dtype: of the activations; None keeps that of the features.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import RatioHead
      >>> head, features = RatioHead(label_dim=10), [jnp.ones((2, 4, 4, 32))]
      >>> sigma, labels = jnp.array([0.1, 2.0]), jnp.array([3, 7])
      >>> logits, _ = jax.eval_shape(head.init_with_output, jax.random.key(0), features, sigma, labels)
      >>> logits.shape
      (2, 1)

    References:
      Xu et al., *One-step Diffusion Models with f-Divergence Distribution Matching*, https://arxiv.org/abs/2502.15681,
      use the convolutional :class:`DiscriminatorHead`; this is the small head for small images.
    """

    hidden: Sequence[int] = (128, 128)
    label_dim: int = 0
    noise_channels: int = 32
    pooling: str = "flatten"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        features: Sequence[Float[Array, "batch *_"]],
        sigma: Float[Array, "..."] | float | int,
        class_labels: Shaped[Array, "..."] | None = None,
    ) -> Float[Array, "batch heads"]:
        """Judges feature maps.

        Args:
          features: $K$ arrays ``[B, h, w, C]`` of any sizes and widths; ``[B, C]`` will do, too.
          sigma: noise levels ``[B]``, or one level; positive.
          class_labels: indices ``[B]`` or label vectors ``[B, label_dim]``; None is a zero vector.

        Returns:
          Logits ``[B, K]``, in at least float32.

        Raises:
          TypeError: for labels of a wrong type.
          ValueError: for settings or shapes that don't fit.
        """
        if not features:
            raise ValueError("features must hold at least one map, got none")
        if self.pooling not in ("flatten", "mean"):
            raise ValueError(f"pooling must be 'flatten' or 'mean', got {self.pooling!r}")
        batch = features[0].shape[0]
        dtype = features[0].dtype if self.dtype is None else jnp.dtype(self.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        sigma = jnp.asarray(sigma, wide)
        if sigma.ndim > 1 or sigma.size not in (1, batch):
            raise ValueError(f"sigma must be a scalar or of shape [1] or [{batch}], got shape {sigma.shape}")
        condition = [positional_embedding(jnp.log(sigma.reshape(-1)) / 4, self.noise_channels)]
        labels = label_vectors(class_labels, self.label_dim, wide)
        if labels is not None:
            condition.append(labels)
        condition = [jnp.broadcast_to(c, (batch, c.shape[1])).astype(dtype) for c in condition]

        logits = []
        for k, x in enumerate(features):
            if self.pooling == "mean":
                x = x.astype(wide).reshape(batch, -1, x.shape[-1]).mean(1)
            x = nn.LayerNorm(dtype=dtype, use_fast_variance=False, name=f"norm{k}")(x.reshape(batch, -1))
            x = jnp.concatenate([x, *condition], axis=-1)
            for i, width in enumerate(self.hidden):
                x = nn.silu(nn.Dense(width, dtype=dtype, name=f"head{k}_dense{i}")(x))
            small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
            logits.append(nn.Dense(1, dtype=dtype, kernel_init=small, name=f"head{k}_out")(x))
        return jnp.concatenate(logits, axis=-1).astype(wide)
