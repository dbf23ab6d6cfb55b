"""An exponential moving average of gradients that starts at the first one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, DTypeLike, Int, PyTree

from poise.core.arguments import check_range
from poise.optim.leaves import is_absent, next_count, sum_dtype, unzip


class AverageGradientsState(NamedTuple):
    """State of :func:`average_gradients`.

    Attributes:
      count: the number of updates made.
      average: the average.
    """

    count: Int[Array, ""]
    average: PyTree


class _Leaf(NamedTuple):
    update: Any
    average: Any


def average_gradients(
    beta: ArrayLike, accumulator_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Replaces gradients by $v_t = (1-\beta)v_{t-1} + \beta g_t$ with $v_1 = g_1$.

    ``optax.ema`` starts at zero, or divides that out; here the first gradient has weight 1 at first and
    $(1-\beta)^{t-1}$ in the end.

    $\beta$ is the paper's and the opposite of a decay: ``average_gradients(0.1)`` forgets as slowly as
    ``optax.ema(0.9)``.

    Args:
      beta: the weight of the *new* gradient, in (0, 1]; one minus the ``decay`` of ``optax.ema``. Small values average
        long, 1 passes gradients through.
      accumulator_dtype: dtype in which the average is kept; None for the parameter's.

    Returns:
      A gradient transformation. Gradients that are None pass through and leave the leaf's state alone. Arithmetic on
      bfloat16 and float16 leaves is done in float32; updates have the gradient's dtype.

    Raises:
      ValueError: if ``beta`` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import average_gradients
      >>> tx = average_gradients(0.25)
      >>> state = tx.init(jnp.zeros(()))
      >>> for g in (4.0, 0.0, 0.0):
      ...     update, state = tx.update(jnp.array(g), state)
      ...     print(float(update))
      4.0
      3.0
      2.25

    References:
      Jiang et al., Learning Unnormalized Statistical Models via Compositional Optimization, ICML 2023,
      https://arxiv.org/abs/2306.07485, whose estimator is averaged this way.
    """
    check_range("beta", beta, 0.0, 1.0, open_low=True)

    def init(params: PyTree) -> AverageGradientsState:
        return AverageGradientsState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params, dtype=accumulator_dtype))

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del params, extra_args

        def leaf(g: Any, old: Any) -> _Leaf:
            if is_absent(g):
                return _Leaf(g, old)
            dtype = sum_dtype(g, old)
            weight = jnp.where(state.count == 0, 1, jnp.asarray(beta, dtype))
            new = (1 - weight) * old.astype(dtype) + weight * g.astype(dtype)
            return _Leaf(new.astype(g.dtype), new.astype(old.dtype))

        out = jax.tree.map(leaf, updates, state.average, is_leaf=is_absent)
        averages = unzip(lambda x: x.average, out, _Leaf)
        return unzip(lambda x: x.update, out, _Leaf), AverageGradientsState(next_count(state.count), averages)

    return optax.GradientTransformationExtraArgs(init, update)
