"""The steps of a reconstruction: what is learned of one block, in one scan, for all the functions that do so."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from poise.core.arguments import check_count, check_range, concrete
from poise.core.arrays import at_least_float32
from poise.optim.leaves import path_names
from poise.quant.qdrop import qdrop
from poise.quant.quantizers import Quantizer
from poise.quant.rules import QParams

Layers = Quantizer | Mapping[str, Quantizer]
BlockApply = Callable[[PyTree, Array, PyTree, PRNGKeyArray | None], Array]


def reconstruction_loss(out: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, ""]:
    """The squared error, summed over axis 1 (features, tokens or rows of an image) and averaged over the others.

    This is the reference code's loss, which learning rates go with.

    Args:
      out: of the quantized block, with at least two axes.
      target: of the float block.

    Returns:
      A scalar, summed in at least float32.

    Raises:
      ValueError: if the shapes differ or have fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import reconstruction_loss
      >>> float(reconstruction_loss(jnp.ones((5, 3)), jnp.zeros((5, 3))))
      3.0
    """
    if jnp.shape(out) != jnp.shape(target) or jnp.ndim(out) < 2:
        raise ValueError(f"target must have the shape of the block's output, got {target.shape} for {out.shape}")
    return jnp.mean(jnp.sum(jnp.square(at_least_float32(out) - at_least_float32(target)), axis=1))


def learn_block(
    apply: BlockApply,
    params: PyTree,
    activations: PyTree,
    x: Array,
    target: Array,
    *,
    quantizer: Layers,
    optimizer: optax.GradientTransformation,
    activation_optimizer: optax.GradientTransformation,
    steps: int,
    key: PRNGKeyArray,
    batch_size: int | None,
    x_float: Array | None,
    drop: float | int | None,
    name: str,
) -> tuple[QParams, PyTree, Float[Array, " steps"]]:
    """Checks the arguments, begins with each quantizer's start, takes all steps and looks at the losses.

    Args and errors are those of :func:`poise.quant.reconstruct_with_activations`.
    """
    check_count("steps", steps)
    check_range("drop", drop, 0.0, 1.0)
    if jnp.ndim(x) < 1 or not jnp.shape(x)[0]:
        raise ValueError(f"x must have at least one example to calibrate on, got shape {jnp.shape(x)}")
    examples = x.shape[0]
    if jnp.ndim(target) < 1 or target.shape[0] != examples:
        raise ValueError(f"target must have the {examples} examples of x, got shape {jnp.shape(target)}")
    if x_float is not None and x_float.shape != x.shape:
        raise ValueError(f"x_float must have the shape of x, {x.shape}, got {x_float.shape}")
    if batch_size is not None:
        check_count("batch_size", batch_size, 1, examples)
    out = jax.eval_shape(apply, params, x, activations, None)
    if out.shape != target.shape:
        raise ValueError(f"target must have the shape of the block's output, {out.shape}, got {target.shape}")
    layers = layers_of(params, quantizer)
    weights = _weights(params)
    keys = jax.random.split(key, len(layers) + 1)
    qparams = {path: layer.init(weights[path], k) for (path, layer), k in zip(layers, keys[1:], strict=True)}
    run = _run(apply, layers, optimizer, activation_optimizer, steps, batch_size, None if drop is None else float(drop))
    qparams, activations, losses = run(params, qparams, activations, x, target, x_float, keys[0])
    known = concrete(losses)
    if known is not None and not np.isfinite(known).all():
        step = int(np.argmin(np.isfinite(known)))
        raise ValueError(f"the loss of {name} became {known[step]} at step {step}: lower the learning rate")
    return qparams, activations, losses


@functools.lru_cache(maxsize=32)
def _run(
    apply: BlockApply,
    layers: tuple[tuple[str, Quantizer], ...],
    optimizer: optax.GradientTransformation,
    activation_optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int | None,
    drop: float | None,
) -> Callable[..., tuple[QParams, PyTree, Array]]:
    """All steps, compiled once for blocks that are alike."""

    def split(qparams: QParams) -> tuple[QParams, QParams]:
        """What is learned, and what is kept."""
        parts: tuple[QParams, QParams] = ({}, {})
        for path, layer in layers:
            for kept, part in enumerate(parts):
                part[path] = {k: v for k, v in qparams[path].items() if (k not in layer.learned) == bool(kept)}
        return parts

    def loss(
        learned: tuple[QParams, PyTree],
        fixed: QParams,
        params: PyTree,
        x: Array,
        target: Array,
        step: Array,
        key: Array | None,
    ):
        weights, activations = learned
        merged = {path: {**fixed[path], **weights[path]} for path, _ in layers}
        soft = {path: (lambda w, p=path, q=layer: q.soft(w, merged[p], step, steps)) for path, layer in layers}
        error = reconstruction_loss(apply(replaced(params, soft), x, activations, key), target)
        penalty = sum((layer.regularizer(merged[path], step, steps) for path, layer in layers), start=jnp.zeros(()))
        return error + penalty, error

    @jax.jit
    def run(
        params: PyTree,
        qparams: QParams,
        activations: PyTree,
        x: Array,
        target: Array,
        x_float: Array | None,
        key: Array,
    ):
        learned, fixed = split(qparams)

        def body(carry: Any, step: Array) -> Any:
            learned, (state, activation_state) = carry
            step_key = jax.random.fold_in(key, step)
            rows_key, drop_key = jax.random.split(step_key)
            batch, wanted, plain = x, target, x_float
            if batch_size is not None:
                rows = jax.random.choice(rows_key, x.shape[0], (batch_size,), replace=False)
                batch, wanted = x[rows], target[rows]
                plain = None if x_float is None else x_float[rows]
            if plain is not None and drop is not None:
                batch = qdrop(drop_key, plain, batch, drop)
            block_key = None if drop is None else jax.random.fold_in(step_key, 2)  # 0 and 1 are those above
            slopes, error = jax.grad(loss, has_aux=True)(learned, fixed, params, batch, wanted, step, block_key)
            updates, state = optimizer.update(slopes[0], state, learned[0])
            moves, activation_state = activation_optimizer.update(slopes[1], activation_state, learned[1])
            learned = (optax.apply_updates(learned[0], updates), optax.apply_updates(learned[1], moves))
            return (learned, (state, activation_state)), error

        states = (optimizer.init(learned), activation_optimizer.init(activations))
        start: Any = ((learned, activations), states)
        ((learned, activations), _), losses = jax.lax.scan(body, start, jnp.arange(1, steps + 1))
        return {path: {**fixed[path], **learned[path]} for path, _ in layers}, activations, losses

    return run


def _weights(params: PyTree) -> dict[str, Array]:
    return {"/".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def layers_of(params: PyTree, quantizer: Layers) -> tuple[tuple[str, Quantizer], ...]:
    """The quantizers by path, in the order of the tree's leaves."""
    weights = _weights(params)
    if isinstance(quantizer, Quantizer):
        chosen = {
            path: quantizer
            for path, leaf in weights.items()
            if jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        }
    else:
        chosen = dict(quantizer)
        if unknown := sorted(chosen.keys() - weights.keys()):
            raise ValueError(f"quantizer must name weights of the block, got {', '.join(unknown)}")
    if not chosen:
        raise ValueError("quantizer must be for at least one weight, got none: weights have two axes or more")
    return tuple((path, chosen[path]) for path in weights if path in chosen)


def replaced(params: PyTree, new: Mapping[str, Callable[[Array], Array]]) -> PyTree:
    """The tree with functions of some leaves, by path, in their places."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get("/".join(path_names(path)), lambda w: w)(leaf), params
    )
