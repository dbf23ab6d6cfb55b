"""Post-training quantization of a vision transformer, block by block."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from poise.launch.checkpoint_tree import restore_tree
from poise.launch.local_copy import local_copy
from poise.launch.ptq_activations import first_steps, quantized_block_of, with_act_bits
from poise.launch.results import phase_folder
from poise.nets import TransformerBlock, VisionTransformer
from poise.quant import (
    AdaRound,
    FlexRound,
    Nupes,
    QuantizedParams,
    Quantizer,
    QuantRule,
    apply_quantizers,
    apply_weight_quant,
    export,
    reconstruct_blocks,
    reconstruct_with_activations,
)
from poise.quant.rules import QParams

if TYPE_CHECKING:
    from poise.launch.ptq import PTQConfig

ENDS = QuantRule("(patch_embed|head|head_dist)/kernel$", weight_bits=8, method="minmax")


class Rounded(NamedTuple):
    """A quantized network.

    Attributes:
      params: as integers.
      losses: of each block, before the first step and before the last; empty without reconstruction.
    """

    params: QuantizedParams
    losses: list[tuple[float, float]]


def float_variables(run: str | os.PathLike[str]) -> PyTree:
    """The float network's variables from a run's first phase.

    Args:
      run: the folder of a run of poise.launch.qat or poise.launch.ptq.

    Raises:
      CheckpointError: if there is no such phase, or it is damaged.
    """
    return restore_tree(phase_folder(local_copy(run, "00_float"), 0, "float"))["variables"]


def tokens_of(model: VisionTransformer, params: PyTree, images: Array) -> Array:
    """What enters the first block.

    Args:
      model: the network.
      params: its parameters.
      images: ``[batch, height, width, channels]``.

    Returns:
      ``[batch, tokens, width]``.
    """
    side = (model.patch_size, model.patch_size)
    patches = nn.Conv(model.width, side, side, "VALID").apply({"params": params["patch_embed"]}, images)
    patches = jnp.asarray(patches).reshape(images.shape[0], -1, model.width)
    names = ("cls_token", "dist_token") if model.distilled else ("cls_token",)
    first = [jnp.broadcast_to(params[name], (images.shape[0], 1, model.width)) for name in names]
    return jnp.concatenate([*first, patches], axis=1) + params["pos_embed"]


@functools.lru_cache(maxsize=8)
def block_of(num_heads: int, hidden: int) -> Callable[[PyTree, Array], Array]:
    """``(params, tokens) -> tokens``, one function for all blocks, so that reconstruction compiles once."""
    module = TransformerBlock(num_heads, hidden)
    return jax.jit(lambda params, x: module.apply({"params": params}, x))


def quantizer_of(config: "PTQConfig", method: str, bits: int) -> tuple[Quantizer, float]:
    """The quantizer of a method and its learning rate; one scale for each output channel."""
    if method == "adaround":
        return AdaRound(bits, search=False, strength=config.adaround_strength), config.adaround_learning_rate
    if method == "flexround":
        return FlexRound(bits), config.flexround_learning_rate
    exponent = 1.0 if bits == 2 else None  # codes of -1, 0 and 1 have no use for it
    return Nupes(bits, exponent=exponent), config.nupes_learning_rate


def round_network(
    config: "PTQConfig", method: str, bits: int, model: VisionTransformer, params: PyTree, images: np.ndarray | Array
) -> Rounded:
    """Quantizes a network's weights: the blocks' by a method, the first and last layers' to the nearest of 8 bits.

    With ``act_bits`` the blocks' activations have steps, which are learned with the weights; with ``rtn`` they stay as
    they are set by the images.

    Args:
      config: the run's settings.
      method: one of :data:`poise.launch.ptq.METHODS`.
      bits: of the blocks' weights.
      model: the network.
      params: its float parameters.
      images: for calibration.

    Returns:
      The network as integers; with ``act_bits`` their tree is that of the variables, ``params`` and ``quant``.
    """
    images, quant = jnp.asarray(images), None
    ends = apply_weight_quant(params, {}, [ENDS])
    if config.act_bits:
        quant = first_steps(model, config.act_bits)(ends, images)
    if method == "rtn":
        return Rounded(
            _exported(config, params, {}, quant, QuantRule("kernel$", weight_bits=bits, method="minmax")), []
        )
    names = [f"block_{index}" for index in range(model.num_layers)]
    blocks, x = [params[name] for name in names], tokens_of(model, ends, images)
    quantizer, rate = quantizer_of(config, method, bits)
    options: dict[str, Any] = {
        "quantizer": quantizer,
        "optimizer": _optimizer(rate, config.steps),
        "steps": config.steps,
        "key": jax.random.key(config.seed),
        "batch_size": config.reconstruction_batch_size,
    }
    if quant is None:
        block = block_of(model.num_heads, model.mlp_ratio * model.width)
        found, losses = reconstruct_blocks([block] * model.num_layers, blocks, x, names=names, **options)
    else:
        found, steps, losses = _with_activations(
            config, model, names, blocks, [quant[name] for name in names], x, options
        )
        quant = dict(zip(names, steps, strict=True))
    qparams = {f"{name}/{path}": value for name, part in zip(names, found, strict=True) for path, value in part.items()}
    rounded = _exported(config, params, qparams, quant, QuantRule("kernel$", weight_bits=bits, method=method))
    return Rounded(rounded, [(float(loss[0]), float(loss[-1])) for loss in losses])


def _with_activations(
    config: "PTQConfig",
    model: VisionTransformer,
    names: Sequence[str],
    params: Sequence[PyTree],
    activations: Sequence[PyTree],
    x: Array,
    options: Mapping[str, Any],
) -> tuple[list[QParams], list[PyTree], list[Array]]:
    """Block after block on two streams, which are mixed; in the quantized one activations are quantized, too."""
    sizes = (model.num_heads, model.mlp_ratio * model.width)
    block, quantized = block_of(*sizes), quantized_block_of(*sizes, config.act_bits, float(config.drop))
    x_float, found, steps, losses = x, [], [], []
    for index, (name, weights, first) in enumerate(zip(names, params, activations, strict=True)):
        target = block(weights, x_float)
        qparams, learned, loss = reconstruct_with_activations(
            quantized,
            weights,
            first,
            x,
            target,
            activation_optimizer=_optimizer(config.activation_learning_rate, config.steps),
            x_float=x_float,
            drop=float(config.drop),
            name=name,
            **{**options, "key": jax.random.fold_in(options["key"], index)},
        )
        x = quantized(apply_quantizers(weights, qparams, options["quantizer"]), x, learned, None)
        x_float = target
        found.append(qparams)
        steps.append(learned)
        losses.append(loss)
    return found, steps, losses


def _exported(
    config: "PTQConfig", params: PyTree, qparams: QParams, quant: PyTree | None, rule: QuantRule
) -> QuantizedParams:
    """The integers, and the steps of activations beside them where there are any."""
    if quant is None:
        return export(params, qparams, [ENDS, rule])
    under = {f"params/{path}": value for path, value in qparams.items()}
    return with_act_bits(export({"params": params, "quant": quant}, under, [ENDS, rule]), config.act_bits)


@functools.lru_cache(maxsize=8)
def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """One value for a rate, so that what was compiled with it is found again."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))
