"""Softplus attention block by block: linear memory, forward and backward, on one device or with keys on several."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike

from poise.attention.inputs import Rows
from poise.attention.visibility import (
    Extent,
    Visibility,
    block_of,
    key_range,
    pad_axis,
    pad_visibility,
    visible_block,
)
from poise.attention.weights import DEGENERATE, power_of


class Plan(NamedTuple):
    """How a problem is cut; hashable.

    Attributes:
      extent: the rows and columns that exist.
      power: the power of the re-weighting, None without.
      offset_min_keys: rows that see fewer keys have no offset.
      query_block: rows at a time.
      key_block: columns at a time.
      mesh: the devices that share the keys, or None for one.
      axis_name: the mesh axis that they lie on.
      batch_axis: the mesh axis that the batch lies on, or None.
    """

    extent: Extent
    power: float | None
    offset_min_keys: int
    query_block: int
    key_block: int
    mesh: Mesh | None = None
    axis_name: str | None = None
    batch_axis: str | None = None


class Operands(NamedTuple):
    """What a device holds: all rows, and its part of the keys; padded to whole blocks."""

    query: Array
    key: Array
    value: Array
    bias: Array | None
    count: Array
    visibility: Visibility


class Statistics(NamedTuple):
    """What the backward pass needs of each row.

    Attributes:
      total: the sum of softplus.
      norm: rho, the p-norm of what is above the mean; 0 where the row keeps plain softplus weights.
    """

    total: Array
    norm: Array


def _take(x: Array, start: ArrayLike, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=3)


def _add_at(x: Array, update: Array, start: ArrayLike, axis: int) -> Array:
    here = jax.lax.dynamic_slice_in_dim(x, start, update.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, here + update, start, axis)


class _Sweep(NamedTuple):
    """One block of rows, and the blocks of columns of which it may see something."""

    plan: Plan
    operands: Operands
    start: Array
    key_offset: Array

    @property
    def query(self) -> Array:
        return _take(self.operands.query, self.start, self.plan.query_block)

    @property
    def count(self) -> Array:
        return _take(self.operands.count, self.start, self.plan.query_block)

    @property
    def offset(self) -> Array:
        return jnp.where(self.count >= self.plan.offset_min_keys, 1, 0).astype(self.operands.query.dtype)

    def softplus(self, block: Array) -> Array:
        """Masked softplus of the scores ``[B, K, G, rows, columns]`` of a block of columns."""
        rows = (self.start, self.plan.query_block)
        columns = (block * self.plan.key_block, self.plan.key_block)
        scores = jnp.einsum("bkgtd,bksd->bkgts", self.query, self.columns(self.operands.key, block))
        if self.operands.bias is not None:
            scores = scores + block_of(self.operands.bias, rows, columns)
        seen = visible_block(self.operands.visibility, self.plan.extent, rows, columns, self.key_offset)
        return jnp.where(seen, jax.nn.softplus(scores), 0)

    def columns(self, x: Array, block: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, block * self.plan.key_block, self.plan.key_block, axis=2)

    def over_columns(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        size, number = self.plan.key_block, self.operands.key.shape[2] // self.plan.key_block
        low, high = key_range(self.plan.extent, (self.start, self.plan.query_block))
        first = jnp.clip((low - self.key_offset) // size, 0, number)
        last = jnp.clip(-((self.key_offset - high) // size), 0, number)
        return jax.lax.fori_loop(first.astype(jnp.int32), last.astype(jnp.int32), body, carry)

    def numerators(self, values: Array, base: Array, inverse: Array, inverse_total: Array) -> Array:
        """``(max(f - base, 0) * inverse)^p`` where the row is re-weighted, ``f * inverse_total`` where it isn't."""
        plain = values * inverse_total[..., None]
        if self.plan.power is None:
            return plain
        above = jnp.maximum(values - base[..., None], 0) * inverse[..., None]
        return power_of(above, self.plan.power) + plain


def _inverse(x: Array, where: Array) -> Array:
    return jnp.where(where, 1 / jnp.where(where, x, 1), 0)


def _sum(plan: Plan, x: Any) -> Any:
    return x if plan.axis_name is None else jax.lax.psum(x, plan.axis_name)


def _key_offset(plan: Plan, operands: Operands) -> Array:
    if plan.axis_name is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(plan.axis_name) * operands.key.shape[2]


def _forward(plan: Plan, operands: Operands) -> tuple[Array, Statistics]:
    dtype = operands.query.dtype
    key_offset = _key_offset(plan, operands)

    def block_of_rows(start: Array) -> tuple[Array, Statistics]:
        sweep = _Sweep(plan, operands, start, key_offset)
        shape = sweep.count.shape
        zeros = jnp.zeros(shape, dtype)
        empty = jnp.zeros((*shape, operands.value.shape[-1]), dtype)

        if plan.power is None:  # one sweep: the sum and the weighted values together

            def add(block, carry):
                total, out = carry
                values = sweep.softplus(block)
                out += jnp.einsum("bkgts,bksh->bkgth", values, sweep.columns(operands.value, block))
                return total + values.sum(-1), out

            total, out = _sum(plan, sweep.over_columns(add, (zeros, empty)))
            return out * _inverse(total, total > 0)[..., None], Statistics(total, zeros)

        def measure(block, carry):
            total, largest = carry
            values = sweep.softplus(block)
            return total + values.sum(-1), jnp.maximum(largest, values.max(-1))

        total, largest = sweep.over_columns(measure, (zeros, zeros))
        if plan.axis_name is not None:
            total, largest = jax.lax.psum(total, plan.axis_name), jax.lax.pmax(largest, plan.axis_name)
        base = sweep.offset * total / jnp.maximum(sweep.count, 1)
        highest = largest - base
        flat = highest <= DEGENERATE * jnp.finfo(dtype).eps * largest
        inverse, inverse_total = _inverse(highest, ~flat), _inverse(total, flat & (total > 0))

        def weigh(block, carry):
            shares, out = carry
            weights = sweep.numerators(sweep.softplus(block), base, inverse, inverse_total)
            out += jnp.einsum("bkgts,bksh->bkgth", weights, sweep.columns(operands.value, block))
            return shares + weights.sum(-1), out

        shares, out = _sum(plan, sweep.over_columns(weigh, (zeros, empty)))
        norm = jnp.where(flat, 0, highest * jnp.where(flat, 1, shares) ** (1 / plan.power))
        return out * _inverse(shares, shares > 0)[..., None], Statistics(total, norm)

    starts = jnp.arange(0, operands.query.shape[3], plan.query_block)
    return jax.tree.map(_joined, jax.lax.map(block_of_rows, starts))


def _joined(x: Array) -> Array:
    """Blocks of rows ``[blocks, B, K, G, rows, ...]`` one behind the other."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])


def _backward(plan: Plan, operands: Operands, out: Array, statistics: Statistics, cotangent: Array) -> tuple:
    dtype = operands.query.dtype
    key_offset = _key_offset(plan, operands)
    power = 1.0 if plan.power is None else plan.power
    inner = jnp.sum(cotangent * out, -1)

    def block_of_rows(carry, start):
        sweep = _Sweep(plan, operands, start, key_offset)
        take = [_take(x, start, plan.query_block) for x in (cotangent, inner, statistics.total, statistics.norm)]
        outward, projected, total, norm = take
        reweighted = norm > 0
        base = sweep.offset * total / jnp.maximum(sweep.count, 1)
        inverse, inverse_total = _inverse(norm, reweighted), _inverse(total, ~reweighted & (total > 0))
        zeros = jnp.zeros(total.shape, dtype)

        def slopes(values, block):
            """The derivative with respect to softplus, but for the mean's part."""
            moved = jnp.einsum("bkgth,bksh->bkgts", outward, sweep.columns(operands.value, block))
            moved -= projected[..., None]
            if plan.power is None:
                return moved * inverse_total[..., None]
            above = jnp.maximum(values - base[..., None], 0) * inverse[..., None]
            slope = jnp.where(above > 0, power * inverse[..., None], 0)
            if power != 1:
                slope *= power_of(above, power - 1)
            return moved * (slope + inverse_total[..., None])

        mean_slope = zeros
        if plan.power is not None:
            summed = sweep.over_columns(lambda block, s: s + slopes(sweep.softplus(block), block).sum(-1), zeros)
            mean_slope = jnp.where(reweighted, _sum(plan, summed) * sweep.offset / jnp.maximum(sweep.count, 1), 0)

        def add(block, carry):
            d_query, d_key, d_value, d_bias = carry
            column = block * plan.key_block
            values = sweep.softplus(block)
            weights = sweep.numerators(values, base, inverse, inverse_total)
            # The derivative of softplus, from its value; 0 where a key isn't seen.
            d_scores = (slopes(values, block) - mean_slope[..., None]) * -jnp.expm1(-values)
            d_query += jnp.einsum("bkgts,bksd->bkgtd", d_scores, sweep.columns(operands.key, block))
            d_key = _add_at(d_key, jnp.einsum("bkgts,bkgtd->bksd", d_scores, sweep.query), column, 2)
            d_value = _add_at(d_value, jnp.einsum("bkgts,bkgth->bksh", weights, outward), column, 2)
            if d_bias is not None:
                d_bias = _add_block(d_bias, d_scores, start, column)
            return d_query, d_key, d_value, d_bias

        d_query = jnp.zeros(sweep.query.shape, dtype)
        d_query, *carry = sweep.over_columns(add, (d_query, *carry))
        return tuple(carry), d_query

    starts = jnp.arange(0, operands.query.shape[3], plan.query_block)
    empty = tuple(None if x is None else jnp.zeros_like(x) for x in (operands.key, operands.value, operands.bias))
    (d_key, d_value, d_bias), d_query = jax.lax.scan(block_of_rows, empty, starts)
    return _sum(plan, _joined(d_query)), d_key, d_value, d_bias


def _add_block(x: Array, block: Array, row: ArrayLike, column: ArrayLike) -> Array:
    """Adds a block of derivatives to those of an array that was broadcast: summed over its axes of length 1."""
    axes = tuple(axis for axis in range(5) if x.shape[axis] == 1)
    block = block.sum(axes, keepdims=True)
    start = (0, 0, 0, 0 if x.shape[3] == 1 else row, 0 if x.shape[4] == 1 else column)
    here = jax.lax.dynamic_slice(x, start, block.shape)
    return jax.lax.dynamic_update_slice(x, here + block, start)


def _specs(plan: Plan, operands: Operands) -> Operands:
    """Where each operand's axes lie on the mesh: keys on the axis, rows on all of its devices."""
    batch, keys = plan.batch_axis, plan.axis_name

    def along(x: Array | None, axis: int | None) -> P | None:
        if x is None:
            return None
        spec = [None] * x.ndim
        spec[0] = batch if x.shape[0] > 1 else None
        if axis is not None and x.shape[axis] > 1:
            spec[axis] = keys
        return P(*spec)

    seen = operands.visibility
    return Operands(
        along(operands.query, None),
        along(operands.key, 2),
        along(operands.value, 2),
        along(operands.bias, 4),
        along(operands.count, None),
        Visibility(
            along(seen.mask, 4),
            along(seen.query_segments, None),
            along(seen.key_segments, 1),
            along(seen.query_lengths, None),
            along(seen.key_lengths, None),
        ),
    )


def _on_mesh(plan: Plan, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
    if plan.mesh is None:
        return function
    return jax.shard_map(function, mesh=plan.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _attend(plan: Plan, operands: Operands) -> tuple[Array, Statistics]:
    specs = _specs(plan, operands)
    rows = P(plan.batch_axis)
    run = _on_mesh(plan, lambda x: _forward(plan, x), (specs,), (rows, Statistics(rows, rows)))
    return run(operands)


def _attend_forward(plan: Plan, operands: Operands) -> tuple:
    out, statistics = _attend(plan, operands)
    return (out, statistics), (operands, out, statistics)


def _attend_backward(plan: Plan, saved: tuple, cotangents: tuple) -> tuple[Operands]:
    operands, out, statistics = saved
    specs, rows = _specs(plan, operands), P(plan.batch_axis)
    run = _on_mesh(
        plan,
        lambda *args: _backward(plan, *args),
        (specs, rows, Statistics(rows, rows), rows),
        (specs.query, specs.key, specs.value, specs.bias),
    )
    d_query, d_key, d_value, d_bias = run(operands, out, statistics, cotangents[0])
    nothing = jax.tree.map(lambda _: None, operands.visibility)
    return (Operands(d_query, d_key, d_value, d_bias, None, nothing),)


attend = jax.custom_vjp(_attend, nondiff_argnums=(0,))
attend.defvjp(_attend_forward, _attend_backward)


def chunked_softplus(rows: Rows, plan: Plan) -> tuple[Array, tuple[Array, ...]]:
    """Outputs ``[B, K, G, T, h]`` and the row statistics, as :func:`poise.attention.dense.dense_softplus`."""
    extent = plan.extent
    shards = 1 if plan.mesh is None else plan.mesh.shape[plan.axis_name]
    num_rows = -(-extent.num_queries // plan.query_block) * plan.query_block
    block = shards * plan.key_block
    num_columns = -(-extent.num_keys // block) * block
    bias = rows.bias
    if bias is not None:
        bias = bias if bias.shape[3] == 1 else pad_axis(bias, 3, num_rows)
        bias = bias if bias.shape[4] == 1 else pad_axis(bias, 4, num_columns)
    operands = Operands(
        pad_axis(rows.query, 3, num_rows),
        pad_axis(rows.key, 2, num_columns),
        pad_axis(rows.value, 2, num_columns),
        bias,
        pad_axis(rows.count, 3, num_rows),
        pad_visibility(rows.visibility, num_rows, num_columns),
    )
    out, (total, norm) = attend(plan, operands)
    total, norm = jax.lax.stop_gradient((total, norm))
    cut = slice(0, extent.num_queries)
    if plan.power is None:
        return out[..., cut, :], (total[..., cut],)
    return out[..., cut, :], ((total / jnp.maximum(operands.count, 1))[..., cut], norm[..., cut])
