"""Softplus attention as Pallas kernels: one forward, two backward.

Each program holds a block of rows and goes through the keys of its head (or the other way round), so nothing is shared
between programs. Backward, the derivative of a row's mean needs a sum over the row first: the kernel of the queries
accumulates what multiplies that sum, and hands the sum to the kernel of the keys and values.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from poise.attention.blocks import Plan, inverse_where
from poise.attention.inputs import Rows
from poise.attention.two_pass_pallas import check_platform
from poise.attention.visibility import key_range, pad_axis
from poise.attention.weights import DEGENERATE, power_of

NOBODY = -(2**31)  # the label of a key that is not there; that of a query that is not there is the next one
BLOCKS = (128, 128)


class _Kernel(NamedTuple):
    """What is static in a kernel.

    Attributes:
      plan: sizes, band and power.
      groups: query heads per key head.
      key_heads: key heads.
      interpret: whether kernels are interpreted.
    """

    plan: Plan
    groups: int
    key_heads: int
    interpret: bool


def _softplus(scores: Array) -> Array:
    return jnp.maximum(scores, 0) + jnp.log1p(jnp.exp(-jnp.abs(scores)))


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Contracts an axis of one matrix with one of another."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=a.dtype)


def _values(plan: Plan, query: Array, key: Array, labels: tuple[Array, Array], row: Any, column: Any) -> Array:
    """Masked softplus of a block of scores."""
    i = row + jax.lax.broadcasted_iota(jnp.int32, (query.shape[0], key.shape[0]), 0)
    j = column + jax.lax.broadcasted_iota(jnp.int32, (query.shape[0], key.shape[0]), 1)
    seen = labels[0][:, None] == labels[1][None, :]
    if plan.extent.left is not None:
        seen &= j >= i - plan.extent.left
    if plan.extent.right is not None:
        seen &= j <= i + plan.extent.right
    return jnp.where(seen, _softplus(_dot(query, key, (1, 1))), 0)


def _block_range(low: Any, high: Any, size: int, number: int) -> tuple[Array, Array]:
    low, high = jnp.asarray(low, jnp.int32), jnp.asarray(high, jnp.int32)
    return jnp.clip(low // size, 0, number), jnp.clip(-(-high // size), 0, number)


def _over_keys(kernel: _Kernel, row: Any, number: int, body: Callable, carry: Any) -> Any:
    plan = kernel.plan
    low, high = key_range(plan.extent, (row, plan.query_block))
    first, last = _block_range(low, high, plan.key_block, number)
    return jax.lax.fori_loop(first, last, lambda block, carry: body(block * plan.key_block, carry), carry)


def _numerators(plan: Plan, values: Array, base: Array, inverse: Array, inverse_total: Array) -> Array:
    plain = values * inverse_total[:, None]
    if plan.power is None:
        return plain
    return power_of(jnp.maximum(values - base[:, None], 0) * inverse[:, None], plan.power) + plain


def _slopes(plan: Plan, values: Array, moved: Array, base: Array, inverse: Array, inverse_total: Array) -> Array:
    """The derivative with respect to softplus, but for the mean's part."""
    slope = jnp.broadcast_to(inverse_total[:, None], values.shape)
    if plan.power is not None:
        above = jnp.maximum(values - base[:, None], 0) * inverse[:, None]
        steep = jnp.where(above > 0, plan.power * inverse[:, None], 0)
        slope += steep if plan.power == 1 else steep * power_of(above, plan.power - 1)
    return moved * slope


def _forward_kernel(kernel: _Kernel, *refs: Any) -> None:
    query_ref, key_ref, value_ref, count_ref, row_label_ref, key_label_ref, out_ref, total_ref, norm_ref = refs
    plan = kernel.plan
    row = pl.program_id(1) * plan.query_block
    query, count, label = query_ref[0], count_ref[0, 0], row_label_ref[0, 0]
    number = key_ref.shape[1] // plan.key_block
    dtype = query.dtype
    zeros = jnp.zeros(query.shape[:1], dtype)
    empty = jnp.zeros((query.shape[0], value_ref.shape[2]), dtype)

    def at(column):
        place = pl.ds(column, plan.key_block)
        return _values(plan, query, key_ref[0, place, :], (label, key_label_ref[0, 0, place]), row, column), place

    if plan.power is None:

        def add(column, carry):
            total, out = carry
            values, place = at(column)
            return total + values.sum(1), out + _dot(values, value_ref[0, place, :], (1, 0))

        total, out = _over_keys(kernel, row, number, add, (zeros, empty))
        out_ref[0] = out * inverse_where(total, total > 0)[:, None]
        total_ref[0, 0] = total
        norm_ref[0, 0] = zeros
        return

    def measure(column, carry):
        total, largest = carry
        values, _ = at(column)
        return total + values.sum(1), jnp.maximum(largest, values.max(1))

    total, largest = _over_keys(kernel, row, number, measure, (zeros, zeros))
    base = jnp.where(count >= plan.offset_min_keys, total / jnp.maximum(count, 1), 0)
    highest = largest - base
    flat = highest <= DEGENERATE * jnp.finfo(dtype).eps * largest
    inverse, inverse_total = inverse_where(highest, ~flat), inverse_where(total, flat & (total > 0))

    def weigh(column, carry):
        shares, out = carry
        values, place = at(column)
        weights = _numerators(plan, values, base, inverse, inverse_total)
        return shares + weights.sum(1), out + _dot(weights, value_ref[0, place, :], (1, 0))

    shares, out = _over_keys(kernel, row, number, weigh, (zeros, empty))
    out_ref[0] = out * inverse_where(shares, shares > 0)[:, None]
    total_ref[0, 0] = total
    norm_ref[0, 0] = jnp.where(flat, 0, highest * jnp.exp(jnp.log(jnp.where(flat, 1, shares)) / plan.power))


def _query_kernel(kernel: _Kernel, *refs: Any) -> None:
    """The derivative of a block of queries, and of the mean of each of its rows."""
    query_ref, key_ref, value_ref, row_label_ref, key_label_ref, outward_ref = refs[:6]
    projected, base, inverse, inverse_total, per_mean = (ref[0, 0] for ref in refs[6:11])
    out_ref, mean_ref = refs[11:]
    plan = kernel.plan
    row = pl.program_id(1) * plan.query_block
    query, outward, label = query_ref[0], outward_ref[0], row_label_ref[0, 0]
    empty, zeros = jnp.zeros_like(query), jnp.zeros_like(base)

    def add(column, carry):
        direct, through_mean, summed = carry
        place = pl.ds(column, plan.key_block)
        key = key_ref[0, place, :]
        values = _values(plan, query, key, (label, key_label_ref[0, 0, place]), row, column)
        moved = _dot(outward, value_ref[0, place, :], (1, 1)) - projected[:, None]
        slopes = _slopes(plan, values, moved, base, inverse, inverse_total)
        sigmoid = -jnp.expm1(-values)
        return (
            direct + _dot(slopes * sigmoid, key, (1, 0)),
            through_mean + _dot(sigmoid, key, (1, 0)),
            # softplus is 0 where a key isn't seen, and nowhere else
            summed + jnp.where(values > 0, slopes, 0).sum(1),
        )

    direct, through_mean, summed = _over_keys(
        kernel, row, key_ref.shape[1] // plan.key_block, add, (empty, empty, zeros)
    )
    mean = summed * per_mean
    out_ref[0] = direct - mean[:, None] * through_mean
    mean_ref[0, 0] = mean


def _key_kernel(kernel: _Kernel, *refs: Any) -> None:
    """The derivatives of a block of keys and values, from all query heads that share them."""
    query_ref, key_ref, value_ref, row_label_ref, key_label_ref, outward_ref = refs[:6]
    rows_refs, (d_key_ref, d_value_ref) = refs[6:11], refs[11:]
    plan, extent = kernel.plan, kernel.plan.extent
    column = pl.program_id(1) * plan.key_block
    key, value, key_label = key_ref[0], value_ref[0], key_label_ref[0, 0]
    number = query_ref.shape[2] // plan.query_block
    low = 0 if extent.right is None else column - extent.right
    high = extent.num_queries if extent.left is None else column + plan.key_block + extent.left
    first, last = _block_range(low, high, plan.query_block, number)

    def of_group(group):
        def add(block, carry):
            d_key, d_value = carry
            row = block * plan.query_block
            place = pl.ds(row, plan.query_block)
            query, outward = query_ref[0, group, place, :], outward_ref[0, group, place, :]
            projected, base, inverse, inverse_total, mean = (ref[0, group, place] for ref in rows_refs)
            values = _values(plan, query, key, (row_label_ref[0, 0, place], key_label), row, column)
            weights = _numerators(plan, values, base, inverse, inverse_total)
            moved = _dot(outward, value, (1, 1)) - projected[:, None]
            slopes = _slopes(plan, values, moved, base, inverse, inverse_total) - mean[:, None]
            d_scores = slopes * -jnp.expm1(-values)
            return d_key + _dot(d_scores, query, (0, 0)), d_value + _dot(weights, outward, (0, 0))

        return add

    carry = jnp.zeros_like(key), jnp.zeros_like(value)
    for group in range(kernel.groups):
        carry = jax.lax.fori_loop(first, last, of_group(group), carry)
    d_key_ref[0], d_value_ref[0] = carry


class _Operands(NamedTuple):
    """As :class:`poise.attention.inputs.Rows`, with labels ``[B, 1, T]``, ``[B, 1, S]``: equal ones see each other."""

    query: Array
    key: Array
    value: Array
    count: Array
    row_label: Array
    key_label: Array


def _forward(kernel: _Kernel, x: _Operands) -> tuple[Array, Array, Array]:
    plan, groups = kernel.plan, kernel.groups
    batch, key_heads, _, num_rows, width = x.query.shape
    num_columns, value_width = x.value.shape[2:]
    heads = batch * key_heads * groups
    per_batch = key_heads * groups
    block = plan.query_block
    of_rows = pl.BlockSpec((1, 1, block), lambda h, i: (h, 0, i))
    statistics = jax.ShapeDtypeStruct((heads, 1, num_rows), x.query.dtype)
    found = pl.pallas_call(
        functools.partial(_forward_kernel, kernel),
        grid=(heads, num_rows // block),
        in_specs=[
            pl.BlockSpec((1, block, width), lambda h, i: (h, i, 0)),
            pl.BlockSpec((1, num_columns, width), lambda h, i: (h // groups, 0, 0)),
            pl.BlockSpec((1, num_columns, value_width), lambda h, i: (h // groups, 0, 0)),
            of_rows,
            pl.BlockSpec((1, 1, block), lambda h, i: (h // per_batch, 0, i)),
            pl.BlockSpec((1, 1, num_columns), lambda h, i: (h // per_batch, 0, 0)),
        ],
        out_specs=[pl.BlockSpec((1, block, value_width), lambda h, i: (h, i, 0)), of_rows, of_rows],
        out_shape=[jax.ShapeDtypeStruct((heads, num_rows, value_width), x.query.dtype), statistics, statistics],
        interpret=kernel.interpret,
    )(
        x.query.reshape(heads, num_rows, width),
        x.key.reshape(-1, num_columns, width),
        x.value.reshape(-1, num_columns, value_width),
        x.count.reshape(heads, 1, num_rows),
        x.row_label,
        x.key_label,
    )
    shape = x.query.shape[:4]
    return found[0].reshape(*shape, value_width), found[1].reshape(shape), found[2].reshape(shape)


def _backward(kernel: _Kernel, x: _Operands, saved: tuple[Array, Array, Array], outward: Array) -> tuple:
    plan, groups = kernel.plan, kernel.groups
    out, total, norm = saved
    batch, key_heads, _, num_rows, width = x.query.shape
    num_columns, value_width = x.value.shape[2:]
    dtype = x.query.dtype
    reweighted = norm > 0
    share = jnp.where(x.count >= plan.offset_min_keys, 1 / jnp.maximum(x.count, 1).astype(dtype), 0)
    rows = [
        jnp.sum(outward * out, -1),
        share * total,
        inverse_where(norm, reweighted),
        inverse_where(total, ~reweighted & (total > 0)),
        jnp.where(reweighted, share, 0),
    ]
    heads, per_batch, pairs = batch * key_heads * groups, key_heads * groups, batch * key_heads
    block = plan.query_block
    keys, values = x.key.reshape(pairs, num_columns, width), x.value.reshape(pairs, num_columns, value_width)
    of_rows = pl.BlockSpec((1, 1, block), lambda h, i: (h, 0, i))
    of_queries = pl.BlockSpec((1, block, width), lambda h, i: (h, i, 0))
    d_query, mean = pl.pallas_call(
        functools.partial(_query_kernel, kernel),
        grid=(heads, num_rows // block),
        in_specs=[
            of_queries,
            pl.BlockSpec((1, num_columns, width), lambda h, i: (h // groups, 0, 0)),
            pl.BlockSpec((1, num_columns, value_width), lambda h, i: (h // groups, 0, 0)),
            pl.BlockSpec((1, 1, block), lambda h, i: (h // per_batch, 0, i)),
            pl.BlockSpec((1, 1, num_columns), lambda h, i: (h // per_batch, 0, 0)),
            pl.BlockSpec((1, block, value_width), lambda h, i: (h, i, 0)),
            *[of_rows] * 5,
        ],
        out_specs=[of_queries, of_rows],
        out_shape=[
            jax.ShapeDtypeStruct((heads, num_rows, width), dtype),
            jax.ShapeDtypeStruct((heads, 1, num_rows), dtype),
        ],
        interpret=kernel.interpret,
    )(
        x.query.reshape(heads, num_rows, width),
        keys,
        values,
        x.row_label,
        x.key_label,
        outward.reshape(heads, num_rows, value_width),
        *(row.reshape(heads, 1, num_rows) for row in rows),
    )
    rows[4] = mean
    block = plan.key_block
    of_keys = pl.BlockSpec((1, block, width), lambda h, j: (h, j, 0))
    of_values = pl.BlockSpec((1, block, value_width), lambda h, j: (h, j, 0))
    all_rows = pl.BlockSpec((1, groups, num_rows), lambda h, j: (h, 0, 0))
    d_key, d_value = pl.pallas_call(
        functools.partial(_key_kernel, kernel),
        grid=(pairs, num_columns // block),
        in_specs=[
            pl.BlockSpec((1, groups, num_rows, width), lambda h, j: (h, 0, 0, 0)),
            of_keys,
            of_values,
            pl.BlockSpec((1, 1, num_rows), lambda h, j: (h // key_heads, 0, 0)),
            pl.BlockSpec((1, 1, block), lambda h, j: (h // key_heads, 0, j)),
            pl.BlockSpec((1, groups, num_rows, value_width), lambda h, j: (h, 0, 0, 0)),
            *[all_rows] * 5,
        ],
        out_specs=[of_keys, of_values],
        out_shape=[jax.ShapeDtypeStruct(keys.shape, dtype), jax.ShapeDtypeStruct(values.shape, dtype)],
        interpret=kernel.interpret,
    )(
        x.query.reshape(pairs, groups, num_rows, width),
        keys,
        values,
        x.row_label,
        x.key_label,
        outward.reshape(pairs, groups, num_rows, value_width),
        *(row.reshape(pairs, groups, num_rows) for row in rows),
    )
    return d_query.reshape(x.query.shape), d_key.reshape(x.key.shape), d_value.reshape(x.value.shape)


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _attend_forward(kernel: _Kernel, x: _Operands) -> tuple:
    found = _forward(kernel, x)
    return found, (x, found)


def _attend_backward(kernel: _Kernel, saved: tuple, cotangents: tuple) -> tuple[_Operands]:
    x, found = saved
    query, key, value = _backward(kernel, x, found, cotangents[0])
    none: Any = None  # counts and labels have no derivatives
    return (_Operands(query, key, value, none, none, none),)


_attend.defvjp(_attend_forward, _attend_backward)


def pallas_softplus(rows: Rows, plan: Plan, *, interpret: bool) -> tuple[Array, tuple[Array, ...]]:
    """Outputs ``[B, K, G, T, h]`` and the row statistics, as :func:`poise.attention.dense.dense_softplus`.

    Raises:
      ValueError: if there is a mask or a bias, or the platform has no kernels.
    """
    for name, x in (("mask", rows.visibility.mask), ("bias", rows.bias)):
        if x is not None:
            raise ValueError(f"{name} is not for implementation='pallas': use 'xla_chunked'")
    check_platform(interpret, "xla_chunked")
    extent, seen = plan.extent, rows.visibility
    batch, key_heads, groups = rows.query.shape[:3]
    num_rows = -(-extent.num_queries // plan.query_block) * plan.query_block
    num_columns = -(-extent.num_keys // plan.key_block) * plan.key_block

    def labels(segments: Array | None, lengths: Array | None, here: int, padded: int, absent: int) -> Array:
        place = jnp.arange(padded)[None]
        there = place < here
        there = there if lengths is None else there & (place < lengths[:, None])
        ids = jnp.zeros((), jnp.int32) if segments is None else pad_axis(segments.astype(jnp.int32), 1, padded)
        return jnp.broadcast_to(jnp.where(there, ids, absent), (batch, padded))[:, None]

    operands = _Operands(
        pad_axis(rows.query, 3, num_rows),
        pad_axis(rows.key, 2, num_columns),
        pad_axis(rows.value, 2, num_columns),
        pad_axis(rows.count, 3, num_rows),
        labels(seen.query_segments, seen.query_lengths, extent.num_queries, num_rows, NOBODY + 1),
        labels(seen.key_segments, seen.key_lengths, extent.num_keys, num_columns, NOBODY),
    )
    out, total, norm = _attend(_Kernel(plan, groups, key_heads, interpret), operands)
    cut = slice(0, extent.num_queries)
    out, (total, norm) = out[..., cut, :], jax.lax.stop_gradient((total[..., cut], norm[..., cut]))
    return out, (total,) if plan.power is None else (total / jnp.maximum(rows.count, 1), norm)
