"""Proximal maps at the end of a chain of gradient transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, PyTree

from poise.core.arguments import check_range
from poise.optim.leaves import is_absent, next_count


class ApplyProxState(NamedTuple):
    """State of :func:`apply_prox`.

    Attributes:
      count: the number of updates made.
    """

    count: Int[Array, ""]


def apply_prox(
    prox: Callable[[PyTree, ArrayLike], PyTree], learning_rate: ArrayLike | optax.Schedule
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the step end in a proximal map: $\theta \leftarrow \mathrm{prox}_{\eta h}(\theta + u)$.

    Stands last in a chain, after the updates $u$ have their learning rate and sign; behind ``optax.sgd(lr)`` it makes
    proximal gradient descent. What the map sets to zero is exactly zero after ``optax.apply_updates``.

    Args:
      prox: ``(params, step_size) -> params``, the proximal map of the step size times the penalty, such as
        ``wgsef_penalty(...).prox``; also a projection, which ignores the step size. Under ``optax.inject_hyperparams``
        it must be named in ``static_args``, else it is taken for a schedule.
      learning_rate: the step size $\eta$ that it gets, or a schedule of it: that of the optimizer before it.

    Returns:
      A gradient transformation whose ``update`` needs ``params``. Leaves without an update are left alone.

    Raises:
      ValueError: if ``learning_rate`` is negative; at ``update``, if ``params`` is None.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from poise.optim import apply_prox, prox_wgsef
      >>> penalty = lambda p, step: prox_wgsef(p, step * 2.0, "weights", k=1)
      >>> tx = optax.chain(optax.sgd(0.5), apply_prox(penalty, 0.5))
      >>> params = jnp.array([4.0, 0.5])
      >>> updates, _ = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> optax.apply_updates(params, updates).tolist()
      [2.0, 0.0]
    """
    check_range("learning_rate", learning_rate, 0.0)

    def init(params: PyTree) -> ApplyProxState:
        del params
        return ApplyProxState(jnp.zeros((), jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError("apply_prox needs the parameters: call update(grads, state, params), got params=None")
        step_size = learning_rate(state.count) if callable(learning_rate) else learning_rate
        moved = jax.tree.map(
            lambda u, p: p if is_absent(u) else (p + u).astype(p.dtype), updates, params, is_leaf=is_absent
        )
        out = jax.tree.map(
            lambda u, p, new: u if is_absent(u) else (new - p).astype(u.dtype),
            updates,
            params,
            prox(moved, step_size),
            is_leaf=is_absent,
        )
        return out, ApplyProxState(next_count(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
