import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poise.nets import label_vectors


@settings(max_examples=20, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 8), min_size=1, max_size=5), dtype=st.sampled_from([np.int32, np.uint8, np.int8])
)
def test_indices(labels, dtype):
    labels = np.array(labels).astype(dtype)
    vectors = label_vectors(jnp.asarray(labels), 6)
    expected = (labels[:, None].astype(int) == np.arange(6)).astype(np.float32)
    np.testing.assert_array_equal(vectors, expected)


def test_soft_vectors_pass_in_the_wanted_dtype():
    soft = jnp.array([[0.25, 0.75]], jnp.bfloat16)
    vectors = label_vectors(soft, 2)
    assert vectors.dtype == jnp.float32
    np.testing.assert_array_equal(vectors, [[0.25, 0.75]])


def test_no_labels():
    assert label_vectors(None, 0) is None
    np.testing.assert_array_equal(label_vectors(None, 3), np.zeros((1, 3)))


@pytest.mark.parametrize(
    ("labels", "label_dim", "error", "message"),
    [
        (jnp.zeros(2, jnp.int32), 0, ValueError, "class_labels must be None when label_dim is 0"),
        (jnp.zeros((2, 3), jnp.int32), 3, ValueError, r"integer class_labels must have shape \[batch\]"),
        (jnp.zeros((2, 4)), 3, ValueError, r"float class_labels must have shape \[batch, 3\], got \(2, 4\)"),
        (jnp.zeros(2, bool), 3, TypeError, "class_labels must be integers or floats, got bool"),
    ],
)
def test_bad_labels(labels, label_dim, error, message):
    with pytest.raises(error, match=message):
        label_vectors(labels, label_dim)
