"""Class labels as the networks take them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def label_vectors(
    class_labels: Shaped[Array, "..."] | None, label_dim: int, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "labels label_dim"] | None:
    """Turns class indices or label vectors into label vectors.

    Args:
      class_labels: indices ``[B]`` of any integer type, or one-hot or soft vectors ``[B, label_dim]`` of any float
        type, or None. An index outside of ``0, ..., label_dim - 1`` gives the zero vector, which means no label.
      label_dim: the number of classes; 0 for a network without labels.
      dtype: of the result.

    Returns:
      Vectors ``[B, label_dim]``; for None a zero vector ``[1, label_dim]``, which broadcasts. None if
      ``label_dim`` is 0.

    Raises:
      TypeError: if the labels are neither integers nor floats.
      ValueError: if the shape doesn't fit, or if labels come with ``label_dim`` 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.nets import label_vectors
      >>> label_vectors(jnp.array([2, 0]), 3).tolist()
      [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    if label_dim == 0:
        if class_labels is not None:
            raise ValueError(f"class_labels must be None when label_dim is 0, got shape {class_labels.shape}")
        return None
    if class_labels is None:
        return jnp.zeros((1, label_dim), dtype)
    if jnp.issubdtype(class_labels.dtype, jnp.integer):
        if class_labels.ndim != 1:
            raise ValueError(f"integer class_labels must have shape [batch], got {class_labels.shape}")
        return jax.nn.one_hot(class_labels, label_dim, dtype=dtype)
    if not jnp.issubdtype(class_labels.dtype, jnp.floating):
        raise TypeError(f"class_labels must be integers or floats, got {class_labels.dtype}")
    if class_labels.ndim != 2 or class_labels.shape[1] != label_dim:
        raise ValueError(f"float class_labels must have shape [batch, {label_dim}], got {class_labels.shape}")
    return class_labels.astype(dtype)
