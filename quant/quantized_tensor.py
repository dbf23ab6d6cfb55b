"""Codes, scale and zero point of one quantized array, as a pytree."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poise.core.arguments import check_choice, check_range, concrete
from poise.core.arrays import at_least_float32
from poise.quant.checks import check_bits, code_range
from poise.quant.packing import pack_bits, packed_length, storage_bits, unpack_bits
from poise.quant.power import power_dequantize

SCHEMES = ("uniform", "half_integer", "power")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "zero_point", "exponent"],
    meta_fields=["bits", "length", "packed_axis", "scheme", "dtype"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedTensor:
    r"""An array as packed integers with a scale; made by :func:`quantized_tensor` and :func:`export`.

    With the integer codes $c$, the scale $s$ and the zero point $z$ (0 if there is none) the array is

    - ``uniform``: $s\,(c - z)$;
    - ``half_integer`` (StatsQ's levels): $s\,(2c + 1)$;
    - ``power``: $s\,\mathrm{sign}(c)\,(|c|/N)^{1/a}$ with $N = 2^{b-1} - 1$.

    It is a pytree, so ``jit``, ``device_put``, sharding and checkpoints take trees of it as they are. The packed axis
    counts from the end, so that ``vmap`` and stacks over leading axes work.

    Attributes:
      codes: int8, or uint8 where several codes share a byte; see :func:`pack_bits`.
      scale: float32 or float64, of the array's rank. Along each axis it is 1, the array's length, or a divisor of it
        (groups of neighbours that share a scale). A scalar for the whole array.
      zero_point: int8, shaped like the scale; None for 0.
      exponent: $a$ of the scheme ``power``, else None.
      bits: the width of a code.
      length: how many codes there are along the packed axis.
      packed_axis: a negative axis.
      scheme: what the codes mean.
      dtype: the name of the dtype of :func:`dequantize_tensor`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import dequantize_tensor, quantized_tensor
      >>> tensor = quantized_tensor(jnp.array([[1, -2, 3]], jnp.int8), jnp.float32(0.5), bits=4)
      >>> tensor.shape, tensor.codes.shape, jax.jit(dequantize_tensor)(tensor).tolist()
      ((1, 3), (1, 2), [[0.5, -1.0, 1.5]])
    """

    codes: Any
    scale: Any
    zero_point: Any = None
    exponent: Any = None
    bits: int = 8
    length: int = 0
    packed_axis: int = -1
    scheme: str = "uniform"
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        shape = list(jnp.shape(self.codes))
        shape[self.packed_axis] = self.length
        return tuple(shape)

    @property
    def ndim(self) -> int:
        """The number of the array's axes."""
        return len(jnp.shape(self.codes))

    @property
    def size(self) -> int:
        """The number of the array's entries."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """The bytes that codes, scales, zero points and exponent take."""
        return tree_nbytes(self)


def quantized_tensor(
    codes: Array,
    scale: Array,
    zero_point: Array | None = None,
    *,
    bits: int,
    packed_axis: int = -1,
    scheme: str = "uniform",
    exponent: Array | None = None,
    dtype: Any = jnp.float32,
) -> QuantizedTensor:
    """Packs codes and puts what belongs to them beside them.

    Args:
      codes: signed integers of the array's shape.
      scale: positive, or zero for groups of zeros; see :class:`QuantizedTensor`.
      zero_point: signed integers of the same width as the codes, shaped like the scale.
      bits: from 1 to 8; 5, 6 and 7 bits are stored in 8.
      packed_axis: the axis along which codes share bytes.
      scheme: ``uniform``, ``half_integer`` or ``power``.
      exponent: for ``power``.
      dtype: of the array that they stand for.

    Returns:
      The tensor.

    Raises:
      ValueError: if the codes are no integers, the scale is not floating, codes or zero points don't fit, shapes don't
        belong together, the scale is negative or not finite, the exponent is missing, too much or not positive, or
        ``dtype`` is not that of floats.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import quantized_tensor
      >>> quantized_tensor(jnp.zeros((4, 6), jnp.int8), jnp.ones((1, 6)), bits=2, packed_axis=0).nbytes
      30
    """
    check_bits(bits)
    codes, scale = jnp.asarray(codes), jnp.asarray(scale)
    _check_axis(packed_axis, codes.ndim)
    _check_codes("codes", codes, bits)
    _check_floating("scale", scale)
    if zero_point is not None:
        zero_point = jnp.asarray(zero_point)
        _check_codes("zero_point", zero_point, bits)
        zero_point = zero_point.astype(jnp.int8)
    tensor = QuantizedTensor(
        codes=pack_bits(codes, storage_bits(bits), packed_axis),
        scale=at_least_float32(scale),
        zero_point=zero_point,
        exponent=None if exponent is None else jnp.asarray(exponent, jnp.float32),
        bits=bits,
        length=codes.shape[packed_axis],
        packed_axis=packed_axis if packed_axis < 0 else packed_axis - codes.ndim,
        scheme=scheme,
        dtype=jnp.dtype(dtype).name,
    )
    check_tensor(tensor)
    return tensor


def check_tensor(tensor: QuantizedTensor) -> None:
    """Raises unless the parts of a tensor belong together, wherever they come from.

    Values of packed codes fit by themselves; other values are checked where they are known.

    Args:
      tensor: a quantized tensor.

    Raises:
      ValueError: naming the part, what it is and what is allowed.

    Example:
      >>> import dataclasses, jax.numpy as jnp
      >>> from poise.quant import quantized_tensor
      >>> from poise.quant.quantized_tensor import check_tensor
      >>> check_tensor(dataclasses.replace(quantized_tensor(jnp.zeros(6, int), jnp.float32(1), bits=4), length=9))
      Traceback (most recent call last):
      ...
      ValueError: codes must hold 9 of 4 bits in 5 bytes along axis -1, got 3
    """
    codes, scale, zero_point, bits = tensor.codes, tensor.scale, tensor.zero_point, tensor.bits
    check_bits(bits)
    check_choice("scheme", tensor.scheme, SCHEMES)
    if not _names_floats(tensor.dtype):
        raise ValueError(f"dtype must be that of floats, got {tensor.dtype!r}")
    _check_axis(tensor.packed_axis, codes.ndim)
    if tensor.packed_axis >= 0:
        raise ValueError(f"packed_axis must lie in [{-codes.ndim}, -1], got {tensor.packed_axis}")
    if tensor.length < 0:
        raise ValueError(f"length must not be negative, got {tensor.length}")
    width = storage_bits(bits)
    _check_dtype("codes", codes, "int8" if width == 8 else "uint8")
    held, needed = codes.shape[tensor.packed_axis], packed_length(tensor.length, width)
    if held != needed:
        raise ValueError(
            f"codes must hold {tensor.length} of {width} bits in {needed} bytes along axis {tensor.packed_axis}, "
            f"got {held}"
        )
    if width == 8:
        _check_codes("codes", codes, bits)
    _check_floating("scale", scale)
    if scale.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"scale must be float32 or float64, got {scale.dtype}")
    _check_groups("scale", scale.shape, tensor.shape)
    known = concrete(scale)
    if known is not None and not np.all(np.isfinite(known) & (known >= 0)):
        raise ValueError("scale must be finite and not negative")
    if (tensor.exponent is not None) != (tensor.scheme == "power"):
        raise ValueError(
            f"exponent is for scheme='power' and only for it, got {tensor.exponent!r} for {tensor.scheme!r}"
        )
    if tensor.exponent is not None:
        _check_floating("exponent", tensor.exponent)
        check_range("exponent", tensor.exponent, 0.0, open_low=True, open_high=True)
    if zero_point is not None:
        if tensor.scheme != "uniform":
            raise ValueError(f"zero_point is for scheme='uniform' only, got one for {tensor.scheme!r}")
        if zero_point.shape != scale.shape:
            raise ValueError(f"zero_point must have the scale's shape {scale.shape}, got {zero_point.shape}")
        _check_dtype("zero_point", zero_point, "int8")
        _check_codes("zero_point", zero_point, bits)


def tensor_codes(tensor: QuantizedTensor) -> Array:
    """The unpacked codes.

    Args:
      tensor: a quantized tensor.

    Returns:
      int8 of the array's shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import quantized_tensor, tensor_codes
      >>> tensor_codes(quantized_tensor(jnp.array([1, -2, 3]), jnp.float32(1), bits=3)).tolist()
      [1, -2, 3]
    """
    return unpack_bits(tensor.codes, storage_bits(tensor.bits), tensor.packed_axis, length=tensor.length)


def dequantize_tensor(tensor: QuantizedTensor, dtype: Any = None) -> Array:
    """The array that a quantized tensor stands for.

    Args:
      tensor: a quantized tensor.
      dtype: of the result; None for that of the array that was quantized.

    Returns:
      The array. In float32, integers times scale without another rounding: what fake quantization gives, bit for bit.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import dequantize_tensor, quantized_tensor
      >>> zero = jnp.array([[-1]], jnp.int8)
      >>> tensor = quantized_tensor(jnp.array([[1, -2, 0]]), jnp.full((1, 1), 0.25), zero, bits=2 + 1)
      >>> dequantize_tensor(tensor).tolist()
      [[0.5, -0.25, 0.25]]
    """
    codes = tensor_codes(tensor)
    scale = spread_groups(tensor.scale, tensor.shape)
    if tensor.scheme == "power":
        values = power_dequantize(codes, scale, tensor.exponent, bits=tensor.bits)
    else:
        whole = codes.astype(jnp.int32)
        if tensor.scheme == "half_integer":
            whole = 2 * whole + 1
        elif tensor.zero_point is not None:
            whole = whole - spread_groups(tensor.zero_point, tensor.shape).astype(jnp.int32)
        values = whole.astype(scale.dtype) * scale
    return values.astype(tensor.dtype if dtype is None else dtype)


def spread_groups(scale: Array, shape: tuple[int, ...]) -> Array:
    """Repeats scales of groups, so that they broadcast against the array.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant.quantized_tensor import spread_groups
      >>> spread_groups(jnp.array([[1.0], [2.0]]), (4, 3)).ravel().tolist()
      [1.0, 1.0, 2.0, 2.0]
    """
    if scale.ndim != len(shape):
        return scale
    for axis, (groups, length) in enumerate(zip(scale.shape, shape, strict=True)):
        if groups not in (1, length):
            scale = jnp.repeat(scale, length // groups, axis)
    return scale


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a :class:`QuantizedTensor`; an ``is_leaf`` for trees with such leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import is_quantized
      >>> is_quantized(jnp.ones(2))
      False
    """
    return isinstance(leaf, QuantizedTensor)


def tree_nbytes(tree: Any) -> int:
    """The bytes that all arrays of a tree take: true ones, since no packed code hides in a wider type.

    Args:
      tree: a pytree of arrays, quantized tensors among them.

    Returns:
      The number of bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import quantized_tensor, tree_nbytes
      >>> tree_nbytes({"kernel": quantized_tensor(jnp.zeros((8, 8), int), jnp.float32(1), bits=4), "bias": jnp.ones(8)})
      68
    """
    return sum(int(np.prod(jnp.shape(leaf))) * jnp.result_type(leaf).itemsize for leaf in jax.tree.leaves(tree))


def _check_axis(axis: int, ndim: int) -> None:
    if ndim == 0:
        raise ValueError("codes must have at least one axis, got a scalar")
    if not -ndim <= axis < ndim:
        raise ValueError(f"packed_axis must lie in [{-ndim}, {ndim - 1}], got {axis}")


def _check_floating(name: str, value: Array) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating, got dtype {value.dtype}")


def _check_dtype(name: str, value: Array, dtype: str) -> None:
    if value.dtype != dtype:
        raise ValueError(f"{name} must have the dtype {dtype}, got {value.dtype}")


def _names_floats(dtype: str) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        return False


def _check_codes(name: str, codes: Array, bits: int) -> None:
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise ValueError(f"{name} must be integers, got dtype {codes.dtype}")
    known = concrete(codes)
    low, high = code_range(bits)
    if known is not None and known.size and (known.min() < low or known.max() > high):
        raise ValueError(f"{name} must lie in [{low}, {high}] at {bits} bits, got {known.min()} to {known.max()}")


def _check_groups(name: str, shape: tuple[int, ...], whole: tuple[int, ...]) -> None:
    if shape == ():
        return
    if len(shape) != len(whole) or any(part == 0 or length % part for part, length in zip(shape, whole, strict=True)):
        raise ValueError(f"{name} must be a scalar or divide the shape {whole} axis by axis, got {shape}")
