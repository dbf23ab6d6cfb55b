"""Softmax attention block by block: one sweep with a running maximum."""

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


def _forward(plan: Plan, operands: Operands) -> tuple[Array, tuple[Array]]:
    dtype = operands.query.dtype
    key_offset = key_offset_of(plan, operands)

    def block_of_rows(start: Array) -> tuple[Array, tuple[Array]]:
        sweep = Sweep(plan, operands, start, key_offset)
        shape = sweep.count.shape

        def add(block, carry):
            largest, total, out = carry
            scores, seen = sweep.scores(block)
            higher = jnp.maximum(largest, jnp.where(seen, scores, -jnp.inf).max(-1))
            weights = _exp(scores, higher, seen)
            shrink = _shrink(largest, higher)
            out = out * shrink[..., None]
            out += jnp.einsum("bkgts,bksh->bkgth", weights, sweep.columns(operands.value, block))
            return higher, total * shrink + weights.sum(-1), out

        zeros = jnp.zeros(shape, dtype)
        empty = jnp.zeros((*shape, operands.value.shape[-1]), dtype)
        largest, total, out = sweep.over_columns(add, (zeros - jnp.inf, zeros, empty))
        if plan.axis_name is not None:
            highest = jax.lax.pmax(largest, plan.axis_name)
            shrink = _shrink(largest, highest)
            total, out = sum_over_shards(plan, (total * shrink, out * shrink[..., None]))
            largest = highest
        log_total = jnp.log(jnp.where(total > 0, total, 1)) + jnp.where(total > 0, largest, -jnp.inf)
        return out * inverse_where(total, total > 0)[..., None], (log_total,)

    starts = jnp.arange(0, operands.query.shape[3], plan.query_block)
    return jax.tree.map(joined, jax.lax.map(block_of_rows, starts))


def _shrink(old: Array, new: Array) -> Array:
    """``exp(old - new)``, 0 for an ``old`` of minus infinity, without a NaN."""
    return jnp.where(old == -jnp.inf, 0, jnp.exp(jnp.where(old == -jnp.inf, 0, old - new)))


def _exp(scores: Array, reference: Array, seen: Array) -> Array:
    """``exp(scores - reference)`` where seen."""
    seen = seen & (reference != -jnp.inf)[..., None]
    return jnp.where(seen, jnp.exp(jnp.where(seen, scores - reference[..., None], 0)), 0)


def _backward(plan: Plan, operands: Operands, out: Array, statistics: tuple[Array], cotangent: Array) -> tuple:
    dtype = operands.query.dtype
    key_offset = key_offset_of(plan, operands)
    inner = jnp.sum(cotangent * out, -1)

    def block_of_rows(carry, start):
        sweep = Sweep(plan, operands, start, key_offset)
        outward, projected, log_total = (
            take_rows(x, start, plan.query_block) for x in (cotangent, inner, statistics[0])
        )

        def add(block, carry):
            d_query, d_key, d_value, d_bias = carry
            column = block * plan.key_block
            scores, seen = sweep.scores(block)
            weights = _exp(scores, log_total, seen)
            moved = jnp.einsum("bkgth,bksh->bkgts", outward, sweep.columns(operands.value, block))
            d_scores = weights * (moved - projected[..., None])
            d_query += jnp.einsum("bkgts,bksd->bkgtd", d_scores, sweep.columns(operands.key, block))
            d_key = add_at(d_key, jnp.einsum("bkgts,bkgtd->bksd", d_scores, sweep.query), column, 2)
            d_value = add_at(d_value, jnp.einsum("bkgts,bkgth->bksh", weights, outward), column, 2)
            if d_bias is not None:
                d_bias = add_block(d_bias, d_scores, start, column)
            return d_query, d_key, d_value, d_bias

        d_query, *carry = sweep.over_columns(add, (jnp.zeros(sweep.query.shape, dtype), *carry))
        return tuple(carry), d_query

    starts = jnp.arange(0, operands.query.shape[3], plan.query_block)
    empty = tuple(None if x is None else jnp.zeros_like(x) for x in (operands.key, operands.value, operands.bias))
    (d_key, d_value, d_bias), d_query = jax.lax.scan(block_of_rows, empty, starts)
    return sum_over_shards(plan, joined(d_query)), d_key, d_value, d_bias


_attend = blockwise(_forward, _backward)


def chunked_softmax(rows: Rows, plan: Plan) -> tuple[Array, tuple[Array]]:
    """Outputs ``[B, K, G, T, h]`` and the logarithm of each row's sum of exponentials."""
    return _attend(rows, plan)
