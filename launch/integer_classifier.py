"""The use of a classifier that was exported as integers."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from poise.launch.config import ConfigError
from poise.launch.local_copy import local_copy
from poise.launch.ptq_activations import act_bits_of
from poise.launch.qat_export import FILE
from poise.launch.quantized_files import load_quantized
from poise.launch.runs import config_of
from poise.quant import QuantizedParams


def load_classifier(workdir: str | os.PathLike[str], file: str = "") -> Callable[[Any], Array]:
    """The classifier of a finished run of poise.launch.qat or poise.launch.ptq; no float weights are read.

    Args:
      workdir: the run's folder.
      file: which of its files, such as ``"flexround_4bit.safetensors"``; empty for the only one of poise.launch.qat.

    Returns:
      ``images -> logits``, compiled, in products of integers. Images are floats ``[batch, height, width, channels]``
      in [-1, 1].

    Raises:
      ConfigError: if the folder has no configuration of such a run, or the run is one of poise.launch.ptq and no file
        is named.
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged.

    Example:
      >>> from poise.launch import load_classifier
      >>> load_classifier("nowhere")
      Traceback (most recent call last):
      ...
      FileNotFoundError: no quantized parameters at nowhere/model.safetensors
    """
    folder = local_copy(workdir)
    exported_by_qat = (folder / FILE).exists()
    found = sorted(path.name for path in folder.glob("*_[0-9]bit*.safetensors"))
    if not file and not exported_by_qat and found:
        raise ConfigError(f"file must be one of {', '.join(found)}, got none")
    stored = load_quantized(folder / (file or FILE))
    assert isinstance(stored, QuantizedParams)
    act_bits = act_bits_of(stored)
    trained = "params" in stored.params and not act_bits
    forward = _trained(folder, stored) if trained else _rounded(folder, stored, act_bits)
    jitted = jax.jit(forward)
    return lambda images: jitted(stored.params, images)


def _trained(folder: pathlib.Path, stored: QuantizedParams) -> Callable[[PyTree, Any], Array]:
    """A run of poise.launch.qat: its activations have learned steps, which are stored beside the weights."""
    from poise.launch.qat import QATConfig
    from poise.launch.qat_export import deployed

    return deployed(config_of(QATConfig, folder), len(stored.params["params"]["head"]["bias"])).forward


def _rounded(folder: pathlib.Path, stored: QuantizedParams, act_bits: int) -> Callable[[PyTree, Any], Array]:
    """A run of poise.launch.ptq: each token's activations are scaled by their largest, behind their steps if any."""
    from poise.launch.classifier import model_of
    from poise.launch.ptq import PTQConfig, with_its_network
    from poise.launch.ptq_results import integer_products

    config = with_its_network(config_of(PTQConfig, folder))
    params = stored.params["params"] if act_bits else stored.params
    return integer_products(model_of(config, len(params["head"]["bias"])), act_bits)
