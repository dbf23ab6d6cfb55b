"""Attention block by block: what every weighting shares, on one device or with the keys on several."""

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


def take_rows(x: Array, start: ArrayLike, size: int) -> Array:
    """A block of the rows of an array ``[B, K, G, T, ...]``."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=3)


def add_at(x: Array, update: Array, start: ArrayLike, axis: int) -> Array:
    """The array with an update added to a block of an axis."""
    here = jax.lax.dynamic_slice_in_dim(x, start, update.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, here + update, start, axis)


class Sweep(NamedTuple):
    """One block of rows, and the blocks of columns of which it may see something."""

    plan: Plan
    operands: Operands
    start: Array
    key_offset: Array

    @property
    def query(self) -> Array:
        """The rows' queries, times their scale."""
        return take_rows(self.operands.query, self.start, self.plan.query_block)

    @property
    def count(self) -> Array:
        """The number of keys that each row sees."""
        return take_rows(self.operands.count, self.start, self.plan.query_block)

    def scores(self, block: Array) -> tuple[Array, Array]:
        """The scores ``[B, K, G, rows, columns]`` of a block of columns, and which of them are seen."""
        rows = (self.start, self.plan.query_block)
        columns = (block * self.plan.key_block, self.plan.key_block)
        scores = jnp.einsum("bkgtd,bksd->bkgts", self.query, self.columns(self.operands.key, block))
        if self.operands.bias is not None:
            scores = scores + block_of(self.operands.bias, rows, columns)
        return scores, visible_block(self.operands.visibility, self.plan.extent, rows, columns, self.key_offset)

    def columns(self, x: Array, block: Array) -> Array:
        """A block of the keys or values."""
        return jax.lax.dynamic_slice_in_dim(x, block * self.plan.key_block, self.plan.key_block, axis=2)

    def over_columns(self, body: Callable[[Array, Any], Any], carry: Any) -> Any:
        """Goes through the blocks of columns: ``body(block, carry) -> carry``."""
        size, number = self.plan.key_block, self.operands.key.shape[2] // self.plan.key_block
        low, high = key_range(self.plan.extent, (self.start, self.plan.query_block))
        first = jnp.clip((low - self.key_offset) // size, 0, number)
        last = jnp.clip(-((self.key_offset - high) // size), 0, number)
        return jax.lax.fori_loop(first.astype(jnp.int32), last.astype(jnp.int32), body, carry)


def inverse_where(x: Array, where: Array) -> Array:
    """``1 / x`` where asked for, else 0, without dividing by zero."""
    return jnp.where(where, 1 / jnp.where(where, x, 1), 0)


def sum_over_shards(plan: Plan, x: Any) -> Any:
    """Sums over the devices that share the keys."""
    return x if plan.axis_name is None else jax.lax.psum(x, plan.axis_name)


def key_offset_of(plan: Plan, operands: Operands) -> Array:
    """The position of this device's first key."""
    if plan.axis_name is None:
        return jnp.zeros((), jnp.int32)
    return jax.lax.axis_index(plan.axis_name) * operands.key.shape[2]


def joined(x: Array) -> Array:
    """Blocks of rows ``[blocks, B, K, G, rows, ...]`` one behind the other."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], x.shape[3] * x.shape[4], *x.shape[5:])


def add_block(x: Array, block: Array, row: ArrayLike, column: ArrayLike) -> Array:
    """Adds a block of derivatives to those of an array that was broadcast: summed over its axes of length 1."""
    axes = tuple(axis for axis in range(5) if x.shape[axis] == 1)
    block = block.sum(axes, keepdims=True)
    start = (0, 0, 0, 0 if x.shape[3] == 1 else row, 0 if x.shape[4] == 1 else column)
    here = jax.lax.dynamic_slice(x, start, block.shape)
    return jax.lax.dynamic_update_slice(x, here + block, start)


def _specs(plan: Plan, operands: Operands) -> Operands:
    """Where each operand's axes lie on the mesh: keys on the axis, rows on all of its devices."""
    batch, keys = plan.batch_axis, plan.axis_name

    def along(x: Array | None, axis: int | None) -> Any:
        if x is None:
            return None
        spec: list[Any] = [None] * x.ndim
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


def blockwise(forward: Callable, backward: Callable) -> Callable:
    """Attention from its two passes over what a device holds.

    Args:
      forward: ``(plan, operands) -> (out, statistics)``, the statistics being what the backward pass needs of each row.
      backward: ``(plan, operands, out, statistics, cotangent)`` to the derivatives of query, key, value and bias.

    Returns:
      ``(rows, plan) -> (out, statistics)``; the statistics have no gradient.
    """

    def attend(plan: Plan, operands: Operands) -> tuple[Array, Any]:
        rows = P(plan.batch_axis)
        run = _on_mesh(plan, lambda x: forward(plan, x), (_specs(plan, operands),), (rows, rows))
        return run(operands)

    def attend_forward(plan: Plan, operands: Operands) -> tuple:
        out, statistics = attend(plan, operands)
        return (out, statistics), (operands, out, statistics)

    def attend_backward(plan: Plan, saved: tuple, cotangents: tuple) -> tuple[Operands]:
        operands, out, statistics = saved
        specs, rows = _specs(plan, operands), P(plan.batch_axis)
        run = _on_mesh(
            plan,
            lambda *args: backward(plan, *args),
            (specs, rows, rows, rows),
            (specs.query, specs.key, specs.value, specs.bias),
        )
        query, key, value, bias = run(operands, out, statistics, cotangents[0])
        none: Any = None  # counts and masks have no derivatives
        return (Operands(query, key, value, bias, none, jax.tree.map(lambda _: None, operands.visibility)),)

    differentiable = jax.custom_vjp(attend, nondiff_argnums=(0,))
    differentiable.defvjp(attend_forward, attend_backward)

    def run(rows: Rows, plan: Plan) -> tuple[Array, Any]:
        out, statistics = differentiable(plan, _padded(rows, plan))
        cut = slice(0, plan.extent.num_queries)
        return out[..., cut, :], jax.tree.map(lambda x: jax.lax.stop_gradient(x)[..., cut], statistics)

    return run


def _padded(rows: Rows, plan: Plan) -> Operands:
    """Whole blocks of rows and, for each device, of columns."""
    shards = 1 if plan.mesh is None else plan.mesh.shape[plan.axis_name]
    num_rows = -(-plan.extent.num_queries // plan.query_block) * plan.query_block
    block = shards * plan.key_block
    num_columns = -(-plan.extent.num_keys // block) * block
    bias = rows.bias
    if bias is not None:
        bias = bias if bias.shape[3] == 1 else pad_axis(bias, 3, num_rows)
        bias = bias if bias.shape[4] == 1 else pad_axis(bias, 4, num_columns)
    return Operands(
        pad_axis(rows.query, 3, num_rows),
        pad_axis(rows.key, 2, num_columns),
        pad_axis(rows.value, 2, num_columns),
        bias,
        pad_axis(rows.count, 3, num_rows),
        pad_visibility(rows.visibility, num_rows, num_columns),
    )
