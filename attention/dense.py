"""Softplus attention as it reads, with the whole score matrix in memory: the reference for every other form."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from poise.attention.inputs import Rows
from poise.attention.visibility import Extent, visible_block
from poise.attention.weights import DEGENERATE, lssa_weights, power_of, reweight_attention


def dense_scores(rows: Rows, extent: Extent) -> tuple[Array, Array]:
    """All scores ``[B, K, G, T, S]`` and who sees whom."""
    scores = jnp.einsum("bkgtd,bksd->bkgts", rows.query, rows.key)
    scores = scores if rows.bias is None else scores + rows.bias
    return scores, visible_block(rows.visibility, extent, (0, extent.num_queries), (0, extent.num_keys))


def dense_softplus(
    rows: Rows, extent: Extent, power: float | None, offset_min_keys: int, want_residual: bool
) -> tuple[Array, tuple[Array, ...]]:
    """Outputs ``[B, K, G, T, h]`` and the row statistics: the sum r, or the mean m and the norm rho."""
    scores, seen = dense_scores(rows, extent)
    weights = lssa_weights(scores, seen)
    if power is not None:
        weights = reweight_attention(weights, seen, power=power, offset_min_keys=offset_min_keys, num_keys=rows.count)
    out = jnp.einsum("bkgts,bksh->bkgth", weights, rows.value)
    if not want_residual:
        return out, ()
    values = jnp.where(seen, jax.nn.softplus(scores), 0)
    total = values.sum(-1)
    if power is None:
        return out, (total,)
    mean = total / jnp.maximum(rows.count, 1)
    offset = jnp.where(rows.count >= offset_min_keys, 1, 0)
    above = jnp.where(seen, jnp.maximum(values - (offset * mean)[..., None], 0), 0)
    highest = above.max(-1)
    flat = highest <= DEGENERATE * jnp.finfo(values.dtype).eps * values.max(-1)
    shares = power_of(above / jnp.where(flat, 1, highest)[..., None], power).sum(-1)
    return out, (mean, jnp.where(flat, 0, highest * jnp.where(flat, 1, shares) ** (1 / power)))
