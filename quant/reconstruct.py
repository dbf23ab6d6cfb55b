"""Post-training quantization of a network, block by block, on a few unlabelled examples."""

import functools
from collections.abc import Callable, Mapping, Sequence
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

Apply = Callable[[PyTree, Array], Array]
Layers = Quantizer | Mapping[str, Quantizer]


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


def reconstruct(
    block_apply: Apply,
    params: PyTree,
    x: Array,
    target: Array,
    *,
    quantizer: Layers,
    optimizer: optax.GradientTransformation,
    steps: int,
    key: PRNGKeyArray,
    batch_size: int | None = None,
    x_float: Array | None = None,
    drop: float | int = 0.5,
    name: str = "block",
) -> tuple[QParams, Float[Array, " steps"]]:
    r"""Learns how a block's weights are rounded, so that its output on given inputs stays what it was.

    All steps are one ``jax.lax.scan``. Weights, biases and normalizations stay as they are; only what the quantizers
    learn is trained, on :func:`reconstruction_loss` (and AdaRound's regularizer).

    Args:
      block_apply: ``(params, x) -> out``. It may quantize its activations itself.
      params: the block's float parameters.
      x: its inputs, examples first, from the blocks before it as they are after quantization.
      target: the float block's output on the float network's inputs.
      quantizer: for every floating leaf with at least two axes; or a mapping from paths (``"fc1/kernel"``) to
        quantizers, other leaves being left alone. :func:`quantizers_of` makes one of rules.
      optimizer: for example ``optax.adam(optax.cosine_decay_schedule(3e-3, steps))``.
      steps: of the optimizer.
      key: draws the batches.
      batch_size: examples a step; None for all at once.
      x_float: the float network's inputs; if given, :func:`qdrop` mixes them with ``x``.
      drop: the probability of an entry of ``x`` in that mixture.
      name: of the block, for messages.

    Returns:
      ``qparams`` by path, as :func:`apply_weight_quant` and :func:`export` take them, and the loss before each step,
      without the regularizer.

    Raises:
      ValueError: if there are no examples, the output's shape is not the target's, nothing is quantized, a path does
        not exist, ``steps`` or ``batch_size`` is out of range, or the loss becomes NaN or infinite (with the
        block's name).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.quant import FlexRound, apply_quantizers, reconstruct
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> apply = lambda params, x: x @ params["kernel"]
      >>> x = jax.random.normal(jax.random.key(1), (32, 2)) @ jax.random.normal(jax.random.key(2), (2, 8))
      >>> quantizer = FlexRound(bits=3)
      >>> qparams, losses = reconstruct(apply, params, x, apply(params, x), quantizer=quantizer,
      ...                               optimizer=optax.adam(1e-2), steps=60, key=jax.random.key(2))
      >>> bool(losses[-1] < losses[0]), list(qparams)
      (True, ['kernel'])

    References:
      *BRECQ*, https://arxiv.org/abs/2102.05426, and *FlexRound*, https://arxiv.org/abs/2306.00317.
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
    out = jax.eval_shape(block_apply, params, x)
    if out.shape != target.shape:
        raise ValueError(f"target must have the shape of the block's output, {out.shape}, got {target.shape}")
    layers = _layers(params, quantizer)
    weights = _weights(params)
    keys = jax.random.split(key, len(layers) + 1)
    qparams = {path: layer.init(weights[path], k) for (path, layer), k in zip(layers, keys[1:], strict=True)}
    run = _run(block_apply, layers, optimizer, steps, batch_size, float(drop))
    qparams, losses = run(params, qparams, x, target, x_float, keys[0])
    known = concrete(losses)
    if known is not None and not np.isfinite(known).all():
        step = int(np.argmin(np.isfinite(known)))
        raise ValueError(f"the loss of {name} became {known[step]} at step {step}: lower the learning rate")
    return qparams, losses


def apply_quantizers(params: PyTree, qparams: QParams, quantizer: Layers) -> PyTree:
    """Parameters with hard quantized weights, for any ``apply_fn``.

    Args:
      params: the float parameters.
      qparams: of :func:`reconstruct`.
      quantizer: the quantizers that it was given.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: if ``qparams`` lacks a path.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import FlexRound, apply_quantizers
      >>> params, quantizer = {"kernel": jnp.array([[0.1, 1.0], [0.9, -1.0]])}, FlexRound(bits=2)
      >>> qparams = {"kernel": quantizer.init(params["kernel"], jax.random.key(0))}
      >>> apply_quantizers(params, qparams, quantizer)["kernel"].shape
      (2, 2)
    """
    layers = _layers(params, quantizer)
    if missing := [path for path, _ in layers if path not in qparams]:
        raise ValueError(f"qparams must hold every quantized weight, got none for {', '.join(missing)}")
    return _replace(params, {path: (lambda w, p=path, q=layer: q.hard(w, qparams[p])) for path, layer in layers})


def reconstruct_blocks(
    blocks: Sequence[Apply],
    params: Sequence[PyTree],
    x: Array,
    *,
    quantizer: Layers | Sequence[Layers],
    optimizer: optax.GradientTransformation,
    steps: int,
    key: PRNGKeyArray,
    batch_size: int | None = None,
    drop: float | int | None = None,
    names: Sequence[str] | None = None,
) -> tuple[list[QParams], list[Float[Array, " steps"]]]:
    """Reconstructs a chain of blocks, first to last, on two streams.

    The float stream gives each block's target. The quantized stream, which has passed the blocks that are already done,
    is what the block is trained on, so that each one makes up for the errors before it.

    Args:
      blocks: ``(params, x) -> out`` each; the output of one is the input of the next.
      params: their float parameters.
      x: the calibration examples.
      quantizer: for all blocks, or one (or a mapping) for each.
      optimizer: as in :func:`reconstruct`; its state begins anew with each block.
      steps: for each block.
      key: draws the batches.
      batch_size: examples a step; None for all.
      drop: if given, :func:`qdrop` mixes the streams, with this probability of a quantized entry.
      names: of the blocks, for messages.

    Returns:
      For each block its ``qparams`` and its losses.

    Raises:
      ValueError: as :func:`reconstruct`, or if the sequences have different lengths.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.quant import FlexRound, reconstruct_blocks
      >>> params = [{"kernel": jax.random.normal(jax.random.key(i), (6, 6))} for i in range(2)]
      >>> layer = lambda params, x: jnp.tanh(x @ params["kernel"])
      >>> qparams, losses = reconstruct_blocks([layer, layer], params, jax.random.normal(jax.random.key(2), (16, 6)),
      ...     quantizer=FlexRound(bits=3), optimizer=optax.adam(3e-3), steps=20, key=jax.random.key(3))
      >>> len(qparams), [loss.shape for loss in losses]
      (2, [(20,), (20,)])
    """
    count = len(blocks)
    names = [f"block {index}" for index in range(count)] if names is None else names
    each = [quantizer] * count if isinstance(quantizer, Quantizer | Mapping) else quantizer
    for argument, sequence in (("params", params), ("quantizer", each), ("names", names)):
        if len(sequence) != count:
            raise ValueError(f"{argument} must have one entry for each of {count} blocks, got {len(sequence)}")
    found, losses, x_float = [], [], x
    for index, (apply, weights, layers) in enumerate(zip(blocks, params, each, strict=True)):
        target = apply(weights, x_float)
        qparams, loss = reconstruct(
            apply,
            weights,
            x,
            target,
            quantizer=layers,
            optimizer=optimizer,
            steps=steps,
            key=jax.random.fold_in(key, index),
            batch_size=batch_size,
            x_float=None if drop is None else x_float,
            drop=0.5 if drop is None else drop,
            name=names[index],
        )
        x, x_float = apply(apply_quantizers(weights, qparams, layers), x), target
        found.append(qparams)
        losses.append(loss)
    return found, losses


@functools.lru_cache(maxsize=32)
def _run(
    apply: Apply,
    layers: tuple[tuple[str, Quantizer], ...],
    optimizer: optax.GradientTransformation,
    steps: int,
    batch_size: int | None,
    drop: float,
) -> Callable[..., tuple[QParams, Array]]:
    """All steps, compiled once for blocks that are alike."""

    def split(qparams: QParams) -> tuple[QParams, QParams]:
        """What is learned, and what is kept."""
        parts: tuple[QParams, QParams] = ({}, {})
        for path, layer in layers:
            for kept, part in enumerate(parts):
                part[path] = {k: v for k, v in qparams[path].items() if (k not in layer.learned) == bool(kept)}
        return parts

    def loss(learned: QParams, fixed: QParams, params: PyTree, x: Array, target: Array, step: Array):
        merged = {path: {**fixed[path], **learned[path]} for path, _ in layers}
        soft = {path: (lambda w, p=path, q=layer: q.soft(w, merged[p], step, steps)) for path, layer in layers}
        error = reconstruction_loss(apply(_replace(params, soft), x), target)
        penalty = sum((layer.regularizer(merged[path], step, steps) for path, layer in layers), start=jnp.zeros(()))
        return error + penalty, error

    @jax.jit
    def run(params: PyTree, qparams: QParams, x: Array, target: Array, x_float: Array | None, key: Array):
        learned, fixed = split(qparams)

        def body(carry: Any, step: Array) -> Any:
            learned, state = carry
            rows_key, drop_key = jax.random.split(jax.random.fold_in(key, step))
            batch, wanted, plain = x, target, x_float
            if batch_size is not None:
                rows = jax.random.choice(rows_key, x.shape[0], (batch_size,), replace=False)
                batch, wanted = x[rows], target[rows]
                plain = None if x_float is None else x_float[rows]
            if plain is not None:
                batch = qdrop(drop_key, plain, batch, drop)
            gradients, error = jax.grad(loss, has_aux=True)(learned, fixed, params, batch, wanted, step)
            updates, state = optimizer.update(gradients, state, learned)
            return (optax.apply_updates(learned, updates), state), error

        start: Any = (learned, optimizer.init(learned))
        (learned, _), losses = jax.lax.scan(body, start, jnp.arange(1, steps + 1))
        return {path: {**fixed[path], **learned[path]} for path, _ in layers}, losses

    return run


def _weights(params: PyTree) -> dict[str, Array]:
    return {"/".join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def _layers(params: PyTree, quantizer: Layers) -> tuple[tuple[str, Quantizer], ...]:
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


def _replace(params: PyTree, new: Mapping[str, Callable[[Array], Array]]) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get("/".join(path_names(path)), lambda w: w)(leaf), params
    )
