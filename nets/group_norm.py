"""Group normalization with the group rule of the EDM networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def group_count(num_channels: int) -> int:
    r"""The number of groups for a channel count: $\min(32, \lfloor C/4\rfloor)$.

    Args:
      num_channels: $C$, at least 4 and divisible by the result.

    Returns:
      The number of contiguous channel groups.

    Raises:
      ValueError: if there is no such grouping of the channels.

    Example:
      >>> from poise.nets import group_count
      >>> [group_count(c) for c in (4, 48, 128, 160)]
      [1, 12, 32, 32]
    """
    groups = min(32, num_channels // 4)
    if groups < 1 or num_channels % groups:
        raise ValueError(
            f"num_channels must be at least 4 and divisible by min(32, num_channels // 4), got {num_channels}"
        )
    return groups


class GroupNorm(nn.Module):
    r"""Normalizes each group of channels of each image: $y = \gamma\,(x-\mu_g)/\sqrt{\nu_g+\epsilon} + \beta$.

    $\mu_g$ and $\nu_g$ are the mean and the biased variance over height, width and the group's channels. The variance
    is taken of the centred values, since $E[x^2]-E[x]^2$ loses the digits that matter for nearly constant images. A
    constant image gives $\beta$.

    Attributes:
      eps: $\epsilon$.
      num_groups: the number of contiguous channel groups; None takes :func:`group_count`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import GroupNorm
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
      >>> y, variables = GroupNorm().init_with_output(jax.random.key(1), x)
      >>> bool(jnp.allclose(y.reshape(2, 16, 2, 4).mean((1, 3)), 0, atol=1e-6))
      True

    References:
      Wu and He, *Group Normalization*, https://arxiv.org/abs/1803.08494
    """

    eps: float = 1e-5
    num_groups: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch *space channels"]) -> Float[Array, "batch *space channels"]:
        """Normalizes ``x``; statistics in at least float32, the result in the dtype of ``x``."""
        channels = x.shape[-1]
        groups = group_count(channels) if self.num_groups is None else self.num_groups
        if groups < 1 or channels % groups:
            raise ValueError(f"the channels of x must be divisible by num_groups={groups}, got shape {x.shape}")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        grouped = x.astype(dtype).reshape(x.shape[0], -1, groups, channels // groups)
        centred = grouped - grouped.mean((1, 3), keepdims=True)
        inverse = jax.lax.rsqrt(jnp.square(centred).mean((1, 3), keepdims=True) + self.eps)
        shape = (groups, channels // groups)
        y = centred * (inverse * scale.astype(dtype).reshape(shape)) + bias.astype(dtype).reshape(shape)
        return y.reshape(x.shape).astype(x.dtype)
