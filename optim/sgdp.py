"""SGDP: SGD with momentum without the radial part of its updates where the weights look scale-invariant."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, DTypeLike, Int, PyTree

from poise.core.arguments import check_range, check_real
from poise.optim.channel_axes import ChannelAxesTree, resolve_channel_axes
from poise.optim.leaves import is_absent, next_count, resolve_mask, sum_dtype, unzip
from poise.optim.projection import check_projection, project_leaf


class ScaleBySgdpState(NamedTuple):
    """State of :func:`scale_by_sgdp`.

    Attributes:
      count: the number of updates made.
      momentum: the decaying sum of the gradients.
    """

    count: Int[Array, ""]
    momentum: PyTree


class _Leaf(NamedTuple):
    update: Any
    momentum: Any


def scale_by_sgdp(
    momentum: ArrayLike = 0.0,
    dampening: ArrayLike = 0.0,
    *,
    weight_decay: ArrayLike | optax.Schedule = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    nesterov: bool = False,
    eps: ArrayLike = 1e-8,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    channel_axes: ChannelAxesTree = None,
    project_momentum: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Sums gradients with momentum, removes the radial part of the result, and adds the weight decay.

    For every leaf with weight $p$, gradient $g$, momentum $\beta$ and dampening $\tau$,

    $$m \leftarrow \beta m + (1-\tau) g, \qquad d = m \ \text{ or, with Nesterov, }\ g + \beta m,$$

    then :func:`project_radial` gives $d'$ and a ratio $r$, and the update is $d' + \frac{\lambda r}{1-\beta}p$. The sum
    starts from zero, so that dampening holds from the first step on (``torch.optim.SGD`` exempts that one).

    Args:
      momentum: $\beta$ in [0, 1).
      dampening: $\tau$ in [0, 1].
      weight_decay: $\lambda \ge 0$ or a schedule of it. It is divided by $1-\beta$, as the steps are in effect.
      mask: which leaves decay: None for all, a tree of booleans (or a prefix of one), or a function from the parameters
        to one. Leaves that don't decay are projected all the same.
      nesterov: whether to look ahead along the momentum.
      eps: $\epsilon \ge 0$ of the projection.
      delta: threshold of the projection; 0 makes this SGD with decoupled decay.
      wd_ratio: the factor of the decay of projected leaves, in [0, 1].
      channel_axes: where the output channels are, as in :func:`project_radial`. Under ``optax.inject_hyperparams`` a
        function must be named in ``static_args``, else it is taken for a schedule; so must a function for ``mask``.
      project_momentum: whether to keep the projected sum as the momentum. Has no effect with Nesterov.
      accumulator_dtype: dtype in which the momentum is kept; None for the parameter's.

    Returns:
      A gradient transformation whose ``update`` needs ``params``. Gradients that are None pass through and leave the
      leaf's state alone. Arithmetic on bfloat16 and float16 leaves is done in float32; updates have the gradient's
      dtype.

    Raises:
      ValueError: if an argument is out of range; at ``update``, if ``params`` is None or an axis doesn't fit a leaf.
      TypeError: if a leaf is complex.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import scale_by_sgdp
      >>> tx = scale_by_sgdp(momentum=0.9)
      >>> params = jnp.array([[3.0], [4.0]])
      >>> updates, state = tx.update(jnp.array([[4.0], [-3.0]]), tx.init(params), params)
      >>> updates.ravel().tolist()
      [4.0, -3.0]

    References:
      Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, ICLR 2021,
      https://arxiv.org/abs/2006.08217. The paper's algorithm keeps the momentum as it is. The official code projects
      in place and so, without Nesterov, stores the projected momentum. The paper is followed by default, the code with
      ``project_momentum=True``.
    """
    check_range("momentum", momentum, 0.0, 1.0, open_high=True)
    check_range("dampening", dampening, 0.0, 1.0)
    check_range("weight_decay", weight_decay, 0.0)
    check_projection(delta, wd_ratio, eps, channel_axes)

    def init(params: PyTree) -> ScaleBySgdpState:
        check_real("params", params)
        return ScaleBySgdpState(
            count=jnp.zeros((), jnp.int32), momentum=optax.tree.zeros_like(params, dtype=accumulator_dtype)
        )

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError("scale_by_sgdp needs the parameters: call update(grads, state, params), got params=None")
        check_real("updates", updates)
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        specs = resolve_channel_axes(channel_axes, params)
        decays = resolve_mask(mask, params)

        def leaf(path, g, p, old, spec, decayed):
            if is_absent(g):
                return _Leaf(g, old)
            dtype = sum_dtype(g, p, old)
            beta, fresh, lam, ratio = (
                jnp.asarray(x, dtype) for x in (momentum, 1 - dampening, decay / (1 - momentum), wd_ratio)
            )
            gradient = g.astype(dtype)
            total = beta * old.astype(dtype) + fresh * gradient
            direction = gradient + beta * total if nesterov else total
            step = project_leaf(p, g, lambda: direction, spec, delta, ratio, eps, f" at {jax.tree_util.keystr(path)}")
            kept = step.update if project_momentum and not nesterov else total
            out = step.update + lam * step.ratio * p.astype(dtype) if decayed else step.update
            return _Leaf(out.astype(g.dtype), kept.astype(old.dtype))

        out = jax.tree_util.tree_map_with_path(leaf, updates, params, state.momentum, specs, decays, is_leaf=is_absent)
        pick = lambda field: unzip(lambda x: getattr(x, field), out, _Leaf)  # noqa: E731
        return pick("update"), ScaleBySgdpState(next_count(state.count), pick("momentum"))

    return optax.GradientTransformationExtraArgs(init, update)


def sgdp(
    learning_rate: ArrayLike | optax.Schedule,
    momentum: ArrayLike = 0.0,
    dampening: ArrayLike = 0.0,
    *,
    weight_decay: ArrayLike | optax.Schedule = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    nesterov: bool = False,
    eps: ArrayLike = 1e-8,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    channel_axes: ChannelAxesTree = None,
    project_momentum: bool = False,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGDP: SGD with momentum that keeps scale-invariant weights from growing.

    $p \leftarrow p - \eta(d' + \frac{\lambda r}{1-\beta}p)$ with $d'$ and $r$ of :func:`scale_by_sgdp`.

    Args:
      learning_rate: $\eta$, or a schedule of it.
      momentum: $\beta$ in [0, 1).
      dampening: in [0, 1]; the gradient enters the momentum times one minus this.
      weight_decay: $\lambda \ge 0$ or a schedule of it; multiplied by the learning rate, divided by $1-\beta$.
      mask: which leaves decay; see :func:`scale_by_sgdp`.
      nesterov: whether to look ahead along the momentum.
      eps: $\epsilon \ge 0$ of the projection.
      delta: threshold of the projection; 0 makes this SGD with decoupled decay.
      wd_ratio: the factor of the decay of projected leaves, in [0, 1].
      channel_axes: where the output channels are: None for the last axis, or :func:`flax_channel_axes`, applied to the
        parameters or as it is.
      project_momentum: True for the official code's way of keeping the projected momentum; see :func:`scale_by_sgdp`.
      accumulator_dtype: dtype in which the momentum is kept; None for the parameter's.

    Returns:
      A gradient transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      Without a projection this is SGD:

      >>> import jax.numpy as jnp, optax
      >>> from poise.optim import sgdp
      >>> params, grads = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 1.0]])
      >>> ours, theirs = sgdp(0.1, momentum=0.9, delta=0.0), optax.sgd(0.1, momentum=0.9)
      >>> a, _ = ours.update(grads, ours.init(params), params)
      >>> b, _ = theirs.update(grads, theirs.init(params), params)
      >>> bool((a == b).all())
      True

    References:
      Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, ICLR 2021,
      https://arxiv.org/abs/2006.08217.
    """
    check_range("learning_rate", learning_rate, 0.0)
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_sgdp(
                momentum,
                dampening,
                weight_decay=weight_decay,
                mask=mask,
                nesterov=nesterov,
                eps=eps,
                delta=delta,
                wd_ratio=wd_ratio,
                channel_axes=channel_axes,
                project_momentum=project_momentum,
                accumulator_dtype=accumulator_dtype,
            ),
            optax.scale_by_learning_rate(cast(Any, learning_rate)),
        )
    )
