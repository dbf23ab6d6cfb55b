"""Groups of weights: names, axes and numbers describe the same partitions; what does not partition is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from poise.optim.groups import group_squares, group_weights, partition, spread, sum_groups

X = np.random.default_rng(0).standard_normal((2, 3, 2, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("filters", (3,)),
        ("channels", (2,)),
        ("rows", (0,)),
        ("weights", (0, 1, 2, 3)),
        ((0, 1), (0, 1)),
        ((-1, -2), (2, 3)),
        ((), ()),
    ],
)
def test_names_and_axes_against_numbers(groups, axes):
    """Sums, spreading and weights, each against the same groups given by number."""
    index = np.indices(X.shape)
    ids = np.zeros(X.shape, int)
    for axis in axes:
        ids = ids * X.shape[axis] + index[axis]
    named, numbered = partition(X.shape, groups), partition(X.shape, ids)
    assert named.count == numbered.count == ids.max() + 1
    sums = sum_groups(jnp.asarray(X), named)
    np.testing.assert_allclose(sums.reshape(-1), sum_groups(jnp.asarray(X), numbered), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sums.reshape(-1), np.bincount(ids.ravel(), X.ravel()), rtol=1e-5, atol=1e-6)
    everywhere = np.broadcast_to(spread(sums, named), X.shape)
    np.testing.assert_allclose(everywhere, spread(sums.reshape(-1), numbered))
    for weights in ("size", "sqrt_size", 2.0, np.linspace(0.5, 2.0, named.count)):
        by_name = weights.reshape([X.shape[a] for a in axes]) if isinstance(weights, np.ndarray) else weights
        a, b = group_weights(by_name, named, jnp.float32), group_weights(weights, numbered, jnp.float32)
        np.testing.assert_array_equal(a.reshape(-1), b)
    assert (named.sizes.reshape(-1) == numbered.sizes).all()
    assert named.sizes.sum() == X.size


def test_squares_of_low_precision_are_summed_in_float32():
    squares = group_squares(jnp.ones((4096, 1), jnp.bfloat16), partition((4096, 1), "filters"))
    assert squares.dtype == jnp.float32
    assert squares.tolist() == [[4096.0]]


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ("neurons", ValueError, "groups must be one of 'filters', 'channels', 'rows', 'weights', got 'neurons'"),
        ((2,), ValueError, r"groups must name axes in \[-2, 1\] for shape \(3, 4\), got \(2,\)"),
        ((0, -2), ValueError, "at most once"),
        ((0.5,), TypeError, "tuple of integers"),
        (3, ValueError, "number every entry"),
        (np.zeros((3, 3), int), ValueError, "number every entry"),
        (np.array([[0, 0, 2, 2]] * 3), ValueError, "every number from 0 on"),
        (np.full((3, 4), -1), ValueError, "every number from 0 on"),
        (np.zeros((3, 4)), TypeError, "concrete array of integers"),
    ],
)
def test_bad_groups(groups, error, message):
    with pytest.raises(error, match=message):
        partition((3, 4), groups)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (0.0, r"weights must lie in \(0, inf\), got 0.0"),
        (np.array([1.0, -1.0, 1.0, 1.0]), "weights must lie"),
        (np.ones(3), r"weights must be a number or an array of shape \(4,\), got shape \(3,\)"),
        ("count", "weights must be None, 'size', 'sqrt_size' or numbers, got 'count'"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        group_weights(weights, partition((3, 4), "filters"), jnp.float32)
