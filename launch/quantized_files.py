"""Quantized parameters as one safetensors file, and back, without the float model."""

import json
import os
import pathlib
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from poise.launch.files import atomic_path
from poise.launch.local_copy import local_copy
from poise.quant import QuantizedParams, QuantizedTensor, dequantize_tree
from poise.quant.export import FORMAT, VERSION
from poise.quant.quantized_tensor import check_tensor

_FIELDS = ("codes", "scale", "zero_point", "exponent")
_META = {"bits": int, "packed_axis": int, "scheme": str, "dtype": str}


def save_quantized(path: str | os.PathLike, quantized: QuantizedParams) -> None:
    """Writes quantized parameters: arrays by path, the header as JSON in the file's metadata.

    Args:
      path: the file, written atomically.
      quantized: of :func:`poise.quant.export`; its tree is made of nested dictionaries.

    Raises:
      ValueError: if the tree isn't made of nested dictionaries with strings without slashes as keys.

    Example:
      >>> import jax.numpy as jnp, pathlib, tempfile
      >>> from poise.launch.quantized_files import load_quantized, save_quantized
      >>> from poise.quant import QuantRule, dequantize_tree, export
      >>> params = {"fc": {"kernel": jnp.array([[0.5], [-2.0]]), "bias": jnp.ones(1)}}
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
      >>> save_quantized(file, export(params, {}, [QuantRule("kernel", weight_bits=1)]))
      >>> dequantize_tree(load_quantized(file))["fc"]["kernel"].tolist()
      [[1.25], [-1.25]]
    """
    from safetensors.numpy import save_file

    tree = flax.core.unfreeze(quantized.params)
    _check_keys(tree)
    tensors = {}
    for name, leaf in flax.traverse_util.flatten_dict(tree, sep="/").items():
        if isinstance(leaf, QuantizedTensor):
            parts = {field: getattr(leaf, field) for field in _FIELDS}
            tensors |= {f"{name}/{field}": value for field, value in parts.items() if value is not None}
        else:
            tensors[name] = leaf
    arrays = {name: np.ascontiguousarray(jax.device_get(value)) for name, value in tensors.items()}
    # Contiguity costs scalars their shape.
    arrays = {name: array.reshape(jnp.shape(tensors[name])) for name, array in arrays.items()}
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"format": FORMAT, "quantized": quantized.header})


def load_quantized(path: str | os.PathLike, *, dequantize: bool = False) -> QuantizedParams | PyTree:
    """Reads what :func:`save_quantized` wrote. Nothing in the file is executed.

    Args:
      path: the file.
      dequantize: whether to return float parameters for the original model instead. By default no float weight is made.

    Returns:
      The quantized parameters, or the tree of float ones.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, of another kind or version, or its arrays don't fit its header.

    Example:
      >>> from poise.launch.quantized_files import load_quantized
      >>> load_quantized("nothing.safetensors")
      Traceback (most recent call last):
      ...
      FileNotFoundError: no quantized parameters at nothing.safetensors
    """
    from safetensors import SafetensorError, safe_open

    file = local_copy(path)
    if not file.is_file():
        raise FileNotFoundError(f"no quantized parameters at {file}")
    try:
        with safe_open(file, framework="numpy") as reader:
            metadata = reader.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{file} holds no quantized parameters: its format is {metadata.get('format')!r}")
            flat: dict[str, Any] = {name: jnp.asarray(reader.get_tensor(name)) for name in reader.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a readable safetensors file: {error}") from error
    try:
        header = json.loads(metadata["quantized"])
        version, tensors = header["version"], _typed("tensors", header["tensors"], dict)
        for name, description in tensors.items():
            _typed(name, description, dict)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a header that can't be read: {error}") from error
    if version != VERSION:
        raise ValueError(f"{file} has version {version}; this release reads version {VERSION}")
    for name, description in tensors.items():
        flat[name] = _tensor(file, name, description, flat)
    quantized = QuantizedParams(flax.traverse_util.unflatten_dict(flat, sep="/"), metadata["quantized"])
    return dequantize_tree(quantized) if dequantize else quantized


def _tensor(file: pathlib.Path, name: str, description: dict[str, Any], flat: dict[str, Any]) -> QuantizedTensor:
    """Takes a tensor's arrays out of the flat tree and checks them against its header."""
    parts = {field: flat.pop(f"{name}/{field}", None) for field in _FIELDS}
    if parts["codes"] is None or parts["scale"] is None:
        raise ValueError(f"{file} lacks the codes or the scale of {name}")
    try:
        for field, kind in _META.items():
            _typed(field, description[field], kind)
        axis, shape = description["packed_axis"], _typed("shape", description["shape"], list)
        length = _typed("shape's entries", shape[axis], int)
        tensor = QuantizedTensor(**parts, length=length, **{field: description[field] for field in _META})
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} has a header that doesn't describe {name}: {error!r}") from error
    try:
        check_tensor(tensor)
    except ValueError as error:
        raise ValueError(f"{file} has arrays for {name} that don't fit its header: {error}") from error
    if list(tensor.shape) != shape:
        raise ValueError(f"{file} has arrays for {name} that don't fit its header: shape {list(tensor.shape)}")
    return tensor


def _typed(name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:  # a boolean is no whole number
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    return value


def _check_keys(tree: Any) -> None:
    if not isinstance(tree, dict):
        raise ValueError(f"params must be nested dictionaries to be written, got {type(tree).__name__}")
    for key, value in tree.items():
        if not isinstance(key, str) or "/" in key:
            raise ValueError(f"params must have keys that are strings without slashes, got {key!r}")
        if isinstance(value, dict | list | tuple):
            _check_keys(value)
