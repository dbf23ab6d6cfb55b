"""Post-training quantization of a network, block by block, on a few unlabelled examples."""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from poise.quant.quantizers import Quantizer
from poise.quant.reconstruction import BlockApply, Layers, layers_of, learn_block, replaced
from poise.quant.rules import QParams

Apply = Callable[[PyTree, Array], Array]
_NONE = optax.identity()  # of no activations


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
    qparams, _, losses = learn_block(
        _alone(block_apply),
        params,
        {},
        x,
        target,
        quantizer=quantizer,
        optimizer=optimizer,
        activation_optimizer=_NONE,
        steps=steps,
        key=key,
        batch_size=batch_size,
        x_float=x_float,
        drop=drop,
        name=name,
    )
    return qparams, losses


def reconstruct_with_activations(
    block_apply: BlockApply,
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
    batch_size: int | None = None,
    x_float: Array | None = None,
    drop: float | int | None = 0.5,
    name: str = "block",
) -> tuple[QParams, PyTree, Float[Array, " steps"]]:
    r"""Learns how a block's weights are rounded and, with them, what quantizes its activations: QDrop.

    It is :func:`reconstruct` with a second tree that is learned on the same loss, by an optimizer of its own.

    Args:
      block_apply: ``(params, x, activations, key) -> out``, which quantizes its activations with ``activations``: all
        of them where the key is None, as at inference; else at random, see
        ``poise.nets.activation_quantization(rules, drop=0.5)``, which takes the key as ``rngs={"qdrop": key}``.
      params: the block's float parameters.
      activations: what is learned of the activations, to start with, such as steps of :func:`lsq_init`: a tree of
        floats.
      x: its inputs, examples first, from the blocks before it as they are after quantization.
      target: the float block's output on the float network's inputs.
      quantizer: as in :func:`reconstruct`.
      optimizer: of what the quantizers of the weights learn.
      activation_optimizer: of ``activations``; ``optax.set_to_zero()`` leaves them as they are.
      steps: of both optimizers.
      key: draws the batches, and what is dropped.
      batch_size: examples a step; None for all at once.
      x_float: the float network's inputs; if given, :func:`qdrop` mixes them with ``x``.
      drop: the probability of an entry of ``x`` in that mixture. With None nothing is dropped: the inputs are ``x`` and
        the block gets no key.
      name: of the block, for messages.

    Returns:
      ``qparams`` by path as of :func:`reconstruct`, the learned ``activations``, and the loss before each step, without
      the regularizer.

    Raises:
      ValueError: as :func:`reconstruct`, or if ``activations`` holds no array.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from poise.quant import FlexRound, lsq, lsq_init, qdrop, reconstruct_with_activations
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 4))}
      >>> x = jax.random.normal(jax.random.key(1), (32, 8))
      >>> def apply(params, x, activations, key):
      ...     quantized = lsq(x, activations["step"], bits=3, axis=None)
      ...     return (quantized if key is None else qdrop(key, x, quantized, 0.5)) @ params["kernel"]
      >>> start = {"step": lsq_init(x, bits=3, axis=None)}
      >>> qparams, activations, losses = reconstruct_with_activations(
      ...     apply, params, start, x, x @ params["kernel"], quantizer=FlexRound(bits=3), optimizer=optax.adam(3e-3),
      ...     activation_optimizer=optax.adam(1e-3), steps=20, key=jax.random.key(2))
      >>> bool(activations["step"][0, 0] != start["step"][0, 0]), losses.shape
      (True, (20,))

    References:
      Wei et al., *QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization*,
      https://arxiv.org/abs/2203.05740. The released code draws one mixture for each output of a layer, here each
      quantizer draws its own.
    """
    if not jax.tree.leaves(activations):
        raise ValueError("activations must hold at least one array to learn, got none")
    return learn_block(
        block_apply,
        params,
        activations,
        x,
        target,
        quantizer=quantizer,
        optimizer=optimizer,
        activation_optimizer=activation_optimizer,
        steps=steps,
        key=key,
        batch_size=batch_size,
        x_float=x_float,
        drop=drop,
        name=name,
    )


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
    layers = layers_of(params, quantizer)
    if missing := [path for path, _ in layers if path not in qparams]:
        raise ValueError(f"qparams must hold every quantized weight, got none for {', '.join(missing)}")
    return replaced(params, {path: (lambda w, p=path, q=layer: q.hard(w, qparams[p])) for path, layer in layers})


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
def _alone(apply: Apply) -> BlockApply:
    """A block that is handed no steps of activations and no key; one function for each block, so compiled once."""
    return lambda params, x, activations, key: apply(params, x)
