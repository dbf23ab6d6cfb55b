"""Confidence-guided annealing: a short training in which only weights close to a threshold may move."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, PyTree

from poise.core.arguments import check_range
from poise.optim.channel_axes import flax_channel_axes
from poise.optim.leaves import is_absent, resolve_mask
from poise.quant.checks import Axis, check_bits
from poise.quant.statsq import high_confidence_mask


def _weights(params: PyTree) -> PyTree:
    """Leaves with at least two axes that are no bias; leaves of integers too, so that these are refused."""
    flat, treedef = jax.tree.flatten(params)
    specs = treedef.flatten_up_to(flax_channel_axes(params))
    floats = [jnp.issubdtype(jnp.result_type(leaf), jnp.floating) for leaf in flat]
    return treedef.unflatten(spec is not None or not real for spec, real in zip(specs, floats, strict=True))


def confidence_guided_annealing(
    inner: optax.GradientTransformation,
    *,
    bits: int,
    boundary_range: ArrayLike = 0.005,
    axis: Axis,
    mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Wraps an optimizer so that weights far from every threshold of StatsQ keep their value, bit for bit.

    At every step, from the weights as they are:

    1. a weight is frozen if :func:`high_confidence_mask` says so; about 99 of 100 are at the default range;
    2. frozen weights get a zero gradient;
    3. the inner optimizer runs;
    4. its updates of frozen weights are dropped, so that neither momentum nor weight decay moves them.

    A weight that leaves the band around its threshold freezes there; one may thaw when the mean of its group changes.
    It is meant for a fine-tune after quantization-aware training, with the last, constant learning rate. The state is
    the inner optimizer's own, so that training may go on with the state that it has.

    Args:
      inner: the optimizer.
      bits: bits of the weights, from 1 to 8. For layers of different bits, nest one wrapper in the other.
      boundary_range: half the width of the band, in units of one level, from 0 to 0.5.
      axis: the axes that share one scale, as for :func:`statsq`; ``0`` for Flax dense kernels.
      mask: which leaves are quantized: a tree of booleans (or a prefix of one), or a function from the parameters to
        one; None for those with at least two axes that are not called ``bias`` or ``scale``. All others train as they
        always do.

    Returns:
      A gradient transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range; at ``update``, if ``params`` is None or a quantized leaf holds no
        floats.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from poise.quant import confidence_guided_annealing
      >>> w = jnp.array([[0.001, -0.5, 0.999, -2.5]])  # thresholds are -1, 0 and 1
      >>> tx = confidence_guided_annealing(optax.adamw(1e-3, weight_decay=0.1), bits=2, axis=1)
      >>> updates, _ = tx.update(jnp.ones((1, 4)), tx.init(w), w)
      >>> (updates != 0).tolist()
      [[True, False, True, False]]

    References:
      Liu, Liu and Cheng, *Oscillation-free Quantization for Low-bit Vision Transformers*,
      https://arxiv.org/abs/2302.02210
    """
    check_bits(bits)
    check_range("boundary_range", boundary_range, 0.0, 0.5)
    extended = optax.with_extra_args_support(inner)

    def frozen(chosen: bool, p: Any) -> Any:
        if not chosen or is_absent(p):
            return False
        return high_confidence_mask(p, bits=bits, boundary_range=boundary_range, axis=axis)

    def keep_free(u: Any, fixed: Any) -> Any:
        return u if fixed is False or is_absent(u) else jnp.where(fixed, jnp.zeros_like(u), u)

    def check(params: PyTree, chosen: PyTree) -> None:
        for (path, leaf), wanted in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(chosen), strict=True
        ):
            if wanted and not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                where = jax.tree_util.keystr(path)
                raise ValueError(f"params must hold floats, got {jnp.result_type(leaf)} at {where or 'the only leaf'}")

    def init(params: PyTree) -> Any:
        check(params, resolve_mask(_weights if mask is None else mask, params))
        return extended.init(params)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        if params is None:
            raise ValueError("params must be given to update: which weights are frozen depends on them")
        chosen = resolve_mask(_weights if mask is None else mask, params)
        check(params, chosen)
        fixed = jax.tree.map(frozen, chosen, params)
        updates = jax.tree.map(keep_free, updates, fixed, is_leaf=is_absent)
        updates, state = extended.update(updates, state, params, **extra_args)
        return jax.tree.map(keep_free, updates, fixed, is_leaf=is_absent), state

    return optax.GradientTransformationExtraArgs(init, update)
