"""The weight compander: raw weights under any optimizer, effective ones in any model."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from poise.core.arguments import check_choice, check_range
from poise.optim.channel_axes import flax_channel_axes
from poise.optim.companding import (
    check_companding,
    companding,
    companding_bound,
    companding_inverse,
)
from poise.optim.leaves import is_absent, path_names, resolve_mask, sum_dtype

INITIALIZATIONS = ("preserve", "raw")


class Compander(NamedTuple):
    """A reparameterization of a parameter tree as a pair of pure functions; see :func:`compander`.

    Attributes:
      init: ``params -> raw``, what the optimizer trains.
      apply: ``raw -> params``, what the model is applied with. Differentiable.
    """

    init: Callable[[PyTree], PyTree]
    apply: Callable[[PyTree], PyTree]


class CompandedParams(NamedTuple):
    """Raw parameters whose companding is learned as well.

    As a tree of labels, ``CompandedParams("weights", "scales", "scales")`` tells ``optax.partition`` to treat the
    scales in their own way.

    Attributes:
      weights: the raw weights, in the structure of the parameters.
      log_a: the logarithm of the height $a$, one for each companded layer, None elsewhere.
      log_b: the logarithm of the width $b$, likewise.
    """

    weights: PyTree
    log_a: PyTree
    log_b: PyTree


def is_kernel(params: PyTree) -> PyTree:
    """The default mask: True for the leaves called ``kernel``, of dense, convolutional and attention layers alike.

    Args:
      params: a Flax parameter tree, linen or nnx.

    Returns:
      A tree of booleans; biases, embeddings and the scales of normalization layers are False.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim.compander import is_kernel
      >>> is_kernel({"Dense_0": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
      {'Dense_0': {'bias': False, 'kernel': True}}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path_names(path)[-1:] == ("kernel",), params)


def compander(
    kind: str = "arctan",
    *,
    a: ArrayLike | PyTree = 0.2,
    b: ArrayLike | PyTree = 0.1,
    learn: bool = False,
    initialization: str = "preserve",
    clip: float | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] = is_kernel,
    stacked: dict[str, Any] | None = None,
) -> Compander:
    r"""Trains weights through a bounded function that is steep at zero, whatever the model and the optimizer.

    Every chosen leaf is written as $w = \psi(v; a, b)$ with :func:`companding`. The optimizer sees the raw $v$, the
    model
    the effective $w$: the function compresses large weights and drives weights near zero apart, since a step on $v$
    moves $w$ with the learning rate times $(dw/dv)^2$. Weight decay, being part of the optimizer, acts on $v$.

    Args:
      kind: ``arctan``, ``tanh``, ``softsign`` or ``identity`` (a plain model).
      a: the height, positive: one for all leaves, or a tree of them that may be a prefix of the parameters'.
      b: the width, positive, likewise. Steeper than the identity at zero if $a > b$.
      learn: whether each layer trains its own $a$ and $b$ along with its weights. They are kept as logarithms, so they
        stay positive, in float32 at least.
      initialization: ``preserve`` starts from $v = \psi^{-1}(w_0)$, so that the function computed at the first step is
        unchanged; ``raw`` starts from $v = w_0$, which scales small weights by about $a/b$.
      clip: for ``preserve``: None to refuse weights beyond the bound; a number in (0, 1) to clip all weights to that
        part of it. Traced weights can't be refused; those beyond the bound are put just below it.
      mask: which leaves to compand: a tree of booleans (or a prefix of one), or a function from the parameters to one,
        which must look at their structure alone. The default is every leaf called ``kernel``.
      stacked: where layers are stacked along an axis, as in :func:`flax_channel_axes`; each slice has its own learned
        $a$ and $b$.

    Returns:
      ``init`` and ``apply``. The raw tree has the structure of the parameters, and is a :class:`CompandedParams` of
      such trees if ``learn``. Both are elementwise, so they work under jit, vmap, pmap and any sharding.

    Raises:
      ValueError: if ``a``, ``b``, ``kind``, ``initialization`` or ``clip`` is out of range, or ``learn`` is asked of
        ``identity``; from ``init``, if a weight is not below the bound (naming the layer) or the mask chooses nothing.

    Example:
      Neither the model nor the optimizer knows of it:

      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> from poise.optim import compander
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> wc = compander(a=1.0, b=0.5)
      >>> raw = wc.init(params)
      >>> loss = lambda raw: jnp.mean((model.apply({"params": wc.apply(raw)}, x) - 1) ** 2)
      >>> tx = optax.adamw(1e-2)
      >>> updates, _ = tx.update(jax.grad(loss)(raw), tx.init(raw), raw)
      >>> trained = wc.apply(optax.apply_updates(raw, updates))
      >>> jax.tree.structure(trained) == jax.tree.structure(params), bool(jnp.abs(trained["kernel"]).max() < 1.5708)
      (True, True)

    References:
      Cakaj, Mehnert, Yang, Weight Compander: A Simple Weight Reparameterization for Regularization, IJCNN 2023,
      https://arxiv.org/abs/2306.16993. There is no official code; the paper's initial values and its way of
      initialization are not known here, so they are arguments.
    """
    check_choice("initialization", initialization, INITIALIZATIONS)
    for number_a, number_b in [(x, 1.0) for x in jax.tree.leaves(a)] + [(1.0, x) for x in jax.tree.leaves(b)]:
        check_companding(number_a, number_b, kind)
    if clip is not None:
        check_range("clip", clip, 0.0, 1.0, open_low=True, open_high=True)
    if learn and kind == "identity":
        raise ValueError("learn must be False for kind='identity', which has no a and b")

    def over_leaves(function: Callable[..., Any], params: PyTree, *trees: PyTree) -> PyTree:
        """Maps over chosen leaves with their a and b; other leaves go to ``function`` without."""
        chosen = resolve_mask(mask, params)
        heights, widths = (
            jax.tree.map(lambda x, part: jax.tree.map(lambda _: x, part), scale, params) for scale in (a, b)
        )
        return jax.tree_util.tree_map_with_path(
            lambda path, p, m, ha, wb, *rest: p if is_absent(p) else function(path, p, bool(m), ha, wb, *rest),
            params,
            chosen,
            heights,
            widths,
            *trees,
            is_leaf=is_absent,
        )

    def raw_leaf(path, w, chosen, height, width):
        if not chosen or initialization == "raw":
            return w
        where = "/".join(path_names(path))
        limit = companding_bound(height, kind)
        if clip is not None:
            most = (limit * clip).astype(w.dtype)
            w = jnp.clip(w, -most, most)
        elif not isinstance(w, jax.core.Tracer) and w.size and float(jnp.max(jnp.abs(w))) >= float(jnp.min(limit)):
            raise ValueError(
                f"params at {where} must be below the bound {float(jnp.min(limit)):.4g} of kind={kind!r}, got "
                f"{float(jnp.max(jnp.abs(w))):.4g}; raise a, set clip, or use initialization='raw'"
            )
        return companding_inverse(w, height, width, kind)

    def init(params: PyTree) -> PyTree:
        if not any(jax.tree.leaves(resolve_mask(mask, params))):
            raise ValueError(f"mask must choose at least one leaf, got none of {jax.tree.structure(params)}")
        weights = over_leaves(raw_leaf, params)
        if not learn:
            return weights
        specs = flax_channel_axes(params, stacked=stacked)

        def log_scale(index):
            def leaf(path, w, chosen, height, width, spec):
                if not chosen:
                    return None
                batch = spec.batch if spec is not None else ()
                kept = tuple(size if axis in batch else 1 for axis, size in enumerate(w.shape)) if batch else ()
                scale = (height, width)[index]
                return jnp.full(kept, jnp.log(jnp.asarray(scale, sum_dtype(w))))

            return over_leaves(leaf, params, specs)

        return CompandedParams(weights, log_scale(0), log_scale(1))

    def apply(raw: PyTree) -> PyTree:
        if not learn:
            return over_leaves(
                lambda path, v, chosen, height, width: companding(v, height, width, kind) if chosen else v, raw
            )
        if not isinstance(raw, CompandedParams):
            raise TypeError(f"raw must be the CompandedParams that init returned, got {type(raw).__name__}")

        def leaf(path, v, chosen, height, width, log_a, log_b):
            del height, width
            return companding(v, jnp.exp(log_a), jnp.exp(log_b), kind) if chosen else v

        return over_leaves(leaf, raw.weights, raw.log_a, raw.log_b)

    return Compander(init, apply)


def companded_scales(raw: CompandedParams) -> tuple[PyTree[Float[Array, "..."]], PyTree[Float[Array, "..."]]]:
    r"""The learned heights $a$ and widths $b$ of a companded tree.

    Args:
      raw: what ``compander(learn=True).init`` returned, or its trained successor.

    Returns:
      Two trees with a scalar for each companded layer (an array over the stack for stacked ones).

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.optim import companded_scales, compander
      >>> a, b = companded_scales(compander(a=1.0, b=0.5, learn=True).init({"kernel": jnp.ones((2, 2))}))
      >>> float(a["kernel"]), float(b["kernel"])
      (1.0, 0.5)
    """
    return jax.tree.map(jnp.exp, raw.log_a), jax.tree.map(jnp.exp, raw.log_b)
