"""Products of int8 codes with int32 sums: dense and convolutional layers whose weights are integers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from poise.core.arrays import at_least_float32
from poise.quant.checks import as_floats, check_bits
from poise.quant.power import power_decode_table, power_levels
from poise.quant.qparams import absmax_scale
from poise.quant.quantized_tensor import QuantizedTensor, tensor_codes
from poise.quant.uniform import quantize


def integer_weights(tensor: QuantizedTensor) -> tuple[Int[Array, "..."], Float[Array, "..."], Array | None]:
    r"""A quantized tensor as int8 factors: $w = s\,(c - z)$.

    Half-integer codes become the odd integers $2c + 1$. Power codes are looked up in :func:`power_decode_table`,
    which is exact for $a = 1/2$ at up to 4 bits and within half of $m/127$ else.

    Args:
      tensor: a quantized tensor. ``half_integer`` needs at most 7 bits, ``power`` a single exponent.

    Returns:
      int8 codes of the array's shape, the scale, and the zero point or None.

    Raises:
      ValueError: if the codes would not fit in int8, or the exponent is not a single one.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import integer_weights, quantized_tensor
      >>> tensor = quantized_tensor(jnp.array([-2, 0, 1]), jnp.float32(0.5), bits=2, scheme="half_integer")
      >>> integer_weights(tensor)[0].tolist()
      [-3, 1, 3]
    """
    codes = tensor_codes(tensor)
    if tensor.scheme == "half_integer":
        if tensor.bits > 7:
            raise ValueError(f"bits must be at most 7 for integer products of half-integer codes, got {tensor.bits}")
        return 2 * codes + jnp.int8(1), tensor.scale, None
    if tensor.scheme == "power":
        if np.size(tensor.exponent) != 1:
            raise ValueError(f"exponent must be one number, got shape {np.shape(tensor.exponent)}")
        table = power_decode_table(jnp.reshape(tensor.exponent, ()), tensor.bits)
        factors = table[codes.astype(jnp.int32) + power_levels(tensor.bits) + 1]
        return factors, tensor.scale / table[-1].astype(tensor.scale.dtype), None
    return codes, tensor.scale, tensor.zero_point


def quantize_activations(
    x: Float[Array, "..."],
    axis: int | tuple[int, ...],
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
) -> tuple[Int[Array, "..."], Array]:
    r"""int8 codes of activations: with a scale of their own for each token, or with a fixed one.

    Args:
      x: floating activations.
      axis: the axes that share a scale, where it is taken from the data.
      scale: a fixed scale, from calibration; None for :func:`absmax_scale` over ``axis``.
      zero_point: of a fixed scale, in [-128, 127].

    Returns:
      The codes and the scale, in at least float32.

    Raises:
      ValueError: if ``x`` holds no floats, or there is a zero point without a scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import quantize_activations
      >>> codes, scale = quantize_activations(jnp.array([[1.0, -0.4], [0.0, 0.0]]), axis=1)
      >>> codes.tolist()
      [[127, -51], [0, 0]]
    """
    x = at_least_float32(as_floats("x", x))
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point needs a scale: activations with their own scales have none")
        scale = absmax_scale(x, 8, axis)
    scale = jnp.asarray(scale, x.dtype)
    return quantize(x, scale, zero_point, bits=8), scale


def int8_dot(
    x: Float[Array, "*batch inputs"],
    weight: QuantizedTensor,
    *,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike | None = None,
) -> Float[Array, "*batch features"]:
    r"""A dense layer in integers: $x$ is quantized, int8 times int8 is summed in int32, and scaled once.

    With codes $c_x, c_w$, scales $s_x, s_w$, zero points $z_x, z_w$ and $K$ terms,

    $$y = s_x s_w \Big[\sum c_x c_w - z_w\sum c_x - z_x\sum c_w + K z_x z_w\Big].$$

    Scales of groups along the inputs are applied group by group. This is for inference: rounding passes no gradient to
    ``x``.

    Args:
      x: ``[..., inputs]``, floating.
      weight: a quantized kernel ``[inputs, features]``; its scale is one number, ``[1, features]`` or
        ``[groups, features]``.
      scale: a fixed scale of the activations, a scalar or ``[..., 1]``; None for one of its own for each row of ``x``
        (token).
      zero_point: of a fixed scale, in [-128, 127].

    Returns:
      ``[..., features]`` in the dtype of ``x``.

    Raises:
      ValueError: if the shapes don't fit, ``x`` holds no floats, or there are more inputs (in one group) than int32
        surely holds the sum of: 131 071 without zero points, 65 793 with one on either side, 33 025 with both.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import absmax_scale, int8_dot, quantize, quantized_tensor
      >>> x, w = jax.random.normal(jax.random.key(0), (2, 16)), jax.random.normal(jax.random.key(1), (16, 3))
      >>> scale = absmax_scale(w, 8, 0)
      >>> weight = quantized_tensor(quantize(w, scale, bits=8), scale, bits=8)
      >>> bool(jnp.allclose(int8_dot(x, weight), x @ w, atol=0.1))
      True
    """
    if weight.ndim != 2 or x.ndim < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"weight must have shape [inputs, features] with inputs of x {x.shape}, got {weight.shape}")
    factors, w_scale, w_zero = integer_weights(weight)
    codes, x_scale = quantize_activations(x, -1, scale, zero_point)
    inputs, features = weight.shape
    groups = w_scale.shape[0] if w_scale.ndim else 1
    check_terms(inputs // groups, term_limit(zero_point is not None, w_zero is not None))
    codes = codes.reshape(*codes.shape[:-1], groups, inputs // groups)
    factors = factors.reshape(groups, inputs // groups, features)
    # Contract within groups, which are a batch: [groups, ..., features].
    sums = jax.lax.dot_general(
        codes,
        factors,
        (((codes.ndim - 1,), (1,)), ((codes.ndim - 2,), (0,))),
        preferred_element_type=jnp.int32,
    )
    sums = jnp.moveaxis(sums, 0, -2)
    x_zero = None if zero_point is None else jnp.asarray(zero_point, jnp.int32)
    if w_zero is not None:
        w_zero = jnp.broadcast_to(w_zero.astype(jnp.int32), (groups, w_zero.shape[-1] if w_zero.ndim else 1))
        sums = sums - w_zero * jnp.sum(codes, -1, dtype=jnp.int32)[..., None]
    if x_zero is not None:
        sums = sums - x_zero * jnp.sum(factors, 1, dtype=jnp.int32)
        if w_zero is not None:
            sums = sums + (inputs // groups) * x_zero * w_zero
    out = jnp.sum(sums.astype(x_scale.dtype) * jnp.broadcast_to(w_scale, (groups, features)), -2)
    return (out * x_scale).astype(x.dtype)


def int8_conv(
    x: Float[Array, "batch *space inputs"],
    weight: QuantizedTensor,
    *,
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "SAME",
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    scale: ArrayLike | None = None,
) -> Float[Array, "batch *new_space features"]:
    r"""A convolution in integers: int8 times int8, summed in int32, scaled once.

    Padding is with zeros, whose code is zero, so activations have no zero point here.

    Args:
      x: ``[batch, ..., inputs]``, floating, any number of spatial axes.
      weight: a quantized kernel ``[..., inputs, features]`` as in Flax, with one scale or one for each feature.
      strides: by spatial axis; None for ones.
      padding: as in ``jax.lax.conv_general_dilated``.
      lhs_dilation: likewise.
      rhs_dilation: likewise.
      feature_group_count: likewise.
      scale: a fixed scale of the activations; None for one of its own for each example.

    Returns:
      ``[batch, ..., features]`` in the dtype of ``x``.

    Raises:
      ValueError: if shapes don't fit, the kernel has scales for anything but features, or a sum has more terms than
        int32 surely holds: 131 071, or 65 793 if the kernel has a zero point.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import absmax_scale, int8_conv, quantize, quantized_tensor
      >>> w = jax.random.normal(jax.random.key(0), (3, 3, 2, 4))
      >>> scale = absmax_scale(w, 8, (0, 1, 2))
      >>> weight = quantized_tensor(quantize(w, scale, bits=8), scale, bits=8)
      >>> int8_conv(jnp.ones((1, 5, 5, 2)), weight).shape
      (1, 5, 5, 4)
    """
    if weight.ndim != x.ndim or x.ndim < 3 or x.shape[-1] != weight.shape[-2] * feature_group_count:
        raise ValueError(
            f"weight must have shape [*space, inputs / {feature_group_count}, features] for x {x.shape}, "
            f"got {weight.shape}"
        )
    factors, w_scale, w_zero = integer_weights(weight)
    if any(size != 1 for size in w_scale.shape[:-1]):
        raise ValueError(f"weight must have one scale or one for each feature, got shape {w_scale.shape}")
    terms = int(np.prod(weight.shape[:-1]))
    check_terms(terms, term_limit(False, w_zero is not None))
    codes, x_scale = quantize_activations(x, tuple(range(1, x.ndim)), scale)
    strides = (1,) * (x.ndim - 2) if strides is None else strides
    letters = "".join(chr(ord("a") + axis) for axis in range(x.ndim - 2))
    layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")

    def convolve(kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            codes,
            kernel,
            tuple(strides),
            padding,
            lhs_dilation=lhs_dilation,
            rhs_dilation=rhs_dilation,
            dimension_numbers=layout,
            feature_group_count=feature_group_count,
            preferred_element_type=jnp.int32,
        )

    sums = convolve(factors)
    if w_zero is not None:
        # What the kernel covers, summed: one more channel of ones for each group of features.
        ones = jnp.ones((*factors.shape[:-1], feature_group_count), jnp.int8)
        covered = jnp.repeat(convolve(ones), factors.shape[-1] // feature_group_count, -1)
        sums = sums - covered * w_zero.astype(jnp.int32).reshape(-1)
    return (sums.astype(x_scale.dtype) * w_scale.reshape(-1) * x_scale).astype(x.dtype)


def int8_dot_general(weight_bits: int = 8) -> Callable[..., Array]:
    """A stand-in for ``jax.lax.dot_general`` that quantizes both sides as they come, for Flax layers' ``dot_general``.

    Each side gets one scale for every row of terms that are summed. Float weights stay float in memory: this is to try
    out what integers do to a model, or to run its products in integers; :func:`export` is what makes it small.

    Args:
      weight_bits: of the right side, from 2 to 8; the left side has 8.

    Returns:
      A function with the arguments of ``jax.lax.dot_general``. It passes no gradient.

    Raises:
      ValueError: if ``weight_bits`` is out of range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import int8_dot_general
      >>> x, w = jax.random.normal(jax.random.key(0), (4, 8)), jax.random.normal(jax.random.key(1), (8, 2))
      >>> y = int8_dot_general()(x, w, (((1,), (0,)), ((), ())))
      >>> bool(jnp.allclose(y, x @ w, atol=0.1))
      True
    """
    check_bits(weight_bits, low=2, name="weight_bits")

    def dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, out_sharding=None):
        del precision, out_sharding
        (left, right), (left_batch, right_batch) = dimension_numbers
        check_terms(int(np.prod([lhs.shape[axis] for axis in left])), term_limit())
        dtype = preferred_element_type or jnp.result_type(lhs, rhs)
        sides = []
        for side, axes, bits in ((lhs, left, 8), (rhs, right, weight_bits)):
            scale = absmax_scale(at_least_float32(side), bits, tuple(axes))
            sides.append((quantize(at_least_float32(side), scale, bits=bits), scale))
        (x, x_scale), (w, w_scale) = sides
        sums = jax.lax.dot_general(x, w, dimension_numbers, preferred_element_type=jnp.int32)
        # The scales have length 1 along what is summed, so their product has the layout of the sums.
        scales = jax.lax.dot_general(x_scale, w_scale, ((left, right), (left_batch, right_batch)))
        return (sums.astype(scales.dtype) * scales).astype(dtype)

    return dot_general


def term_limit(left_zero: bool = False, right_zero: bool = False) -> int:
    r"""How many products of two int8, each perhaps less a zero point, have a sum that int32 surely holds.

    A factor is at most 128 in magnitude, less a zero point at most 255.

    Example:
      >>> from poise.quant.integer_dot import term_limit
      >>> term_limit(), term_limit(False, True), term_limit(True, True)
      (131071, 65793, 33025)
    """
    left, right = (255 if zero else 128 for zero in (left_zero, right_zero))
    return (2**31 - 1) // (left * right)


def check_terms(terms: int, limit: int) -> None:
    """Raises a ValueError if a sum has more terms than :func:`term_limit` allows.

    Example:
      >>> from poise.quant.integer_dot import check_terms, term_limit
      >>> check_terms(131_072, term_limit())
      Traceback (most recent call last):
      ValueError: a sum must have at most 131071 terms to fit in int32, got 131072: split it or use groups
    """
    if terms > limit:
        raise ValueError(f"a sum must have at most {limit} terms to fit in int32, got {terms}: split it or use groups")
