"""AdamP: Adam without the radial part of its updates where the weights look scale-invariant."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, DTypeLike, Int, PyTree

from poise.core.arguments import check_range, check_real, concrete
from poise.optim.channel_axes import ChannelAxesTree, resolve_channel_axes
from poise.optim.leaves import is_absent, next_count, resolve_mask, sum_dtype, unzip
from poise.optim.projection import check_projection, project_leaf
from poise.optim.radial import positive_root


class ScaleByAdamPState(NamedTuple):
    """State of :func:`scale_by_adamp`.

    Attributes:
      count: the number of updates made.
      mu: the average of the gradients.
      nu: the average of their squares.
    """

    count: Int[Array, ""]
    mu: PyTree
    nu: PyTree


class _Leaf(NamedTuple):
    update: Any
    mu: Any
    nu: Any


def scale_by_adamp(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: ArrayLike | optax.Schedule = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    nesterov: bool = False,
    channel_axes: ChannelAxesTree = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients as Adam does, removes the radial part of the result, and adds the weight decay.

    At step $t$, for every leaf with weight $p$ and gradient $g$,

    $$\mu \leftarrow b_1\mu + (1-b_1)g, \qquad \nu \leftarrow b_2\nu + (1-b_2)g^2, \qquad
    u = \frac{\mu}{(1-b_1^t)(\sqrt\nu/\sqrt{1-b_2^t} + \epsilon)},$$

    with $b_1\mu + (1-b_1)g$ (the new $\mu$) in place of $\mu$ under Nesterov. Then :func:`project_radial` gives $u'$
    and a ratio $r$, and the update is $u' + \lambda r p$. The decay has to live in here because of $r$.

    Args:
      b1: decay rate of the average of gradients, in [0, 1).
      b2: decay rate of the average of squared gradients, in [0, 1).
      eps: $\epsilon \ge 0$, outside of the root, and in the projection.
      weight_decay: $\lambda \ge 0$ or a schedule of it.
      mask: which leaves decay: None for all, a tree of booleans (or a prefix of one), or a function from the parameters
        to one. Leaves that don't decay are projected all the same.
      delta: threshold of the projection; 0 makes this AdamW.
      wd_ratio: the factor of the decay of projected leaves, in [0, 1].
      nesterov: whether to look ahead along the momentum.
      channel_axes: where the output channels are, as in :func:`project_radial`. Under ``optax.inject_hyperparams`` a
        function must be named in ``static_args``, else it is taken for a schedule; so must a function for ``mask``.
      mu_dtype: dtype in which $\mu$ is kept; None for the parameter's.

    Returns:
      A gradient transformation whose ``update`` needs ``params``. Gradients that are None pass through and leave the
      leaf's state alone. Arithmetic on bfloat16 and float16 leaves is done in float32; updates have the gradient's
      dtype.

    Raises:
      ValueError: if an argument is out of range; at ``update``, if ``params`` is None or an axis doesn't fit a leaf.
      TypeError: if a leaf is complex.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from poise.optim import scale_by_adamp
      >>> tx = optax.chain(scale_by_adamp(weight_decay=1e-2), optax.scale_by_learning_rate(1e-3))
      >>> params = {"kernel": jnp.array([[1.0], [0.0]])}
      >>> updates, state = tx.update({"kernel": jnp.array([[0.0], [1.0]])}, tx.init(params), params)
      >>> [f"{value:.6f}" for value in updates["kernel"].ravel()]
      ['-0.000001', '-0.001000']

    References:
      Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, ICLR 2021,
      https://arxiv.org/abs/2006.08217. Follows the official code (version 0.3), where the weight decay is multiplied by
      the learning rate and Nesterov's step uses the same bias correction as the plain one.
    """
    check_range("b1", b1, 0.0, 1.0, open_high=True)
    check_range("b2", b2, 0.0, 1.0, open_high=True)
    check_range("weight_decay", weight_decay, 0.0)
    check_projection(delta, wd_ratio, eps, channel_axes)
    known_eps = concrete(eps)
    never_zero = known_eps is not None and bool(np.all(known_eps >= np.finfo(np.float32).tiny))

    def init(params: PyTree) -> ScaleByAdamPState:
        check_real("params", params)
        return ScaleByAdamPState(
            count=jnp.zeros((), jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=mu_dtype),
            nu=optax.tree.zeros_like(params),
        )

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any):
        del extra_args
        if params is None:
            raise ValueError("scale_by_adamp needs the parameters: call update(grads, state, params), got params=None")
        check_real("updates", updates)
        count = next_count(state.count)
        decay = weight_decay(state.count) if callable(weight_decay) else weight_decay
        specs = resolve_channel_axes(channel_axes, params)
        decays = resolve_mask(mask, params)

        def leaf(path, g, p, mu, nu, spec, decayed):
            if is_absent(g):
                return _Leaf(g, mu, nu)
            dtype = sum_dtype(g, p, mu, nu)
            first, new_first, second, new_second, lam, ratio, softening = (
                jnp.asarray(x, dtype) for x in (b1, 1 - b1, b2, 1 - b2, decay, wd_ratio, eps)
            )
            gradient = g.astype(dtype)
            mu_new = first * mu.astype(dtype) + new_first * gradient
            nu_new = second * nu.astype(dtype) + new_second * gradient * gradient
            ahead = first * mu_new + new_first * gradient if nesterov else mu_new
            missing_first, missing_second = (
                -jnp.expm1(count.astype(dtype) * jnp.log1p(-x)) for x in (new_first, new_second)
            )

            def direction():
                denominator = positive_root(nu_new) * (1 / jnp.sqrt(missing_second)) + softening
                numerator = ahead
                if not never_zero:
                    numerator = jnp.where(denominator == 0, 0, ahead)
                    denominator = jnp.where(denominator == 0, 1, denominator)
                return numerator * (1 / missing_first) / denominator

            step = project_leaf(p, g, direction, spec, delta, ratio, eps, f" at {jax.tree_util.keystr(path)}")
            out = step.update + lam * step.ratio * p.astype(dtype) if decayed else step.update
            return _Leaf(out.astype(g.dtype), mu_new.astype(mu.dtype), nu_new.astype(nu.dtype))

        out = jax.tree_util.tree_map_with_path(
            leaf, updates, params, state.mu, state.nu, specs, decays, is_leaf=is_absent
        )
        pick = lambda field: unzip(lambda x: getattr(x, field), out, _Leaf)  # noqa: E731
        return pick("update"), ScaleByAdamPState(count, pick("mu"), pick("nu"))

    return optax.GradientTransformationExtraArgs(init, update)


def adamp(
    learning_rate: ArrayLike | optax.Schedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: ArrayLike | optax.Schedule = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    delta: ArrayLike = 0.1,
    wd_ratio: ArrayLike = 0.1,
    nesterov: bool = False,
    channel_axes: ChannelAxesTree = None,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamP: Adam with decoupled weight decay that keeps scale-invariant weights from growing.

    $p \leftarrow p - \eta(u' + \lambda r p)$ with $u'$ and $r$ of :func:`scale_by_adamp`. Weights that are followed by
    a normalization layer don't change the loss by their length, yet every step of momentum lengthens them, which
    shrinks their effective learning rate. AdamP takes steps that leave the length alone to first order.

    Args:
      learning_rate: $\eta$, or a schedule of it. The official default is 1e-3.
      b1: decay rate of the average of gradients, in [0, 1).
      b2: decay rate of the average of squared gradients, in [0, 1).
      eps: $\epsilon \ge 0$.
      weight_decay: $\lambda \ge 0$ or a schedule of it; multiplied by the learning rate. The official advice is 1e-2.
      mask: which leaves decay; see :func:`scale_by_adamp`.
      delta: threshold of the projection; 0 makes this AdamW.
      wd_ratio: the factor of the decay of projected leaves, in [0, 1].
      nesterov: whether to look ahead along the momentum.
      channel_axes: where the output channels are: None for the last axis, or :func:`flax_channel_axes`, applied to the
        parameters or as it is.
      mu_dtype: dtype in which the average of gradients is kept; None for the parameter's.

    Returns:
      A gradient transformation whose ``update`` needs ``params``.

    Raises:
      ValueError: if an argument is out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.optim import adamp, flax_channel_axes
      >>> tx = adamp(1e-2, weight_decay=1e-2, channel_axes=flax_channel_axes)
      >>> params = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
      >>> grads = jax.grad(lambda p: jnp.sum(p["kernel"] ** 2) + jnp.sum(p["bias"]))(params)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> f"{params['kernel'][0, 0]:.4f}", f"{params['bias'][0]:.4f}"
      ('0.9899', '-0.0100')

    References:
      Heo et al., AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights, ICLR 2021,
      https://arxiv.org/abs/2006.08217.
    """
    check_range("learning_rate", learning_rate, 0.0)
    return optax.with_extra_args_support(
        optax.chain(
            scale_by_adamp(
                b1,
                b2,
                eps,
                weight_decay=weight_decay,
                mask=mask,
                delta=delta,
                wd_ratio=wd_ratio,
                nesterov=nesterov,
                channel_axes=channel_axes,
                mu_dtype=mu_dtype,
            ),
            optax.scale_by_learning_rate(cast(Any, learning_rate)),
        )
    )
