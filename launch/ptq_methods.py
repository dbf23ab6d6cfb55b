"""Post-training quantization of a vision transformer, block by block."""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from poise.launch.checkpoint import restore_tree
from poise.launch.local_copy import local_copy
from poise.launch.results import phase_folder
from poise.nets import TransformerBlock, VisionTransformer
from poise.quant import (
    AdaRound,
    FlexRound,
    Nupes,
    QuantizedParams,
    Quantizer,
    QuantRule,
    apply_weight_quant,
    export,
    reconstruct_blocks,
)

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

    Args:
      config: the run's settings.
      method: one of :data:`poise.launch.ptq.METHODS`.
      bits: of the blocks' weights.
      model: the network.
      params: its float parameters.
      images: for calibration.

    Returns:
      The network as integers.
    """
    if method == "rtn":
        return Rounded(export(params, {}, [ENDS, QuantRule("kernel$", weight_bits=bits, method="minmax")]), [])
    quantizer, rate = quantizer_of(config, method, bits)
    names = [f"block_{index}" for index in range(model.num_layers)]
    found, losses = reconstruct_blocks(
        [block_of(model.num_heads, model.mlp_ratio * model.width)] * model.num_layers,
        [params[name] for name in names],
        tokens_of(model, apply_weight_quant(params, {}, [ENDS]), jnp.asarray(images)),
        quantizer=quantizer,
        optimizer=_optimizer(rate, config.steps),
        steps=config.steps,
        key=jax.random.key(config.seed),
        batch_size=config.reconstruction_batch_size,
        names=names,
    )
    qparams = {f"{name}/{path}": value for name, part in zip(names, found, strict=True) for path, value in part.items()}
    rules: list[Any] = [ENDS, QuantRule("kernel$", weight_bits=bits, method=method)]
    ends = [(float(loss[0]), float(loss[-1])) for loss in losses]
    return Rounded(export(params, qparams, rules), ends)


@functools.lru_cache(maxsize=8)
def _optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """One value for a rate, so that what was compiled with it is found again."""
    return optax.adam(optax.cosine_decay_schedule(rate, steps))
