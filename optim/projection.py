"""Removal of the radial part of an update where a weight looks scale-invariant."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from poise.core.arguments import check_range, check_real
from poise.optim.channel_axes import (
    ChannelAxes,
    ChannelAxesTree,
    check_channel_axes,
    resolve_channel_axes,
    row_geometry,
)
from poise.optim.leaves import is_absent, sum_dtype, unzip
from poise.optim.radial import NOT_PROJECTED, radial


class Projected(NamedTuple):
    """One leaf after the projection. Ratio and view keep the leaf's rank: size 1 on every axis but the stack's."""

    update: Array
    ratio: Array
    view: Array


def project_leaf(
    weight: Array,
    grad: Array,
    direction: Callable[[], Array],
    spec: ChannelAxes | None,
    delta: ArrayLike,
    wd_ratio: ArrayLike,
    eps: ArrayLike,
    where: str = "",
) -> Projected:
    """The projection of one leaf; see :func:`project_radial`. The update comes back in the direction's dtype.

    The direction is computed wherever it is needed: what it is made of should be there already.
    """
    update = direction()
    dtype = sum_dtype(weight, grad, update)
    geometry = row_geometry(weight.shape, spec, where)
    if geometry is None:
        ones = jnp.ones((1,) * weight.ndim, dtype)
        return Projected(update, ones, jnp.zeros(ones.shape, jnp.int32))
    delta, wd_ratio, eps = (jnp.asarray(number, dtype) for number in (delta, wd_ratio, eps))
    p = weight.astype(dtype)
    found = radial(p, grad.astype(dtype), lambda: direction().astype(dtype), geometry, delta, eps)
    return Projected(
        update=(update.astype(dtype) - found.coefficient * p).astype(update.dtype),
        ratio=jnp.where(found.view == NOT_PROJECTED, jnp.ones((), dtype), wd_ratio),
        view=found.view,
    )


def check_projection(delta: ArrayLike, wd_ratio: ArrayLike, eps: ArrayLike, channel_axes: ChannelAxesTree) -> None:
    """Raises for thresholds, ratios and axes that are out of range; tracers pass."""
    check_range("delta", delta, 0.0)
    check_range("wd_ratio", wd_ratio, 0.0, 1.0)
    check_range("eps", eps, 0.0)
    check_channel_axes(channel_axes)


def _squeezed(x: Array, weight: Array, spec: ChannelAxes | None) -> Array:
    geometry = row_geometry(weight.shape, spec)
    batch = geometry.batch if geometry else ()
    return jnp.squeeze(x, tuple(axis for axis in range(weight.ndim) if axis not in batch))


def project_radial(
    params: PyTree[Float[Array, "..."] | None],
    grads: PyTree[Float[Array, "..."] | None],
    updates: PyTree[Float[Array, "..."] | None],
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    eps: ArrayLike = 1e-8,
    channel_axes: ChannelAxesTree = None,
) -> tuple[PyTree, PyTree]:
    r"""Removes an update's part along the weight, where the gradient says that the loss ignores the weight's length.

    A weight $p$ is seen as rows $p_r$, first one for each output channel, then as a single row. For each view in turn,
    with rows of $n$ values and

    $$\cos_r = \frac{|\langle p_r, g_r\rangle|}{\max(\|p_r\|, \epsilon)\max(\|g_r\|, \epsilon)},$$

    if $\max_r\cos_r < \delta/\sqrt n$, then every row of the update loses its radial part,
    $u_r \leftarrow u_r - \hat p_r\langle\hat p_r, u_r\rangle$ with $\hat p_r = p_r/(\|p_r\|+\epsilon)$, the ratio
    for the weight decay is ``wd_ratio``, and no other view is tried. If neither applies, the update stays as it is and
    the ratio is 1. Scalars and vectors are never projected.

    A zero gradient has cosine 0, so it does count as orthogonal; so does one
    with a NaN, whose update is NaN anyway. Zero rows stay as they are. Norms and inner products
    of bfloat16 and float16 leaves are taken in float32. Leaves that are None or ``optax.MaskedNode`` in ``updates``
    pass through with ratio None.

    Args:
      params: the weights before the step.
      grads: the gradient of the loss at ``params``, not its average over time.
      updates: the direction to be projected, of any sign and length; the map is linear in it.
      delta: the threshold $\delta \ge 0$; 0 projects nothing.
      wd_ratio: the factor in [0, 1] of the weight decay of projected leaves.
      eps: $\epsilon \ge 0$.
      channel_axes: a :class:`ChannelAxes` for all leaves, a tree of them with None for leaves never to be projected, a
        function from the parameters to such a tree (:func:`flax_channel_axes`), or None for the last axis.

    Returns:
      The projected updates, and for each leaf its ratio: a scalar, or an array over the stack if the leaf has batch
      axes.

    Raises:
      ValueError: if ``delta``, ``wd_ratio`` or ``eps`` is out of range, or an axis is out of range or named twice.
      TypeError: if a leaf is complex.

    Example:
      The loss $\langle w, c\rangle/\|w\|$ ignores the length of $w$, so its gradient is orthogonal to $w$, but the
      momentum need not be:

      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import project_radial
      >>> w = jnp.array([[3.0], [4.0]])
      >>> g = jax.grad(lambda w: w[0, 0] / jnp.linalg.norm(w))(w)
      >>> u, ratio = project_radial(w, g, updates=jnp.array([[1.0], [1.0]]))
      >>> bool(jnp.abs(jnp.vdot(w, u)) < 1e-6), round(float(ratio), 3)
      (True, 0.1)

    References:
      Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, ICLR 2021,
      https://arxiv.org/abs/2006.08217. Equation (11) of the paper lacks the absolute value of the cosine; the official
      code has it, and is followed.
    """
    check_projection(delta, wd_ratio, eps, channel_axes)
    check_real("params", params)
    specs = resolve_channel_axes(channel_axes, params)

    def leaf(path, u, p, g, spec):
        if is_absent(u):
            return u
        projected = project_leaf(p, g, lambda: u, spec, delta, wd_ratio, eps, f" at {jax.tree_util.keystr(path)}")
        return projected._replace(ratio=_squeezed(projected.ratio, p, spec))

    out = jax.tree_util.tree_map_with_path(leaf, updates, params, grads, specs, is_leaf=is_absent)
    return unzip(lambda x: x.update, out, Projected), unzip(lambda x: x.ratio, out, Projected)


def adamp_view(
    params: PyTree[Float[Array, "..."] | None],
    grads: PyTree[Float[Array, "..."] | None],
    delta: ArrayLike = 0.1,
    eps: ArrayLike = 1e-8,
    channel_axes: ChannelAxesTree = None,
) -> PyTree[Int[Array, "..."]]:
    """Tells which leaves AdamP and SGDP project at these weights and gradients, and by which view.

    Args:
      params: the weights.
      grads: the gradient of the loss there.
      delta: the threshold, as in :func:`project_radial`.
      eps: as in :func:`project_radial`.
      channel_axes: as in :func:`project_radial`.

    Returns:
      For each leaf an int32, 0 for not projected, 1 for the channel view, 2 for the layer view: a scalar, or an array
      over the stack if the leaf has batch axes.

    Raises:
      ValueError: if ``delta`` or ``eps`` is negative, or an axis is out of range or named twice.
      TypeError: if a leaf is complex.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.optim import adamp_view
      >>> params = {"kernel": jnp.array([[3.0, 1.0], [4.0, 0.0]]), "bias": jnp.zeros(2)}
      >>> grads = {"kernel": jnp.array([[4.0, 0.0], [-3.0, 2.0]]), "bias": jnp.ones(2)}
      >>> {name: int(view) for name, view in adamp_view(params, grads).items()}
      {'bias': 0, 'kernel': 1}
    """
    check_projection(delta, 1.0, eps, channel_axes)
    check_real("params", params)
    specs = resolve_channel_axes(channel_axes, params)

    def leaf(path, g, p, spec):
        if is_absent(g):
            return g
        view = project_leaf(p, g, lambda: g, spec, delta, 1.0, eps, f" at {jax.tree_util.keystr(path)}").view
        return _squeezed(view, p, spec)

    return jax.tree_util.tree_map_with_path(leaf, grads, params, specs, is_leaf=is_absent)
