"""From trained quantizers to integers: a tree whose weights are codes and scales, with no float master left."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from poise.core.arguments import concrete
from poise.optim.leaves import path_names
from poise.quant.checks import Axis
from poise.quant.lsq import lsq_codes
from poise.quant.power import power_quantize
from poise.quant.qparams import absmax_scale, minmax_qparams
from poise.quant.quantized_tensor import QuantizedTensor, dequantize_tensor, is_quantized, quantized_tensor
from poise.quant.quantizers import QUANTIZERS, Quantizer, packing_axis
from poise.quant.rules import QParams, QuantRule, quantized_weights
from poise.quant.statsq import statsq_codes
from poise.quant.uniform import quantize

FORMAT = "poise-quantized"
VERSION = 1
Parameters = dict[str, Array]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["header"])
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedParams:
    """A model's parameters, quantized; made by :func:`export`.

    Attributes:
      params: the tree of parameters with a :class:`QuantizedTensor` in place of every quantized weight.
      header: JSON with the format, its version, and for every quantized weight by path its bits, shape, packed axis,
        scheme, dtype and method: enough to read the arrays without the float model.

    Example:
      >>> import json, jax.numpy as jnp
      >>> from poise.quant import QuantRule, export
      >>> params = {"fc": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
      >>> quantized = export(params, {}, [QuantRule("kernel$", weight_bits=2)])
      >>> sorted(json.loads(quantized.header)), json.loads(quantized.header)["tensors"]["fc/kernel"]["bits"]
      (['format', 'tensors', 'version'], 2)
    """

    params: Any
    header: str


def quantizers_of(params: PyTree, rules: Sequence[QuantRule]) -> dict[str, Quantizer]:
    """The quantizers that :func:`reconstruct` trains, as rules name them.

    Args:
      params: the parameters of a block, under the paths that the rules look for.
      rules: the first match wins; rules with methods that need no reconstruction are left out.

    Returns:
      Quantizers by path.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import QuantRule, quantizers_of
      >>> params = {"fc": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}}
      >>> quantizers_of(params, [QuantRule("kernel$", weight_bits=3, method="flexround")])
      {'fc/kernel': FlexRound(bits=3, axis=(0,), symmetric=False, search=False)}
    """
    return {
        path: QUANTIZERS[rule.method](rule.weight_bits, axes)
        for path, _, rule, axes in quantized_weights(params, rules)
        if rule.method in QUANTIZERS and rule.weight_bits is not None
    }


def export(params: PyTree, qparams: QParams, rules: Sequence[QuantRule]) -> QuantizedParams:
    """Turns every weight that a rule quantizes into packed integers, with the scales that were learned.

    What comes out times its scale is what :func:`apply_weight_quant` gives, bit for bit. Codes of 1, 2, 3 and 4 bits
    share bytes, 5 to 8 bits take one. Everything else (biases, normalizations, layers without a rule) stays as it is.

    Args:
      params: the float parameters.
      qparams: what the rules' methods learned, by path; from :func:`init_weight_qparams`, training or
        :func:`reconstruct`.
      rules: the first match wins.

    Returns:
      The quantized parameters. None of the float weights is kept.

    Raises:
      ValueError: if anything is not finite (with the layer's name: a cast to integers would hide it), nothing is
        quantized, ``qparams`` lacks what a method needs or holds what no rule quantizes, or a weight does not suit its
        rule.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from poise.quant import QuantRule, apply_weight_quant, dequantize_tree, export, tree_nbytes
      >>> params = {"fc": {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.zeros(32)}}
      >>> rules = [QuantRule("kernel$", weight_bits=4, method="absmax")]
      >>> quantized = export(params, {}, rules)
      >>> tree_nbytes(params), tree_nbytes(quantized)
      (8320, 1280)
      >>> fake = apply_weight_quant(params, {}, rules)
      >>> bool((dequantize_tree(quantized)["fc"]["kernel"] == fake["fc"]["kernel"]).all())
      True
    """
    _check_finite(params)
    new, described, unused = {}, {}, set(qparams)
    for path, leaf, rule, axes in quantized_weights(params, rules):
        unused.discard(path)
        parameters = qparams.get(path, {})
        bits = rule.weight_bits
        assert bits is not None  # of rules that quantized_weights yields
        for name, value in parameters.items():
            if not _finite(value):
                raise ValueError(f"qparams must be finite, got NaN or infinity in {name} of {path}")
        try:
            if rule.method in QUANTIZERS:
                tensor = QUANTIZERS[rule.method](bits, axes).store(leaf, parameters)
            else:
                tensor = _STORES[rule.method](leaf, parameters, bits, axes)
        except (KeyError, TypeError) as error:
            raise ValueError(f"qparams must hold what {rule.method!r} needs for {path}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not _finite(tensor.scale):
            raise ValueError(f"the scale of {path} is not finite")
        new[path], described[path] = tensor, {**describe(tensor), "method": rule.method}
    if unused:
        raise ValueError(f"qparams must hold nothing but what the rules quantize, got {sorted(unused)}")
    if not new:
        raise ValueError("rules must quantize at least one weight, got none that matches")
    header = json.dumps({"format": FORMAT, "version": VERSION, "tensors": described}, sort_keys=True)
    tree = jax.tree_util.tree_map_with_path(lambda path, leaf: new.get("/".join(path_names(path)), leaf), params)
    return QuantizedParams(tree, header)


def describe(tensor: QuantizedTensor) -> dict[str, Any]:
    """The static fields of a tensor, for a header.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import quantized_tensor
      >>> from poise.quant.export import describe
      >>> describe(quantized_tensor(jnp.zeros((4, 6), int), jnp.float32(1), bits=3))["shape"]
      [4, 6]
    """
    return {
        "bits": tensor.bits,
        "dtype": tensor.dtype,
        "packed_axis": tensor.packed_axis,
        "scheme": tensor.scheme,
        "shape": list(tensor.shape),
    }


def dequantize_tree(quantized: QuantizedParams | PyTree, dtype: Any = None) -> PyTree:
    """Float parameters again, for models that are to run in floats.

    Args:
      quantized: of :func:`export`, or any tree with quantized tensors.
      dtype: of the weights; None for what each was before.

    Returns:
      The tree with a float array in place of every quantized tensor; other leaves as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> from poise.quant import QuantRule, dequantize_tree, export
      >>> quantized = export({"kernel": jnp.array([[0.5], [-2.0]])}, {}, [QuantRule("kernel", weight_bits=1)])
      >>> dequantize_tree(quantized)["kernel"].tolist()
      [[1.25], [-1.25]]
    """
    tree = quantized.params if isinstance(quantized, QuantizedParams) else quantized
    return jax.tree.map(
        lambda leaf: dequantize_tensor(leaf, dtype) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )


def _finite(value: Any) -> bool:
    known = concrete(value)
    return known is None or not jnp.issubdtype(known.dtype, jnp.inexact) or bool(np.isfinite(known).all())


def _check_finite(params: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _finite(leaf):
            raise ValueError(f"params must be finite, got NaN or infinity in {'/'.join(path_names(path))}")


def _packed(w: Array, codes: Array, scale: Array, *rest: Any, bits: int, **options: Any) -> QuantizedTensor:
    axis = packing_axis(jnp.shape(w))
    return quantized_tensor(codes, scale, *rest, bits=bits, packed_axis=axis, dtype=w.dtype, **options)


def _absmax(w: Array, parameters: Parameters, bits: int, axis: Axis) -> QuantizedTensor:
    del parameters
    scale = absmax_scale(w, bits, axis)
    return _packed(w, quantize(w, scale, bits=bits), scale, bits=bits)


def _shifted(w: Array, scale: Array, zero_point: Array, bits: int) -> QuantizedTensor:
    half = 2 ** (bits - 1)
    codes = quantize(w, scale, zero_point, bits=bits, signed=False).astype(jnp.int32) - half
    return _packed(w, codes, scale, zero_point.astype(jnp.int32) - half, bits=bits)


def _minmax(w: Array, parameters: Parameters, bits: int, axis: Axis) -> QuantizedTensor:
    del parameters
    return _shifted(w, *minmax_qparams(w, bits, axis), bits)


def _mse(w: Array, parameters: Parameters, bits: int, axis: Axis) -> QuantizedTensor:
    del axis
    return _shifted(w, parameters["scale"], parameters["zero_point"], bits)


def _lsq(w: Array, parameters: Parameters, bits: int, axis: Axis) -> QuantizedTensor:
    del axis
    codes, step = lsq_codes(w, parameters["step"], bits=bits)
    return _packed(w, codes, step, bits=bits)


def _statsq(w: Array, parameters: Parameters, bits: int, axis: Axis) -> QuantizedTensor:
    del parameters
    codes, alpha = statsq_codes(w, bits=bits, axis=axis)
    return _packed(
        w, codes, alpha.astype(jnp.promote_types(w.dtype, jnp.float32)) / 2**bits, bits=bits, scheme="half_integer"
    )


def _power(w: Array, parameters: Parameters, bits: int, axis: Axis) -> QuantizedTensor:
    codes, scale = power_quantize(w, parameters["exponent"], bits=bits, axis=axis)
    return _packed(w, codes, scale, bits=bits, scheme="power", exponent=parameters["exponent"])


_STORES: dict[str, Callable[[Array, Parameters, int, Axis], QuantizedTensor]] = {
    "absmax": _absmax,
    "lsq": _lsq,
    "minmax": _minmax,
    "mse": _mse,
    "power": _power,
    "statsq": _statsq,
}
