"""The ways to quantize a weight that a rule may name."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from poise.quant.checks import Axis
from poise.quant.lsq import lsq, lsq_init
from poise.quant.power import power_fake_quantize, power_search
from poise.quant.qparams import absmax_scale, minmax_qparams, mse_qparams
from poise.quant.quantizers import QUANTIZERS, Quantizer
from poise.quant.statsq import statsq
from poise.quant.uniform import fake_quantize

Parameters = dict[str, Array]


class WeightMethod(NamedTuple):
    """How one method quantizes one weight.

    Attributes:
      init: from a weight, bits and the axes of a group to what the method learns or keeps, by name; empty if there is
        nothing. All of it are floats, so that a gradient with respect to it exists.
      apply: from a weight, those parameters, bits and axes to the quantized weight, with its gradient.
      least_bits: the fewest bits that it has.
    """

    init: Callable[[Array, int, Axis], Parameters]
    apply: Callable[[Array, Parameters, int, Axis], Array]
    least_bits: int = 1


def _nothing(w: Array, bits: int, axis: Axis) -> Parameters:
    del w, bits, axis
    return {}


def _statsq(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
    del parameters
    return statsq(w, bits=bits, axis=axis)


def _lsq_init(w: Array, bits: int, axis: Axis) -> Parameters:
    return {"step": lsq_init(w, bits=bits, axis=axis)}


def _lsq(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
    return lsq(w, parameters["step"], bits=bits, axis=axis)


def _absmax(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
    del parameters
    return fake_quantize(w, jax.lax.stop_gradient(absmax_scale(w, bits, axis)), bits=bits)


def _minmax(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
    del parameters
    scale, zero_point = minmax_qparams(w, bits, axis)
    return fake_quantize(w, jax.lax.stop_gradient(scale), zero_point, bits=bits, signed=False)


def _mse_init(w: Array, bits: int, axis: Axis) -> Parameters:
    scale, zero_point = mse_qparams(w, bits, axis)
    return {"scale": scale, "zero_point": zero_point.astype(jnp.float32)}


def _mse(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
    del axis
    scale = jax.lax.stop_gradient(parameters["scale"])
    return fake_quantize(w, scale, parameters["zero_point"], bits=bits, signed=False)


def _power_init(w: Array, bits: int, axis: Axis) -> Parameters:
    return {"exponent": power_search(w, bits=bits, axis=axis)}


def _power(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
    return power_fake_quantize(w, parameters["exponent"], bits=bits, axis=axis)


def _reconstructed(kind: type[Quantizer]) -> WeightMethod:
    """A method of post-training quantization: what it learns starts as if rounded at once, or comes from elsewhere."""

    def init(w: Array, bits: int, axis: Axis) -> Parameters:
        return kind(bits, axis).init(w, jax.random.key(0))

    def apply(w: Array, parameters: Parameters, bits: int, axis: Axis) -> Array:
        try:
            return kind(bits, axis).hard(w, parameters)
        except TypeError as error:
            raise KeyError(str(error)) from error

    return WeightMethod(init, apply, least_bits=2)


WEIGHT_METHODS: dict[str, WeightMethod] = {
    "absmax": WeightMethod(_nothing, _absmax, least_bits=2),  # of one bit's codes only 0 would be met
    "lsq": WeightMethod(_lsq_init, _lsq, least_bits=2),
    "minmax": WeightMethod(_nothing, _minmax),
    "mse": WeightMethod(_mse_init, _mse),
    "power": WeightMethod(_power_init, _power, least_bits=2),
    "statsq": WeightMethod(_nothing, _statsq),
    **{name: _reconstructed(kind) for name, kind in QUANTIZERS.items()},
}
