"""Distances, and working through rows in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from poise.metrics.distances import map_rows, mean_over_pairs, squared_distances


def test_distance_of_a_point_to_itself_is_exactly_zero():
    points = 1e4 + jax.random.normal(jax.random.key(0), (20, 30))
    assert not np.diagonal(jax.vmap(squared_distances, in_axes=(0, None))(points, points)).any()


@pytest.mark.parametrize("rows", [1, 2, 7, 12])
@pytest.mark.parametrize("block_size", [1, 3, 6, 100])
def test_every_row_once_and_in_order(rows, block_size):
    values = jnp.arange(rows, dtype=jnp.float32), jnp.ones((rows, 2))
    doubled, summed = map_rows(lambda row: (2 * row[0], row[1].sum() + row[0]), values, block_size)
    assert doubled.tolist() == [2 * i for i in range(rows)]
    assert summed.tolist() == [2 + i for i in range(rows)]


def test_gradient_reaches_every_row_once():
    rows = jnp.arange(7.0)
    gradient = jax.grad(lambda r: (map_rows(lambda x: x**2, r, 3) * jnp.arange(1.0, 8.0)).sum())(rows)
    np.testing.assert_allclose(gradient, 2 * rows * jnp.arange(1.0, 8.0))


def test_mean_over_pairs_without_self():
    x = jnp.array([[0.0], [1.0], [3.0]])
    assert mean_over_pairs(lambda d: d, x, x, block_size=2, exclude_self=True) == pytest.approx((1 + 9 + 4) / 3)
    assert mean_over_pairs(lambda d: d, x, x, block_size=2) == pytest.approx(2 * (1 + 9 + 4) / 9)
