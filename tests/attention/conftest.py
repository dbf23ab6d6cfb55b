"""Small attention problems, and the same computed in float64 by loops over rows."""

import jax.numpy as jnp
import numpy as np
import pytest


def _softplus(s):
    return np.maximum(s, 0) + np.log1p(np.exp(-np.abs(s)))


def row_weights(scores, *, kind, power=15.0, offset_min_keys=4):
    """The weights of one row that sees all of its keys."""
    if kind == "softmax":
        e = np.exp(scores - scores.max())
        return e / e.sum()
    f = _softplus(scores)
    if kind == "lssa":
        return f / f.sum()
    offset = 1.0 if len(f) >= offset_min_keys else 0.0
    z = np.maximum(f / f.mean() - offset, 0)
    if z.max() < 1e-12:
        return f / f.sum()
    return (z / z.max()) ** power / ((z / z.max()) ** power).sum()


def loop_attention(query, key, value, visible, *, kind, normalize, scale=None, bias=None, **options):
    """Attention row by row; axes ``[batch, length, heads, width]``, ``visible`` ``[batch, heads, queries, keys]``."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, num_queries, heads, width = query.shape
    groups = heads // key.shape[2]
    out = np.zeros((batch, num_queries, heads, value.shape[-1]))
    for b, i, n in np.ndindex(batch, num_queries, heads):
        seen = np.flatnonzero(visible[b, n, i])
        if not len(seen):
            continue
        q, k, v = query[b, i, n], key[b, seen, n // groups], value[b, seen, n // groups]
        if normalize:
            q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        c = np.log(width) * np.log(len(seen)) if scale == "length" else scale
        scores = c * (k @ q)
        if bias is not None:
            scores = scores + bias[b, n, i, seen]
        out[b, i, n] = row_weights(scores, kind=kind, **options) @ v
    return out


@pytest.fixture(scope="session")
def reference():
    return loop_attention


@pytest.fixture(scope="session")
def draw():
    """Queries, keys and values ``[batch, length, heads, width]``."""

    def arrays(batch=2, queries=7, keys=7, heads=4, key_heads=2, width=4, value_width=3, seed=0, dtype=np.float32):
        rng = np.random.default_rng(seed)
        shapes = [(queries, heads, width), (keys, key_heads, width), (keys, key_heads, value_width)]
        return tuple(jnp.asarray(rng.standard_normal((batch, *shape)), dtype) for shape in shapes)

    return arrays
