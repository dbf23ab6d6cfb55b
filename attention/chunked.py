"""Softplus attention block by block: two sweeps over the keys where rows are re-weighted, one where they aren't."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poise.attention.blocks import (
    Operands,
    Plan,
    Sweep,
    add_at,
    add_block,
    blockwise,
    inverse_where,
    joined,
    key_offset_of,
    sum_over_shards,
    take_rows,
)
from poise.attention.inputs import Rows
from poise.attention.weights import DEGENERATE, power_of


class Statistics(NamedTuple):
    """What the backward pass needs of each row.

    Attributes:
      total: the sum of softplus.
      norm: rho, the p-norm of what is above the mean; 0 where the row keeps plain softplus weights.
    """

    total: Array
    norm: Array


class SoftplusSweep(Sweep):
    """A sweep over softplus values."""

    @property
    def offset(self) -> Array:
        """1 for rows whose mean is subtracted, 0 for those of few keys."""
        return jnp.where(self.count >= self.plan.offset_min_keys, 1, 0).astype(self.operands.query.dtype)

    def softplus(self, block: Array) -> Array:
        """Masked softplus of the scores ``[B, K, G, rows, columns]`` of a block of columns."""
        scores, seen = self.scores(block)
        return jnp.where(seen, jax.nn.softplus(scores), 0)

    def numerators(self, values: Array, base: Array, inverse: Array, inverse_total: Array) -> Array:
        """``(max(f - base, 0) * inverse)^p`` where the row is re-weighted, ``f * inverse_total`` where it isn't."""
        plain = values * inverse_total[..., None]
        if self.plan.power is None:
            return plain
        above = jnp.maximum(values - base[..., None], 0) * inverse[..., None]
        return power_of(above, self.plan.power) + plain


def _forward(plan: Plan, operands: Operands) -> tuple[Array, Statistics]:
    dtype = operands.query.dtype
    key_offset = key_offset_of(plan, operands)

    def block_of_rows(start: Array) -> tuple[Array, Statistics]:
        sweep = SoftplusSweep(plan, operands, start, key_offset)
        shape = sweep.count.shape
        zeros = jnp.zeros(shape, dtype)
        empty = jnp.zeros((*shape, operands.value.shape[-1]), dtype)

        if plan.power is None:  # one sweep: the sum and the weighted values together

            def add(block, carry):
                total, out = carry
                values = sweep.softplus(block)
                out += jnp.einsum("bkgts,bksh->bkgth", values, sweep.columns(operands.value, block))
                return total + values.sum(-1), out

            total, out = sum_over_shards(plan, sweep.over_columns(add, (zeros, empty)))
            return out * inverse_where(total, total > 0)[..., None], Statistics(total, zeros)

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
        inverse, inverse_total = inverse_where(highest, ~flat), inverse_where(total, flat & (total > 0))

        def weigh(block, carry):
            shares, out = carry
            weights = sweep.numerators(sweep.softplus(block), base, inverse, inverse_total)
            out += jnp.einsum("bkgts,bksh->bkgth", weights, sweep.columns(operands.value, block))
            return shares + weights.sum(-1), out

        shares, out = sum_over_shards(plan, sweep.over_columns(weigh, (zeros, empty)))
        norm = jnp.where(flat, 0, highest * jnp.where(flat, 1, shares) ** (1 / plan.power))
        return out * inverse_where(shares, shares > 0)[..., None], Statistics(total, norm)

    starts = jnp.arange(0, operands.query.shape[3], plan.query_block)
    return jax.tree.map(joined, jax.lax.map(block_of_rows, starts))


def _backward(plan: Plan, operands: Operands, out: Array, statistics: Statistics, cotangent: Array) -> tuple:
    dtype = operands.query.dtype
    key_offset = key_offset_of(plan, operands)
    power = 1.0 if plan.power is None else plan.power
    inner = jnp.sum(cotangent * out, -1)

    def block_of_rows(carry, start):
        sweep = SoftplusSweep(plan, operands, start, key_offset)
        take = [take_rows(x, start, plan.query_block) for x in (cotangent, inner, statistics.total, statistics.norm)]
        outward, projected, total, norm = take
        reweighted = norm > 0
        base = sweep.offset * total / jnp.maximum(sweep.count, 1)
        inverse, inverse_total = inverse_where(norm, reweighted), inverse_where(total, ~reweighted & (total > 0))
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
            mean_slope = jnp.where(
                reweighted, sum_over_shards(plan, summed) * sweep.offset / jnp.maximum(sweep.count, 1), 0
            )

        def add(block, carry):
            d_query, d_key, d_value, d_bias = carry
            column = block * plan.key_block
            values = sweep.softplus(block)
            weights = sweep.numerators(values, base, inverse, inverse_total)
            # The derivative of softplus, from its value; 0 where a key isn't seen.
            d_scores = (slopes(values, block) - mean_slope[..., None]) * -jnp.expm1(-values)
            d_query += jnp.einsum("bkgts,bksd->bkgtd", d_scores, sweep.columns(operands.key, block))
            d_key = add_at(d_key, jnp.einsum("bkgts,bkgtd->bksd", d_scores, sweep.query), column, 2)
            d_value = add_at(d_value, jnp.einsum("bkgts,bkgth->bksh", weights, outward), column, 2)
            if d_bias is not None:
                d_bias = add_block(d_bias, d_scores, start, column)
            return d_query, d_key, d_value, d_bias

        d_query = jnp.zeros(sweep.query.shape, dtype)
        d_query, *carry = sweep.over_columns(add, (d_query, *carry))
        return tuple(carry), d_query

    starts = jnp.arange(0, operands.query.shape[3], plan.query_block)
    empty = tuple(None if x is None else jnp.zeros_like(x) for x in (operands.key, operands.value, operands.bias))
    (d_key, d_value, d_bias), d_query = jax.lax.scan(block_of_rows, empty, starts)
    return sum_over_shards(plan, joined(d_query)), d_key, d_value, d_bias


_attend = blockwise(_forward, _backward)


def chunked_softplus(rows: Rows, plan: Plan) -> tuple[Array, tuple[Array, ...]]:
    """Outputs ``[B, K, G, T, h]`` and the row statistics, as :func:`poise.attention.dense.dense_softplus`."""
    out, (total, norm) = _attend(rows, plan)
    return out, (total,) if plan.power is None else (total / jnp.maximum(rows.count, 1), norm)
