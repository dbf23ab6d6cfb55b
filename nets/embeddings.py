"""Embeddings of the noise level."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def positional_embedding(
    values: Float[Array, "*batch"], num_channels: int, endpoint: bool = False, max_positions: float | int = 10000
) -> Float[Array, "*batch num_channels"]:
    r"""Cosines and sines of a value at geometrically spaced frequencies.

    $[\cos(c\,\omega_i)]_i$ followed by $[\sin(c\,\omega_i)]_i$ with $\omega_i = M^{-i/(h-e)}$, $i=0,\dots,h-1$,
    $h = n/2$; the last frequency is $1/M$ with the endpoint ($e=1$) and larger without ($e=0$).

    Args:
      values: $c$, of any shape.
      num_channels: $n$, even; at least 4 with the endpoint.
      endpoint: whether the frequencies reach $1/M$.
      max_positions: $M$.

    Returns:
      The embedding, in at least float32, with a new last axis of size $n$.

    Raises:
      ValueError: for an odd or too small ``num_channels``.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import positional_embedding
      >>> positional_embedding(jnp.zeros(2), 4).tolist()
      [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]

    References:
      Vaswani et al., *Attention Is All You Need*, https://arxiv.org/abs/1706.03762
    """
    if num_channels % 2 or num_channels < (4 if endpoint else 2):
        raise ValueError(
            f"num_channels must be even and at least {4 if endpoint else 2} with endpoint={endpoint}, "
            f"got {num_channels}"
        )
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    half = num_channels // 2
    frequencies = max_positions ** (-jnp.arange(half, dtype=values.dtype) / (half - endpoint))
    angles = values[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class PositionalEmbedding(nn.Module):
    """:func:`positional_embedding` as a layer without parameters.

    Attributes:
      num_channels: size of the embedding, even.
      endpoint: whether the frequencies reach ``1/max_positions``.
      max_positions: the inverse of the lowest frequency.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import PositionalEmbedding
      >>> PositionalEmbedding(8, endpoint=True).apply({}, jnp.ones(3)).shape
      (3, 8)
    """

    num_channels: int
    endpoint: bool = False
    max_positions: float | int = 10000

    @nn.compact
    def __call__(self, values: Float[Array, " batch"]) -> Float[Array, "batch num_channels"]:
        """Embeds ``values``, in at least float32."""
        return positional_embedding(values, self.num_channels, self.endpoint, self.max_positions)


class FourierEmbedding(nn.Module):
    r"""Cosines and sines of a value at random frequencies: $[\cos 2\pi c f, \sin 2\pi c f]$, $f\sim\mathcal N(0,s^2)$.

    The frequencies are drawn once, at initialization, and never trained: they live in the collection ``constants``,
    where no optimizer, weight decay or moving average of the parameters touches them.

    Attributes:
      num_channels: size of the embedding, even.
      scale: the standard deviation $s$ of the frequencies.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import FourierEmbedding
      >>> y, variables = FourierEmbedding(8).init_with_output(jax.random.key(0), jnp.ones(3))
      >>> y.shape, jax.tree.map(jnp.shape, variables)
      ((3, 8), {'constants': {'freqs': (4,)}})

    References:
      Song et al., *Score-Based Generative Modeling through Stochastic Differential Equations*,
      https://arxiv.org/abs/2011.13456
    """

    num_channels: int
    scale: float | int = 16

    @nn.compact
    def __call__(self, values: Float[Array, " batch"]) -> Float[Array, "batch num_channels"]:
        """Embeds ``values``, in at least float32."""
        if self.num_channels % 2 or self.num_channels < 2:
            raise ValueError(f"num_channels must be even and at least 2, got {self.num_channels}")
        values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        freqs = self.variable("constants", "freqs", self._draw).value
        angles = values[:, None] * (2 * jnp.pi * freqs.astype(values.dtype))
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)

    def _draw(self) -> Array:
        return self.scale * jax.random.normal(self.make_rng("params"), (self.num_channels // 2,))
