"""Heads and networks that give several numbers for the value of each action."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from poise.core.arguments import check_count


class CategoricalHead(nn.Module):
    r"""A linear layer that gives ``num_bins`` logits for the value of each action.

    Attributes:
      num_actions: how many actions there are; 1 for a plain regressor.
      num_bins: logits per action: bins, atoms, or 1 for a scalar value.
      dtype: of the computation; None keeps that of the features.
      kernel_init: initializer of the weights.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import CategoricalHead
      >>> head, features = CategoricalHead(num_actions=3, num_bins=51), jnp.ones((2, 16))
      >>> head.apply(head.init(jax.random.key(0), features), features).shape
      (2, 3, 51)
    """

    num_actions: int
    num_bins: int
    dtype: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, features: Float[Array, "*batch features"]) -> Float[Array, "*batch actions bins"]:
        """Computes the logits.

        Args:
          features: the last hidden layer.

        Returns:
          Logits, bins last.

        Raises:
          TypeError: if ``num_actions`` or ``num_bins`` is no integer.
          ValueError: if one of them is below 1.
        """
        check_count("num_actions", self.num_actions)
        check_count("num_bins", self.num_bins)
        dense = nn.Dense(self.num_actions * self.num_bins, dtype=self.dtype, kernel_init=self.kernel_init, name="dense")
        return dense(features).reshape(*features.shape[:-1], self.num_actions, self.num_bins)


class ValueMLP(nn.Module):
    r"""A perceptron with ReLU from observations to ``num_bins`` logits for each action.

    Attributes:
      num_actions: how many actions there are; 1 for a plain regressor.
      num_bins: logits per action.
      hidden: widths of the hidden layers.
      dtype: of the computation; None is that of floating observations, float32 for others.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.nets import ValueMLP
      >>> net, observation = ValueMLP(3, 51, (16,)), jnp.ones((2, 10, 5), bool)
      >>> net.apply(net.init(jax.random.key(0), observation), observation).shape
      (2, 3, 51)
    """

    num_actions: int
    num_bins: int
    hidden: Sequence[int] = (256, 128)
    dtype: Any = None

    @nn.compact
    def __call__(self, observation: Shaped[Array, "batch *event"]) -> Float[Array, "batch actions bins"]:
        """Computes the logits.

        Args:
          observation: a batch of observations of any shape and real dtype; each is flattened.

        Returns:
          Logits, bins last.

        Raises:
          ValueError: for widths or numbers below 1.
        """
        for width in self.hidden:
            check_count("hidden", width)
        h = observation.reshape(observation.shape[0], -1)
        if not jnp.issubdtype(h.dtype, jnp.floating):
            h = h.astype(jnp.float32)
        for i, width in enumerate(self.hidden):
            h = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"dense{i}")(h))
        return CategoricalHead(self.num_actions, self.num_bins, self.dtype, name="head")(h)
