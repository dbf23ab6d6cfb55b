r"""Euclidean distances between sample sets, a block of rows at a time.

Distances are taken in the difference form $\sum_c (x_c - y_c)^2$. It costs no more than a matrix product of the same
size on a CPU, where XLA fuses it into whatever is done with the distances, and unlike $|x|^2 + |y|^2 - 2 x^\top y$ it
loses nothing for near neighbours far from the origin; the distance of a point to itself is exactly 0.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def squared_distances(point: Float[Array, " dim"], points: Float[Array, "n dim"]) -> Float[Array, " n"]:
    r"""Squared Euclidean distances $\sum_c (y_{jc} - x_c)^2$ from one point to many.

    Args:
      point: the point $x$.
      points: the points $y_j$.

    Returns:
      One squared distance per point.
    """
    return jnp.sum((points - point) ** 2, axis=-1)


def map_rows(function: Callable[[PyTree], PyTree], rows: PyTree[Array], block_size: int) -> PyTree[Array]:
    """Applies a function to each row of some arrays, `block_size` rows at a time.

    Args:
      function: takes the pytree with one row of each array.
      rows: a pytree of arrays with equal first axes.
      block_size: the number of rows worked on at once; bounds the memory of what the function makes.

    Returns:
      The function's results, stacked along a new first axis.
    """
    count = jax.tree.leaves(rows)[0].shape[0]
    # At least two equal blocks, the last one filled up: XLA unrolls a loop of one turn, as well as the rest that
    # `jax.lax.map` leaves of an unequal division, and outside of a loop it doesn't fuse the differences of all pairs
    # into their sum but writes them to memory.
    blocks = min(count, max(2, -(-count // block_size)))
    size = -(-count // blocks)
    index = jnp.minimum(jnp.arange(blocks * size), count - 1).reshape(blocks, size)
    results = jax.lax.map(lambda block: jax.vmap(function)(jax.tree.map(lambda leaf: leaf[block], rows)), index)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:count], results)


def mean_over_pairs(
    function: Callable[[Array], Array],
    x: Float[Array, "n dim"],
    y: Float[Array, "m dim"],
    block_size: int,
    exclude_self: bool = False,
) -> Float[Array, ""]:
    r"""Mean of a function of the squared distance over all pairs, $\frac1{nm}\sum_{ij} f(|x_i - y_j|^2)$.

    The backward pass computes a block's distances again instead of keeping them; it holds the differences in every
    coordinate, `dim` times as much.

    Args:
      function: elementwise function of squared distances.
      x: one point a row.
      y: one point a row.
      block_size: the number of rows of `x` worked on at once.
      exclude_self: leave out the pairs with $i = j$; then `x` and `y` are the same set.

    Returns:
      The mean.
    """
    others = y.shape[0] - exclude_self

    def row_mean(row: tuple[Array, Array]) -> Array:
        index, point = row
        values = function(squared_distances(point, y))
        if exclude_self:
            values = jnp.where(jnp.arange(y.shape[0]) == index, 0, values)
        return values.sum() / others

    return map_rows(jax.checkpoint(row_mean), (jnp.arange(x.shape[0]), x), block_size).mean()
