"""FlexRound: rounding after a learned division of every weight, and its low-rank form LRQ."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from poise.core.arguments import check_count
from poise.core.arrays import at_least_float32
from poise.quant.checks import Axis, as_floats, check_bits, check_broadcasts, check_not_empty, group_axes
from poise.quant.division import divide
from poise.quant.qparams import absmax_scale, minmax_qparams, mse_qparams
from poise.quant.rounding import clamp_inclusive, round_ste

_LEAST_SCALE = 1e-8


class FlexRoundParams(NamedTuple):
    r"""The factors of FlexRound, as logarithms.

    Attributes:
      log_s1: $\log s_1$, the grid size, of the weights' rank with size 1 along the axes that share it.
      log_s2: $\log S_2$, of the weights' shape.
      log_s3: $\log s_3$ by output channel.
      log_s4: $\log s_4$ by input channel, for convolutions; else None.
      zero_point: fixed whole numbers in $[0, 2^b-1]$, as floats; None for symmetric codes.
      start: the fixed first grid size $s_1^0$; with it, $s_1 = s_1^0\exp(\log s_1 - \log s_1^0)$, so that nothing is
        lost to a logarithm at the start. None for $s_1 = \exp\log s_1$.
      log_start: its logarithm.
    """

    log_s1: Array
    log_s2: Array
    log_s3: Array
    log_s4: Array | None = None
    zero_point: Array | None = None
    start: Array | None = None
    log_start: Array | None = None


class LRQParams(NamedTuple):
    r"""The factors of LRQ: those of FlexRound with $\log S_2 = L U + r + c$ of low rank.

    Attributes:
      log_s1: as in :class:`FlexRoundParams`.
      left: ``[rows, rank]`` of a weight ``[rows, columns]``.
      right: ``[rank, columns]``.
      row: ``[rows, 1]``.
      column: ``[1, columns]``.
      zero_point: as in :class:`FlexRoundParams`.
      start: likewise.
      log_start: likewise.
    """

    log_s1: Array
    left: Array
    right: Array
    row: Array
    column: Array
    zero_point: Array | None = None
    start: Array | None = None
    log_start: Array | None = None


def flexround_init(
    w: Float[Array, "..."],
    *,
    bits: int,
    axis: Axis,
    symmetric: bool = False,
    search: bool = False,
    channel_axis: int | None = None,
    input_axis: int | None = None,
) -> FlexRoundParams:
    r"""Factors with which FlexRound is round-to-nearest, bit for bit.

    Args:
      w: weights.
      bits: from 2 to 8.
      axis: the axes that share a grid size; None for all.
      symmetric: codes in $[-2^{b-1}, 2^{b-1}-1]$ with the scale of :func:`absmax_scale`, instead of the range of the
        weights with a zero point (:func:`minmax_qparams`).
      search: whether scale and zero point are searched for the least error (:func:`mse_qparams`).
      channel_axis: the axis of output channels; None for the one that ``axis`` leaves, or the last (Flax).
      input_axis: the axis of input channels of weights with more than two axes; None for the last but one, or 1 if the
        output channels are axis 0 (PyTorch).

    Returns:
      The factors, in at least float32.

    Raises:
      ValueError: if ``w`` is empty or holds no finite floats, or ``bits`` or an axis is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import fake_quantize, flexround, flexround_init, minmax_qparams
      >>> w = jnp.array([[0.7, -1.2], [0.1, 0.4]])
      >>> nearest = fake_quantize(w, *minmax_qparams(w, 3, 0), bits=3, signed=False)
      >>> bool((flexround(w, flexround_init(w, bits=3, axis=0), bits=3) == nearest).all())
      True

    References:
      *FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization*,
      https://arxiv.org/abs/2306.00317. The official search scores symmetric candidates with the step 1; here with the
      candidate's step.
    """
    wide, scale, zero_point = _start(w, bits, axis, symmetric, search)
    channels, channel = _channels(wide.ndim, axis, channel_axis)

    def ones_but(axes: tuple[int, ...]) -> Array:
        return jnp.zeros([size if place in axes else 1 for place, size in enumerate(wide.shape)], wide.dtype)

    log_s4 = None
    if wide.ndim > 2:
        place = (1 if channel == 0 else wide.ndim - 2) if input_axis is None else group_axes(input_axis, wide.ndim)[0]
        log_s4 = ones_but((place,))
    log_scale = jnp.log(scale)
    return FlexRoundParams(log_scale, jnp.zeros_like(wide), ones_but(channels), log_s4, zero_point, scale, log_scale)


def flexround(w: Float[Array, "..."], params: FlexRoundParams, *, bits: int) -> Float[Array, "..."]:
    r"""Weights rounded after a learned division, and multiplied by the grid size alone.

    $$\hat w = s_1\,\mathrm{clip}\Big(\mathrm{round}\Big(\frac{w}{s_1 \odot S_2 \odot s_3 \odot s_4}\Big), l, u\Big)$$

    with $[l, u] = [-z, 2^b - 1 - z]$, or $[-2^{b-1}, 2^{b-1}-1]$ without zero point. Rounding passes gradients straight
    through, the clip passes them up to and including its ends. Since $\partial\hat w/\partial\log S_2 \propto w$, large
    weights move faster, and may cross several levels; a weight that is zero stays, and no code changes its sign.

    Args:
      w: weights.
      params: of :func:`flexround_init`, or trained from there.
      bits: from 2 to 8.

    Returns:
      Weights in the dtype of ``w``.

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import flexround, flexround_init
      >>> w = jnp.array([[1.0, -0.5, 1.875]])
      >>> params = flexround_init(w, bits=4, axis=None, symmetric=True)
      >>> halved = params._replace(log_s2=params.log_s2 + jnp.log(2.0))
      >>> (flexround(w, params, bits=4) / jnp.exp(params.log_s1)).tolist()
      [[4.0, -2.0, 7.0]]
      >>> (flexround(w, halved, bits=4) / jnp.exp(params.log_s1)).tolist()
      [[2.0, -1.0, 4.0]]
    """
    codes, scale = _codes(w, _divisor(w, params), params, bits)
    return (codes * scale).astype(w.dtype)


def flexround_codes(w: Float[Array, "..."], params: FlexRoundParams, *, bits: int) -> tuple[Array, Array, Array | None]:
    r"""The integers of :func:`flexround`: $\hat w = s\,(c - z)$ bit for bit.

    Args:
      w: weights.
      params: the trained factors.
      bits: from 2 to 8.

    Returns:
      int8 codes in $[-2^{b-1}, 2^{b-1}-1]$, the scale, and the int8 zero point (None for symmetric codes).

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import flexround_codes, flexround_init
      >>> w = jnp.array([[1.0, -2.0, 0.6]])
      >>> codes, scale, zero_point = flexround_codes(w, flexround_init(w, bits=4, axis=None), bits=4)
      >>> codes.tolist(), zero_point.tolist()
      ([[7, -8, 5]], [[2]])
    """
    return _integers(*_codes(w, _divisor(w, params), params, bits), params.zero_point, bits)


def lrq_init(
    w: Float[Array, "..."],
    *,
    bits: int,
    axis: Axis,
    rank: int,
    key: PRNGKeyArray,
    symmetric: bool = False,
    search: bool = False,
    channel_axis: int | None = None,
) -> LRQParams:
    r"""Factors with which LRQ is round-to-nearest: $L U = 0$, since the side of the output channels starts at zero.

    Args:
      w: a matrix.
      bits: from 2 to 8.
      axis: the axes that share a grid size; None for all.
      rank: of $L U$, less than both sides if it is to save memory.
      key: for the other side, which is drawn uniformly in $\pm\sqrt{6/\mathrm{inputs}}$.
      symmetric: as in :func:`flexround_init`.
      search: likewise.
      channel_axis: likewise.

    Returns:
      The factors, in at least float32.

    Raises:
      ValueError: as :func:`flexround_init`; if ``w`` is no matrix or ``rank`` is below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import flexround, flexround_init, lrq, lrq_init
      >>> w = jax.random.normal(jax.random.key(0), (6, 4))
      >>> params = lrq_init(w, bits=3, axis=0, rank=2, key=jax.random.key(1))
      >>> bool((lrq(w, params, bits=3) == flexround(w, flexround_init(w, bits=3, axis=0), bits=3)).all())
      True

    References:
      *LRQ: Optimizing Post-Training Quantization for Large Language Models by Learning Low-Rank Weight-Scaling
      Matrices*, https://arxiv.org/abs/2407.11534.
    """
    check_count("rank", rank)
    if jnp.ndim(w) != 2:
        raise ValueError(f"w must be a matrix, got shape {jnp.shape(w)}")
    wide, scale, zero_point = _start(w, bits, axis, symmetric, search)
    _, channel = _channels(2, axis, channel_axis)
    rows, columns = wide.shape
    bound = (6 / wide.shape[1 - channel]) ** 0.5
    left, right = jnp.zeros((rows, rank), wide.dtype), jnp.zeros((rank, columns), wide.dtype)
    if channel == 0:
        right = jax.random.uniform(key, right.shape, wide.dtype, -bound, bound)
    else:
        left = jax.random.uniform(key, left.shape, wide.dtype, -bound, bound)
    row, column = jnp.zeros((rows, 1), wide.dtype), jnp.zeros((1, columns), wide.dtype)
    log_scale = jnp.log(scale)
    return LRQParams(log_scale, left, right, row, column, zero_point, scale, log_scale)


def lrq(w: Float[Array, "..."], params: LRQParams, *, bits: int) -> Float[Array, "..."]:
    r"""FlexRound with the low-rank factor $\log S_2 = L U + r + c$.

    Args:
      w: a matrix.
      params: of :func:`lrq_init`, or trained from there.
      bits: from 2 to 8.

    Returns:
      Weights in the dtype of ``w``.

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import lrq, lrq_init
      >>> w = jax.random.normal(jax.random.key(0), (6, 4))
      >>> lrq(w, lrq_init(w, bits=3, axis=0, rank=2, key=jax.random.key(1)), bits=3).shape
      (6, 4)
    """
    codes, scale = _codes(w, _low_rank(params), params, bits)
    return (codes * scale).astype(w.dtype)


def lrq_codes(w: Float[Array, "..."], params: LRQParams, *, bits: int) -> tuple[Array, Array, Array | None]:
    """The integers of :func:`lrq`, as :func:`flexround_codes` gives them.

    Args:
      w: a matrix.
      params: the trained factors.
      bits: from 2 to 8.

    Returns:
      int8 codes, the scale, and the int8 zero point or None.

    Raises:
      ValueError: if ``bits`` is out of range or shapes don't fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import lrq_codes, lrq_init
      >>> w = jax.random.normal(jax.random.key(0), (6, 4))
      >>> lrq_codes(w, lrq_init(w, bits=3, axis=0, rank=2, key=jax.random.key(1)), bits=3)[0].dtype
      dtype('int8')
    """
    return _integers(*_codes(w, _low_rank(params), params, bits), params.zero_point, bits)


def _start(w: Array, bits: int, axis: Axis, symmetric: bool, search: bool) -> tuple[Array, Array, Array | None]:
    """The weights in at least float32, the first scale, never zero, and the zero point as floats."""
    check_bits(bits, low=2)
    wide = at_least_float32(as_floats("w", w))
    check_not_empty("w", wide)
    if search:
        scale, zero_point = mse_qparams(wide, bits, axis, symmetric=symmetric)
    elif symmetric:
        scale, zero_point = jnp.maximum(absmax_scale(wide, bits, axis), _LEAST_SCALE), None
    else:
        scale, zero_point = minmax_qparams(wide, bits, axis)
    return wide, scale, None if symmetric or zero_point is None else zero_point.astype(wide.dtype)


def _channels(ndim: int, axis: Axis, channel_axis: int | None) -> tuple[tuple[int, ...], int]:
    """The axes of output channels, and the last of them."""
    if channel_axis is not None:
        channels = group_axes(channel_axis, ndim)
    else:
        shared = group_axes(axis, ndim)
        channels = tuple(place for place in range(ndim) if place not in shared) or (ndim - 1,)
    return channels, channels[-1]


def _divisor(w: Array, params: FlexRoundParams) -> Array:
    for name in ("log_s2", "log_s3", "log_s4"):
        if getattr(params, name) is not None:
            check_broadcasts(name, getattr(params, name), jnp.shape(w))
    exponent = params.log_s2 + params.log_s3
    return exponent if params.log_s4 is None else exponent + params.log_s4


def _low_rank(params: LRQParams) -> Array:
    return params.left @ params.right + params.row + params.column


def _codes(w: Array, exponent: Array, params: FlexRoundParams | LRQParams, bits: int) -> tuple[Array, Array]:
    """Codes around zero, as floats, and the grid size; ``exponent`` is the logarithm of all factors but it."""
    check_bits(bits, low=2)
    wide = at_least_float32(as_floats("w", w))
    check_broadcasts("log_s1", params.log_s1, wide.shape)
    if params.start is None or params.log_start is None:
        scale = jnp.exp(params.log_s1)
    else:
        scale = params.start * jnp.exp(params.log_s1 - params.log_start)
    if params.zero_point is None:
        low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    else:
        low, high = -params.zero_point, 2**bits - 1 - params.zero_point
    return clamp_inclusive(round_ste(divide(wide, scale * jnp.exp(exponent))), low, high), scale


def _integers(codes: Array, scale: Array, zero_point: Array | None, bits: int) -> tuple[Array, Array, Array | None]:
    if zero_point is None:
        return codes.astype(jnp.int8), scale, None
    shift = zero_point - 2 ** (bits - 1)
    return (codes + shift).astype(jnp.int8), scale, shift.astype(jnp.int8)
