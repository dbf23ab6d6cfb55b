"""The two passes of softmax as Pallas kernels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from poise.attention.ext_float import ExtFloat, ext_add, ext_exp, ext_sum, power_of_two

ROW_BLOCK = 8


def check_platform(interpret: bool, alternative: str) -> None:
    """Raises a ValueError where kernels can't be compiled.

    Args:
      interpret: whether they are interpreted, which goes anywhere.
      alternative: the implementation to name.
    """
    if not interpret and jax.default_backend() not in ("gpu", "tpu"):
        raise ValueError(
            f"implementation='pallas' needs a GPU or TPU, this is {jax.default_backend()}: use {alternative!r}, or "
            "'pallas_interpret' to try the kernels"
        )


def _padded(x: Array, block_size: int) -> tuple[Array, int]:
    rows, columns = x.shape
    size = min(block_size, columns)
    fill = [(0, -rows % ROW_BLOCK), (0, -columns % size)]
    return jnp.pad(x, fill, constant_values=-jnp.inf), size


def _sums_kernel(x_ref: Any, mantissa_ref: Any, exponent_ref: Any, *, size: int) -> None:
    """One block of rows: an accumulator for each lane of a block of columns, added up at the end."""

    def add(block, total):
        return ext_add(total, ext_exp(x_ref[:, pl.ds(block * size, size)]))

    lanes = ext_exp(jnp.full((x_ref.shape[0], size), -jnp.inf, x_ref.dtype))
    total = ext_sum(jax.lax.fori_loop(0, x_ref.shape[1] // size, add, lanes), 1, keepdims=True)
    mantissa_ref[...] = total.mantissa
    exponent_ref[...] = total.exponent


def pallas_sums(x: Float[Array, "rows columns"], block_size: int, *, interpret: bool) -> ExtFloat:
    """Each row's sum of exponentials ``[rows, 1]``."""
    check_platform(interpret, "xla")
    rows = x.shape[0]
    x, size = _padded(x, block_size)
    column = pl.BlockSpec((ROW_BLOCK, 1), lambda i: (i, 0))
    found = pl.pallas_call(
        functools.partial(_sums_kernel, size=size),
        grid=(x.shape[0] // ROW_BLOCK,),
        in_specs=[pl.BlockSpec((ROW_BLOCK, x.shape[1]), lambda i: (i, 0))],
        out_specs=[column, column],
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], 1), x.dtype)] * 2,
        interpret=interpret,
    )(x)
    return ExtFloat(*(part[:rows] for part in found))


def _normalize_kernel(x_ref: Any, inverse_ref: Any, exponent_ref: Any, out_ref: Any) -> None:
    part = ext_exp(x_ref[...])
    out_ref[...] = part.mantissa * inverse_ref[...] * power_of_two(part.exponent - exponent_ref[...])


def pallas_normalize(
    x: Float[Array, "rows columns"], total: ExtFloat, block_size: int, *, interpret: bool
) -> Float[Array, "rows columns"]:
    """``exp(x) / total``, with 0 for a total of 0."""
    check_platform(interpret, "xla")
    rows, columns = x.shape
    x, size = _padded(x, block_size)
    empty = total.mantissa == 0
    inverse = jnp.where(empty, 0, 1 / jnp.where(empty, 1, total.mantissa))
    inverse, exponent = (jnp.pad(part, [(0, x.shape[0] - rows), (0, 0)]) for part in (inverse, total.exponent))
    block = pl.BlockSpec((ROW_BLOCK, size), lambda i, j: (i, j))
    column = pl.BlockSpec((ROW_BLOCK, 1), lambda i, j: (i, 0))
    out = pl.pallas_call(
        _normalize_kernel,
        grid=(x.shape[0] // ROW_BLOCK, x.shape[1] // size),
        in_specs=[block, column, column],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=interpret,
    )(x, inverse, exponent)
    return out[:rows, :columns]
