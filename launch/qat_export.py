"""The network that a quantization-aware training leaves, as integers in a file."""

import functools
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import flax.linen as nn
from jaxtyping import Array, PyTree

from poise.launch.classifier import model_of
from poise.launch.qat_phases import products_of, rules_of
from poise.launch.quantized_files import save_quantized
from poise.nets import QKProductSelfAttention, VisionTransformer, activation_quantization, integer_apply
from poise.quant import QuantRule, export

if TYPE_CHECKING:
    from poise.launch.qat import QATConfig

FILE = "model.safetensors"


class Deployed(NamedTuple):
    """A network as it is exported.

    Attributes:
      model: the network.
      rules: how its weights and its activations are quantized.
      forward: ``(variables, images) -> logits``, from exported variables and in integer products.
    """

    model: VisionTransformer
    rules: tuple[QuantRule, ...]
    forward: Callable[[PyTree, Array], Array]


def deployed(config: "QATConfig", num_classes: int) -> Deployed:
    """What is exported: the network itself, or with QKR one whose attention has the products of query and key weights.

    Args:
      config: the run's settings.
      num_classes: logits per head.
    """
    model, rules = model_of(config, num_classes), rules_of(config)
    if config.qkr:
        attention = functools.partial(QKProductSelfAttention, act_bits=config.act_bits)
        model = model_of(config, num_classes, attention=attention)
        # The layer has quantizers of activations of its own.
        rules = (QuantRule("attention/.*kernel$", weight_bits=config.bits), *rules)

    def forward(variables: PyTree, images: Array) -> Array:
        with nn.intercept_methods(activation_quantization(rules)):
            return integer_apply(model, variables, images)

    return Deployed(model, rules, forward)


def export_classifier(config: "QATConfig", num_classes: int, learned: dict[str, PyTree], workdir: pathlib.Path) -> None:
    """Writes ``model.safetensors``: weights as packed integers, the steps of the activations beside them.

    Args:
      config: the run's settings.
      num_classes: logits per head.
      learned: of :class:`poise.launch.qat_phases.QuantizedState`.
      workdir: the run's folder.
    """
    variables = products_of(config, learned["variables"]) if config.qkr else learned["variables"]
    save_quantized(workdir / FILE, export(variables, learned["steps"], deployed(config, num_classes).rules))
