"""Activations of a network that is quantized after training: their rules, their first steps, blocks that have them."""

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array, PRNGKeyArray, PyTree

from poise.nets import TransformerBlock, VisionTransformer, activation_quantization, integer_apply
from poise.quant import QuantizedParams, QuantRule
from poise.quant.lsq import LEAST_STEP

_HEADER = "act_bits"  # of a file of integers whose activations have steps

Make = TypeVar("Make", bound=Callable[..., Any])


def _kept(make: Make) -> Make:
    """``functools.lru_cache`` for arguments that are modules, which have a hash that their type does not show."""
    return cast(Make, functools.lru_cache(maxsize=16)(make))


@_kept
def activation_rules(act_bits: int) -> tuple[QuantRule, ...]:
    """One step for the input of every layer of the blocks; first and last layers are left alone, and with 0 bits all.

    Example:
      >>> from poise.launch.ptq_activations import activation_rules
      >>> from poise.quant import match_rule
      >>> rules = activation_rules(4)
      >>> match_rule(rules, "block_0/fc1/kernel").act_bits, match_rule(rules, "head/kernel")
      (4, None)
    """
    if not act_bits:
        return ()
    return (
        QuantRule("fc2/kernel$", act_bits=act_bits, act_signed=False, act_shift=True),  # a GELU's output
        QuantRule("(attention/(query|key|value|proj)|fc1)/kernel$", act_bits=act_bits),
    )


@_kept
def first_steps(model: VisionTransformer, act_bits: int) -> Callable[[PyTree, Array], PyTree]:
    """``(params, images) -> quant``, compiled: steps by :func:`poise.quant.lsq_init`, by block and layer.

    Each is set by what the quantizers before it hand on.

    Args:
      model: the network; its parameters are float ones.
      act_bits: of the blocks' activations.
    """

    @jax.jit
    def calibrated(params: PyTree, images: Array) -> PyTree:
        with nn.intercept_methods(activation_quantization(activation_rules(act_bits))):
            return model.apply({"params": params}, images, mutable=["quant"])[1]["quant"]

    return calibrated


@_kept
def quantized_block_of(num_heads: int, hidden: int, act_bits: int, drop: float) -> Callable[..., Array]:
    """``(params, tokens, activations, key) -> tokens``, one function for all blocks; it drops where there is a key."""
    module = TransformerBlock(num_heads, hidden)
    interceptor = activation_quantization(activation_rules(act_bits), drop=drop)

    @jax.jit
    def apply(params: PyTree, x: Array, activations: PyTree, key: PRNGKeyArray | None) -> Array:
        with nn.intercept_methods(interceptor):
            variables = {"params": params, "quant": activations}
            return cast(Array, module.apply(variables, x, rngs=None if key is None else {"qdrop": key}))

    return apply


def with_act_bits(quantized: QuantizedParams, act_bits: int) -> QuantizedParams:
    """The same, with the bits of the activations in its header."""
    return QuantizedParams(quantized.params, json.dumps({**json.loads(quantized.header), _HEADER: act_bits}))


def act_bits_of(quantized: QuantizedParams) -> int:
    """The bits of the activations that a file's header tells; 0 where they have no steps.

    Raises:
      ValueError: if the header tells no such number.

    Example:
      >>> from poise.launch.ptq_activations import act_bits_of, with_act_bits
      >>> from poise.quant import QuantizedParams
      >>> act_bits_of(with_act_bits(QuantizedParams({}, "{}"), 4))
      4
    """
    found = json.loads(quantized.header).get(_HEADER, 0)
    if type(found) is not int or found not in (0, *range(2, 9)):
        raise ValueError(f"the header must tell act_bits of 2 to 8, got {found!r}")
    return found


@_kept
def quantized_forward(model: VisionTransformer, act_bits: int, integers: bool) -> Callable[[PyTree, Any], Array]:
    """``(variables, images) -> logits``, compiled: with quantized activations, in floats or in integer products.

    Args:
      model: the network.
      act_bits: of the blocks' activations; with 0 they have no steps.
      integers: whether the weights are integers, and their products those of integers.
    """

    @jax.jit
    def forward(variables: PyTree, images: Any) -> Array:
        with nn.intercept_methods(activation_quantization(activation_rules(act_bits))):
            if integers:
                return integer_apply(model, variables, images, activations=_scales(variables.get("quant", {})))
            return cast(Array, model.apply(variables, images))

    return forward


def _scales(quant: PyTree) -> dict[str, Array]:
    """The steps of what lies on a grid of integers; what is shifted behind its quantizer does not."""
    layers: dict[Any, dict[str, Any]] = {}
    for path, value in traverse_util.flatten_dict(quant).items():
        layers.setdefault(path[:-2], {})[path[-1]] = value
    alone = {"/".join(path): own["step"] for path, own in layers.items() if len(own) == 1}
    return {path: jnp.maximum(step.reshape(()), LEAST_STEP) for path, step in alone.items()}
