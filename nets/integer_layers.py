"""Runs any linen model on quantized parameters, with integer products in its dense and convolutional layers."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from poise.core.arguments import check_choice
from poise.quant import (
    QuantizedParams,
    QuantizedTensor,
    absmax_scale,
    dequantize_tree,
    int8_conv,
    int8_dot,
    integer_weights,
    is_quantized,
    quantized_tensor,
)

ACTIVATIONS = ("dynamic", "none")
LAYERS = (nn.Dense, nn.DenseGeneral, nn.Conv)
_OTHER_PADDING = ("CIRCULAR", "CAUSAL", "REFLECT")


def integer_apply(
    model: nn.Module,
    variables: Mapping[str, Any] | QuantizedParams,
    *args: Any,
    activations: str | Mapping[str, Any] = "dynamic",
    **kwargs: Any,
) -> Any:
    r"""``model.apply`` on quantized parameters, whose products are int8 times int8, summed in int32.

    Every Dense, DenseGeneral and Conv whose kernel is a :class:`poise.quant.QuantizedTensor` runs in integers; no
    module is edited. What has no integer form here (embeddings, transposed convolutions, batched or grouped-scale
    DenseGeneral, circular padding, and convolutions on GPUs, where XLA has none for integers) is dequantized on
    the fly.

    Args:
      model: any linen module.
      variables: the exported parameters, or collections with them under ``"params"`` (and ``"batch_stats"``, ...).
      args: of the model.
      activations: ``"dynamic"``: every token (row of a dense layer, example of a convolution) is quantized to 8 bits
        with a scale of its own; a mapping from the paths of layers to fixed scales, from :func:`activation_scales`
        (layers without one are dynamic);
        ``"none"``: activations stay float and weights are dequantized on the fly, so only memory is saved.
      kwargs: of ``model.apply``.

    Returns:
      What ``model.apply`` returns.

    Raises:
      ValueError: if ``activations`` is another word, or a sum has too many terms for int32.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from poise.nets import integer_apply
      >>> from poise.quant import QuantRule, export
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((4, 5))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> quantized = export(params, {}, [QuantRule("kernel", weight_bits=8, method="absmax")])
      >>> y = jax.jit(lambda q, x: integer_apply(model, q, x))(quantized, x)
      >>> bool(jnp.allclose(y, model.apply({"params": params}, x), atol=0.05))
      True
    """
    scales = {} if isinstance(activations, str) else dict(activations)
    if isinstance(activations, str):
        check_choice("activations", activations, ACTIVATIONS)
    tree: Any = {"params": variables.params} if isinstance(variables, QuantizedParams) else variables
    with nn.intercept_methods(_interceptor(scales, integers=activations != "none")):
        return model.apply(tree, *args, **kwargs)


def activation_scales(
    model: nn.Module, variables: Mapping[str, Any], batches: Sequence[Any], **kwargs: Any
) -> dict[str, Array]:
    """Fixed scales for :func:`integer_apply`, from the largest magnitude that enters each layer on calibration data.

    Args:
      model: any linen module.
      variables: float collections, as ``model.apply`` takes them.
      batches: inputs, each a model's argument or a tuple of them.
      kwargs: of ``model.apply``.

    Returns:
      Scalars by the path of the layer.

    Raises:
      ValueError: if there are no batches, or one is empty.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from poise.nets import activation_scales
      >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(3)]), jnp.ones((4, 5))
      >>> scales = activation_scales(model, model.init(jax.random.key(0), x), [x])
      >>> sorted(scales), round(float(scales["layers_0"] * 255 / 2), 3)
      (['layers_0', 'layers_2'], 1.0)
    """
    if not len(batches):
        raise ValueError("batches must have at least one batch to calibrate on, got none")
    found: dict[str, Array] = {}

    def interceptor(next_fun: Callable[..., Any], arguments: tuple, options: dict, context: Any) -> Any:
        if context.method_name == "__call__" and isinstance(context.module, LAYERS):
            x = arguments[0] if arguments else options["inputs"]
            name = "/".join(context.module.path)
            scale = absmax_scale(x, 8, None).reshape(())
            found[name] = jnp.maximum(found[name], scale) if name in found else scale
        return next_fun(*arguments, **options)

    with nn.intercept_methods(interceptor):
        for batch in batches:
            model.apply(variables, *(batch if isinstance(batch, tuple) else (batch,)), **kwargs)
    return found


def _interceptor(scales: Mapping[str, Any], integers: bool) -> Callable[..., Any]:
    def interceptor(next_fun: Callable[..., Any], args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        own = module.variables.get("params", {}) if module.scope is not None else {}
        own = {name: leaf for name, leaf in own.items() if is_quantized(leaf)}
        if not own:
            return next_fun(*args, **kwargs)
        if integers and context.method_name == "__call__" and isinstance(module, LAYERS) and list(own) == ["kernel"]:
            x = args[0] if args else kwargs["inputs"]
            out = _integer_layer(module, jnp.asarray(x), own["kernel"], scales.get("/".join(module.path)))
            if out is not None:
                return out
        floats = {**module.variables, "params": dequantize_tree(module.variables["params"])}
        method = getattr(type(module), context.method_name)
        return module.clone(parent=None, name=None).apply(floats, *args, method=method, **kwargs)

    return interceptor


def _integer_layer(module: nn.Module, x: Array, kernel: QuantizedTensor, scale: Any) -> Array | None:
    """The layer's output by an integer product, or None if it has no such form."""
    if isinstance(module, nn.Conv):
        out = _conv(module, x, kernel, scale)
    elif isinstance(module, nn.Dense):
        out = int8_dot(x, kernel, scale=scale)
    elif isinstance(module, nn.DenseGeneral):
        out = _dense_general(module, x, kernel, scale)
    else:
        return None
    if out is None:
        return None
    if module.has_variable("params", "bias"):
        out = out + module.get_variable("params", "bias").astype(out.dtype)
    dtype = getattr(module, "dtype", None)
    return out if dtype is None else out.astype(dtype)


def _dense_general(module: nn.DenseGeneral, x: Array, kernel: QuantizedTensor, scale: Any) -> Array | None:
    axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
    contracted = sorted(axis % x.ndim for axis in axes)
    factors, w_scale, zero_point = integer_weights(kernel)
    last = list(range(x.ndim - len(contracted), x.ndim))
    grouped = w_scale.ndim > 0 and any(size != 1 for size in w_scale.shape[: len(contracted)])
    if module.batch_dims or contracted != last or grouped:
        return None
    inputs = int(np.prod(kernel.shape[: len(contracted)]))
    features = kernel.shape[len(contracted) :]

    def flat(value: Array) -> Array:
        if value.ndim == 0:
            return value
        return jnp.broadcast_to(value, (*value.shape[: len(contracted)], *features)).reshape(1, -1)

    zero_point = None if zero_point is None else flat(zero_point)
    matrix = quantized_tensor(factors.reshape(inputs, -1), flat(w_scale), zero_point, bits=8)
    rows = x.reshape(*x.shape[: x.ndim - len(contracted)], inputs)
    return int8_dot(rows, matrix, scale=scale).reshape(*rows.shape[:-1], *features)


def _conv(module: nn.Conv, x: Array, kernel: QuantizedTensor, scale: Any) -> Array | None:
    padding = module.padding
    if module.mask is not None or (isinstance(padding, str) and padding in _OTHER_PADDING):
        return None
    if jax.default_backend() == "gpu":
        warnings.warn("XLA has no integer convolutions on GPUs: kernels are dequantized instead", stacklevel=2)
        return None
    space = kernel.ndim - 2

    def by_axis(value: Any) -> tuple[int, ...]:
        return (1,) * space if value is None else (value,) * space if isinstance(value, int) else tuple(value)

    if isinstance(padding, int):
        padding = [(padding, padding)] * space
    elif not isinstance(padding, str):
        padding = [(side, side) if isinstance(side, int) else (side[0], side[1]) for side in padding]
    batch = x.shape[: x.ndim - space - 1]
    out = int8_conv(
        x.reshape(-1, *x.shape[len(batch) :]),
        kernel,
        strides=by_axis(module.strides),
        padding=padding,
        lhs_dilation=by_axis(module.input_dilation),
        rhs_dilation=by_axis(module.kernel_dilation),
        feature_group_count=module.feature_group_count,
        scale=scale,
    )
    return out.reshape(*batch, *out.shape[1:])
