"""Four ways to represent a value by a network's outputs, and the ablation that shares one of them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from poise.core.arguments import check_range
from poise.core.arrays import at_least_float32
from poise.rl.target_probs import categorical_projection, hl_gauss_probs, two_hot_probs
from poise.rl.value_grids import atoms, bin_centers, bin_edges
from poise.rl.value_loss import categorical_td_loss, expected_value


class ValueTransform(NamedTuple):
    """A representation of values by ``num_outputs`` numbers each, and the loss that fits it.

    A regressor is trained with ``transform.loss(outputs, transform.encode(y))`` and predicts
    ``transform.decode(outputs)``.

    Attributes:
      encode: values ``[...]`` to targets of the loss ``[..., num_targets]``; probabilities, or the value itself.
      decode: outputs ``[..., num_outputs]`` to values ``[...]``.
      support: the value of each output, ``[num_outputs]``; None where the one output is the value.
      loss: ``(outputs, targets) -> [...]``, one loss per example, without a gradient into the targets.
      project: None, or ``(reward, discount, next_outputs) -> targets`` where the whole distribution of the next state
        is carried back, in place of its mean.
    """

    encode: Callable[[Array], Array]
    decode: Callable[[Array], Array]
    support: Float[Array, " outputs"] | None
    loss: Callable[[Array, Array], Array]
    project: Callable[[Array, Array, Array], Array] | None = None

    @property
    def num_outputs(self) -> int:
        """How many outputs a network needs for each value."""
        return 1 if self.support is None else len(self.support)


def hl_gauss(
    v_min: ArrayLike,
    v_max: ArrayLike,
    num_bins: int = 51,
    sigma_ratio: ArrayLike = 0.75,
    centred: bool = False,
) -> ValueTransform:
    r"""Values as histograms of Gaussians, trained by cross-entropy (:func:`hl_gauss_probs`).

    Args:
      v_min: the lower end of the support.
      v_max: the upper end.
      num_bins: $m$.
      sigma_ratio: $\sigma$ in widths of a bin; positive.
      centred: whether the outermost centers lie on the ends (:func:`bin_edges`).

    Returns:
      A transform whose support are the bin centers.

    Raises:
      ValueError: for a range or a number of bins that :func:`bin_edges` refuses, or a ratio that is not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import hl_gauss
      >>> transform = hl_gauss(-10.0, 10.0)
      >>> logits = jnp.log(transform.encode(jnp.array([0.5, 3.0])))
      >>> [f"{value:.3f}" for value in transform.decode(logits)]
      ['0.500', '3.000']

    References:
      Farebrother et al., Stop Regressing, https://arxiv.org/abs/2403.03950.
    """
    check_range("sigma_ratio", sigma_ratio, 0.0, open_low=True, open_high=True)
    edges = bin_edges(v_min, v_max, num_bins, centred)
    sigma = sigma_ratio * (edges[-1] - edges[0]) / num_bins
    centers = bin_centers(edges)
    return ValueTransform(
        encode=lambda values: hl_gauss_probs(values, edges, sigma),
        decode=lambda outputs: expected_value(outputs, centers),
        support=centers,
        loss=categorical_td_loss,
    )


def two_hot(v_min: ArrayLike, v_max: ArrayLike, num_atoms: int = 51) -> ValueTransform:
    r"""Values shared between two neighbouring atoms, trained by cross-entropy (:func:`two_hot_probs`).

    Args:
      v_min: the first atom.
      v_max: the last atom.
      num_atoms: $m$.

    Returns:
      A transform whose support are the atoms.

    Raises:
      ValueError: for a range or a number that :func:`atoms` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import two_hot
      >>> two_hot(0.0, 2.0, 3).encode(jnp.array(1.5)).tolist()
      [0.0, 0.5, 0.5]

    References:
      Farebrother et al., Stop Regressing, https://arxiv.org/abs/2403.03950.
    """
    grid = atoms(v_min, v_max, num_atoms)
    return ValueTransform(
        encode=lambda values: two_hot_probs(values, grid),
        decode=lambda outputs: expected_value(outputs, grid),
        support=grid,
        loss=categorical_td_loss,
    )


def c51(v_min: ArrayLike, v_max: ArrayLike, num_atoms: int = 51) -> ValueTransform:
    r"""Distributions of returns, moved by the Bellman operator and projected (:func:`categorical_projection`).

    Encoding and decoding are those of :func:`two_hot`; what differs is ``project``, which carries the whole
    distribution of the greedy next action back. Its arguments are ``reward`` and ``discount`` ``[...]`` and the chosen
    action's outputs ``[..., num_atoms]``.

    Args:
      v_min: the first atom.
      v_max: the last atom.
      num_atoms: $m$; the paper's 51 give the method its name.

    Returns:
      A transform with ``project``.

    Raises:
      ValueError: for a range or a number that :func:`atoms` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import c51
      >>> transform = c51(0.0, 2.0, 3)
      >>> logits = jnp.log(jnp.array([[0.5, 0.0, 0.5]]))
      >>> transform.project(jnp.array([0.5]), jnp.array([0.5]), logits).tolist()
      [[0.25, 0.5, 0.25]]

    References:
      Bellemare, Dabney, Munos, A Distributional Perspective on Reinforcement Learning,
      https://arxiv.org/abs/1707.06887.
    """
    grid = atoms(v_min, v_max, num_atoms)

    def project(reward, discount, next_outputs):
        reward, outputs = at_least_float32(reward), at_least_float32(next_outputs)
        moved = reward[..., None] + discount[..., None] * jnp.asarray(grid, reward.dtype)
        return jax.lax.stop_gradient(categorical_projection(moved, jax.nn.softmax(outputs, axis=-1), grid))

    return two_hot(v_min, v_max, num_atoms)._replace(project=project)


def _squared_error(values: Array, targets: Array) -> Array:
    if targets.shape != (*values.shape, 1):
        raise ValueError(f"targets must have shape {(*values.shape, 1)}, one number per value, got {targets.shape}")
    return jnp.square(values - jax.lax.stop_gradient(targets)[..., 0])


def scalar() -> ValueTransform:
    r"""The value as the one output, trained by the squared error $(\hat y-y)^2$.

    Returns:
      A transform without support.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import scalar
      >>> transform = scalar()
      >>> outputs, values = jnp.array([[1.0], [2.0]]), jnp.array([3.0, 2.0])
      >>> transform.loss(outputs, transform.encode(values)).tolist()
      [4.0, 0.0]
    """

    def decode(outputs):
        if outputs.shape[-1] != 1:
            raise ValueError(f"outputs must have 1 number per value, got shape {outputs.shape}")
        return at_least_float32(outputs)[..., 0]

    return ValueTransform(
        encode=lambda values: at_least_float32(values)[..., None],
        decode=decode,
        support=None,
        loss=lambda outputs, targets: _squared_error(decode(outputs), targets),
    )


def softmax_scalar(v_min: ArrayLike, v_max: ArrayLike, num_atoms: int = 51) -> ValueTransform:
    r"""The mean of a softmax over atoms, trained by the squared error: tells what the read-out alone gives.

    Args:
      v_min: the first atom.
      v_max: the last atom.
      num_atoms: $m$.

    Returns:
      A transform whose targets are the values themselves.

    Raises:
      ValueError: for a range or a number that :func:`atoms` refuses.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.rl import softmax_scalar
      >>> transform = softmax_scalar(0.0, 2.0, 3)
      >>> float(transform.loss(jnp.zeros(3), transform.encode(jnp.array(3.0))))
      4.0

    References:
      The control "MSE+Softmax" of Farebrother et al., Stop Regressing, https://arxiv.org/abs/2403.03950.
    """
    grid = atoms(v_min, v_max, num_atoms)

    def decode(outputs):
        return expected_value(outputs, grid)

    return ValueTransform(
        encode=lambda values: at_least_float32(values)[..., None],
        decode=decode,
        support=grid,
        loss=lambda outputs, targets: _squared_error(decode(outputs), targets),
    )


def action_outputs(outputs: Array, action: Array) -> Array:
    """The outputs ``[..., num_outputs]`` of one action each, from ``[..., actions, num_outputs]``."""
    return jnp.take_along_axis(outputs, action[..., None, None], axis=-2)[..., 0, :]
