"""The radial part of an update: which weights look scale-invariant, by which view, and what to take off."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from poise.optim.channel_axes import RowGeometry

NOT_PROJECTED, CHANNEL_VIEW, LAYER_VIEW = 0, 1, 2

# From this size on a leaf is looked at in stages; a conditional costs more than the sums of smaller ones. And the
# number of channels by which the first stage tells that not all of them are orthogonal to their gradients.
STAGED_SIZE, FEW = 1 << 16, 8


class Radial(NamedTuple):
    """What the projection takes off: ``coefficient * weight``. Both keep the leaf's rank.

    Attributes:
      coefficient: of every row, size 1 on the axes within rows.
      view: 0, 1 or 2 for none, the channels' or the layer's; size 1 on every axis but the stack's.
    """

    coefficient: Array
    view: Array


@jax.custom_jvp
def positive_root(square: Array) -> Array:
    """The square root of something nonnegative, with derivative 0 at 0."""
    return jnp.sqrt(square)


@positive_root.defjvp
def _positive_root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (square,), (tangent,) = primals, tangents
    root = positive_root(square)
    return root, jnp.where(square > 0, tangent / (2 * jnp.where(square > 0, root, 1)), 0)


def _quotient(numerator: Array, denominator: Array) -> Array:
    """A quotient that is 0 where the denominator is."""
    nonzero = denominator > 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


class _Sums(NamedTuple):
    """Squared norms and inner product of weights and gradients."""

    weight: Array
    grad: Array
    both: Array

    def cosine(self, eps: Array) -> Array:
        lengths = (jnp.maximum(positive_root(square), eps) for square in (self.weight, self.grad))
        return _quotient(jnp.abs(self.both), math.prod(lengths, start=jnp.ones((), eps.dtype)))


def _sums(weight: Array, grad: Array, axes: tuple[int, ...]) -> _Sums:
    return _Sums(*(jnp.sum(x, axes, keepdims=True) for x in (weight * weight, grad * grad, weight * grad)))


def radial(
    weight: Array, grad: Array, direction: Callable[[], Array], geometry: RowGeometry, delta: Array, eps: Array
) -> Radial:
    """What an update loses, see :func:`poise.optim.project_radial`.

    Everything that decides is a sum over the whole leaf. On a CPU, where each sum is a pass over memory, a large leaf
    is looked at in stages that end as soon as the answer is known: a few channels rule out the channel view for nearly
    every leaf that isn't scale-invariant, and what isn't projected needs no inner product with the update. Elsewhere
    the compiler takes the sums in one pass, and a conditional would make the device wait.

    Args:
      weight: in the dtype of the sums, as the others.
      grad: likewise.
      direction: computes the update; called where it is needed, so that it isn't kept in memory between.
      geometry: of the weight.
      delta: the threshold.
      eps: the softening.
    """

    def at_once() -> Radial:
        return radial_at_once(weight, grad, direction, geometry, delta, eps)

    def in_stages() -> Radial:
        return radial_in_stages(weight, grad, direction, geometry, delta, eps)

    # On explicit and manual axes types say how arrays lie, and both branches of a conditional would have to agree.
    typed = any(kind is not AxisType.Auto for kind in jax.typeof(weight).sharding.mesh.axis_types)
    if weight.size < STAGED_SIZE or typed:
        return at_once()
    return jax.lax.platform_dependent(cpu=in_stages, default=at_once)


def radial_at_once(
    weight: Array, grad: Array, direction: Callable[[], Array], geometry: RowGeometry, delta: Array, eps: Array
) -> Radial:
    """:func:`radial` with all sums, whatever comes out."""
    rows, along = _sums(weight, grad, geometry.within), _along(weight, direction(), geometry)
    *layer, layer_along = (jnp.sum(x, geometry.channel, keepdims=True) for x in (*rows, along))
    layer = _Sums(*layer)
    by_channel = _all_below(rows, geometry, delta, eps)
    by_layer = ~by_channel & (layer.cosine(eps) < delta / math.sqrt(geometry.slice_size))
    coefficient = _coefficient(by_channel, by_layer, (along, layer_along), (rows.weight, layer.weight), eps)
    return Radial(coefficient, _view(by_channel, by_layer))


def radial_in_stages(
    weight: Array, grad: Array, direction: Callable[[], Array], geometry: RowGeometry, delta: Array, eps: Array
) -> Radial:
    """:func:`radial` with the sums that the answer depends on."""
    no_rows = jnp.zeros([1 if axis in geometry.within else n for axis, n in enumerate(weight.shape)], weight.dtype)
    no_layer = jnp.zeros([n if axis in geometry.batch else 1 for axis, n in enumerate(weight.shape)], weight.dtype)
    never = jnp.zeros(no_layer.shape, bool)

    def look_at_channels() -> tuple[Array, Array]:
        rows = _sums(weight, grad, geometry.within)
        return _all_below(rows, geometry, delta, eps), rows.weight

    def look_at_layer() -> tuple[Array, Array]:
        layer = _sums(weight, grad, (*geometry.within, *geometry.channel))
        return layer.cosine(eps) < delta / math.sqrt(geometry.slice_size), layer.weight

    last = geometry.channel[-1]
    maybe = jnp.ones((), bool)
    if weight.shape[last] > FEW:
        few_weights, few_grads = (jax.lax.slice_in_dim(x, 0, FEW, axis=last) for x in (weight, grad))
        maybe = jnp.any(_all_below(_sums(few_weights, few_grads, geometry.within), geometry, delta, eps))
    by_channel, row_weight = jax.lax.cond(maybe, look_at_channels, lambda: (never, no_rows))
    orthogonal, layer_weight = jax.lax.cond(jnp.all(by_channel), lambda: (never, no_layer), look_at_layer)
    by_layer = ~by_channel & orthogonal

    def coefficient() -> Array:
        along = _along(weight, direction(), geometry)
        layer_along = jnp.sum(along, geometry.channel, keepdims=True)
        return _coefficient(by_channel, by_layer, (along, layer_along), (row_weight, layer_weight), eps)

    projected = jnp.any(by_channel | by_layer)
    return Radial(jax.lax.cond(projected, coefficient, lambda: no_rows), _view(by_channel, by_layer))


def _along(weight: Array, update: Array, geometry: RowGeometry) -> Array:
    """The inner products of rows of the weight and the update."""
    return jnp.sum(weight * update, geometry.within, keepdims=True)


def _all_below(rows: _Sums, geometry: RowGeometry, delta: Array, eps: Array) -> Array:
    """Whether the gradients of all rows are nearly orthogonal to them."""
    largest = jnp.max(rows.cosine(eps), axis=geometry.channel, keepdims=True)
    return largest < delta / math.sqrt(geometry.row_size)


def _view(by_channel: Array, by_layer: Array) -> Array:
    return jnp.where(by_channel, CHANNEL_VIEW, jnp.where(by_layer, LAYER_VIEW, NOT_PROJECTED)).astype(jnp.int32)


def _coefficient(
    by_channel: Array, by_layer: Array, along: tuple[Array, Array], weight: tuple[Array, Array], eps: Array
) -> Array:
    """The update's length along the weight over the weight's norm, softened by eps both times; 0 without a view.

    Inner products with the update and squares of the weight come for the rows and for the layer.
    """
    of_view = jnp.where(by_channel, along[0], jnp.where(by_layer, along[1], 0))
    norm = positive_root(jnp.where(by_channel, *weight)) + eps
    norm = jnp.where(norm > 0, norm, 1)
    # The quotient comes last on purpose: XLA fuses cheaper operations into the loop over entries, and repeats them.
    return of_view / norm / norm
