"""Halving and doubling the resolution of images with a small filter, alone or together with a convolution."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from poise.nets.initializers import LayerInit

_XAVIER = LayerInit()


def _check_taps(resample_filter: Sequence[float | int]) -> list[float]:
    taps = [float(tap) for tap in resample_filter]
    if not taps or len(taps) % 2 or sum(taps) == 0:
        raise ValueError(
            f"resample_filter must have an even number of taps with a sum other than 0, got {resample_filter}"
        )
    return [tap / sum(taps) for tap in taps]


def downsample(
    x: Float[Array, "batch height width channels"],
    resample_filter: Sequence[float | int] = (1, 1),
    padding: int | None = None,
) -> Float[Array, "batch new_height new_width channels"]:
    r"""Halves the resolution: correlation with the filter at every second pixel.

    $y_m = \sum_i g_i\, x_{2m+i-p}$ along each axis, with zeros outside and the taps $g$ scaled to sum 1. The taps
    ``(1, 1)`` average blocks of 2x2 pixels.

    Args:
      x: images ``[B, H, W, C]``; ``H`` and ``W`` even.
      resample_filter: the $n$ taps $g$ of the separable filter, an even number.
      padding: zeros $p$ on each side; None takes $(n-1)//2$, which halves the resolution exactly.

    Returns:
      Images ``[B, H', W', C]`` with ``H' = (H + 2p - n) // 2 + 1``.

    Raises:
      ValueError: for an odd number of taps, taps of sum 0, or an odd height or width.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import downsample
      >>> downsample(jnp.array([[1.0, 2.0], [3.0, 6.0]]).reshape(1, 2, 2, 1)).ravel().tolist()
      [3.0]
    """
    taps = _check_taps(resample_filter)
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"x must have an even height and width to be halved, got shape {x.shape}")
    padding = (len(taps) - 1) // 2 if padding is None else padding
    if len(taps) == 2 and taps[0] == taps[1] and padding == 0:
        return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    for axis in (1, 2):
        x = jnp.pad(x, [(padding, padding) if i == axis else (0, 0) for i in range(4)])
        size = (x.shape[axis] - len(taps)) // 2 + 1
        slices = (jax.lax.slice_in_dim(x, i, i + 2 * size - 1, 2, axis) for i in range(len(taps)))
        x = sum((tap * part for tap, part in zip(taps, slices, strict=True)), start=jnp.zeros((), x.dtype))
    return x


def upsample(
    x: Float[Array, "batch height width channels"],
    resample_filter: Sequence[float | int] = (1, 1),
    padding: int | None = None,
) -> Float[Array, "batch new_height new_width channels"]:
    r"""Doubles the resolution: every pixel is spread over the filter, at every second place.

    $y_o = 2\sum_i g_{o+p-2i}\, x_i$ along each axis, with the taps $g$ scaled to sum 1: the transposed convolution of
    stride 2. The taps ``(1, 1)`` repeat every pixel 2x2 times.

    Args:
      x: images ``[B, H, W, C]``.
      resample_filter: the $n$ taps $g$ of the separable filter, an even number.
      padding: pixels $p$ that are cut off on each side of the full result, below $n - 1$; None takes $(n-1)//2$, which
        doubles the resolution exactly.

    Returns:
      Images ``[B, H', W', C]`` with ``H' = 2H - 2 - 2p + n``.

    Raises:
      ValueError: for an odd number of taps or taps of sum 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import upsample
      >>> upsample(jnp.array([1.0, 2.0]).reshape(1, 1, 2, 1)).ravel().tolist()
      [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 2.0]
    """
    taps = _check_taps(resample_filter)
    padding = (len(taps) - 1) // 2 if padding is None else padding
    if len(taps) == 2 and taps[0] == taps[1] and padding == 0:
        batch, height, width, channels = x.shape
        shape = (batch, height, 2, width, 2, channels)
        return jnp.broadcast_to(x[:, :, None, :, None], shape).reshape(batch, 2 * height, 2 * width, channels)
    half = len(taps) // 2
    for axis in (1, 2):
        size = 2 * x.shape[axis] - 2 - 2 * padding + len(taps)
        x = jnp.pad(x, [(half, half) if i == axis else (0, 0) for i in range(4)])
        phases = []
        for o in (0, 1):  # outputs 2m + o need the taps of one parity, on the pixels m + shift - j
            parity, shift = (o + padding) % 2, (o + padding) // 2 + half
            parts = (
                2 * taps[parity + 2 * j] * jax.lax.slice_in_dim(x, shift - j, shift - j + size // 2, 1, axis)
                for j in range(half)
            )
            phases.append(sum(parts, start=jnp.zeros((), x.dtype)))
        shape = tuple(size if i == axis else x.shape[i] for i in range(4))
        x = jnp.stack(phases, axis + 1).reshape(shape)
    return x


class ResampleConv(nn.Module):
    r"""A convolution that may also halve or double the resolution; with kernel size 0 it only resamples.

    With the convolution's own padding $w = k//2$ and the filter's $f = (n-1)//2$, the order of operations is: resample,
    then convolve (both with their own padding). A fused ``up`` resamples with padding $\max(f-w, 0)$ and then convolves
    with $\max(w-f, 0)$; a fused ``down`` convolves *first*, with padding $w+f$, and then filters without padding, so
    that the convolution's response at the border is filtered, too. The bias comes last.

    Attributes:
      features: channels of the result; must equal those of the input for kernel size 0.
      kernel_size: 0, 1 or 3.
      up: double the resolution.
      down: halve the resolution.
      resample_filter: taps of the separable resampling filter.
      fused: use the fused order.
      layer_init: how kernel and bias are drawn.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import ResampleConv
      >>> y, variables = ResampleConv(6, 3, down=True).init_with_output(jax.random.key(0), jnp.ones((1, 8, 8, 4)))
      >>> y.shape, variables["params"]["kernel"].shape
      ((1, 4, 4, 6), (3, 3, 4, 6))

    References:
      Karras et al., *Elucidating the Design Space of Diffusion-Based Generative Models*,
      https://arxiv.org/abs/2206.00364, whose official networks these layers equal.
    """

    features: int
    kernel_size: int = 3
    up: bool = False
    down: bool = False
    resample_filter: Sequence[float | int] = (1, 1)
    fused: bool = False
    layer_init: LayerInit = _XAVIER

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width features"]:
        """Convolves and resamples ``x``, with the weights cast to its dtype."""
        if self.kernel_size not in (0, 1, 3):
            raise ValueError(f"kernel_size must be 0, 1 or 3, got {self.kernel_size}")
        if self.up and self.down:
            raise ValueError("up and down exclude each other, got both")
        channels = x.shape[-1]
        if self.kernel_size == 0:
            if channels != self.features:
                raise ValueError(f"features must be {channels} for kernel_size 0, got {self.features}")
            return self._resample(x)
        w_pad, f_pad = self.kernel_size // 2, (len(self.resample_filter) - 1) // 2
        kernel_shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = jnp.asarray(self.param("kernel", self.layer_init.kernel(), kernel_shape), x.dtype)
        area = self.kernel_size**2
        bias = self.param("bias", self.layer_init.bias(channels * area, self.features * area), (self.features,))
        if self.fused and self.up:
            x = _convolve(self._resample(x, max(f_pad - w_pad, 0)), kernel, max(w_pad - f_pad, 0))
        elif self.fused and self.down:
            x = self._resample(_convolve(x, kernel, w_pad + f_pad), 0)
        else:
            x = _convolve(self._resample(x), kernel, w_pad)
        return x + bias.astype(x.dtype)

    def _resample(self, x: Array, padding: int | None = None) -> Array:
        if self.up:
            return upsample(x, self.resample_filter, padding)
        return downsample(x, self.resample_filter, padding) if self.down else x


def _convolve(x: Array, kernel: Array, padding: int) -> Array:
    if kernel.shape[0] == 1 and padding == 0:  # on CPU a matrix product is faster, above all backward
        return x @ kernel[0, 0]
    dimension_numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=dimension_numbers
    )
