"""Quantizers, quantization-aware training, post-training quantization and integer export, as pure functions."""

from poise.quant.qparams import (
    absmax_scale,
    minmax_qparams,
    mse_qparams,
)
from poise.quant.rounding import (
    clamp_inclusive,
    grad_scale,
    round_ste,
)
from poise.quant.uniform import (
    dequantize,
    fake_quantize,
    quantize,
)

__all__ = [
    "absmax_scale",
    "clamp_inclusive",
    "dequantize",
    "fake_quantize",
    "grad_scale",
    "minmax_qparams",
    "mse_qparams",
    "quantize",
    "round_ste",
]
