"""Quantizers, quantization-aware training, post-training quantization and integer export, as pure functions."""

from poise.quant.adaround import (
    adaround_beta,
    adaround_codes,
    adaround_hard,
    adaround_init,
    adaround_regularizer,
    adaround_rounding,
    adaround_soft,
)
from poise.quant.annealing import confidence_guided_annealing
from poise.quant.export import QuantizedParams, dequantize_tree, export, quantizers_of
from poise.quant.flexround import (
    FlexRoundParams,
    LRQParams,
    flexround,
    flexround_codes,
    flexround_init,
    lrq,
    lrq_codes,
    lrq_init,
)
from poise.quant.integer_dot import int8_conv, int8_dot, int8_dot_general, integer_weights, quantize_activations
from poise.quant.lsq import lsq, lsq_init
from poise.quant.nupes import (
    NupesParams,
    nupes_beta,
    nupes_codes,
    nupes_exponent,
    nupes_hard,
    nupes_init,
    nupes_soft,
    soft_round,
)
from poise.quant.oscillation import (
    FreezingState,
    OscillationState,
    freezing_init,
    freezing_update,
    oscillating_fraction,
    oscillation_init,
    oscillation_update,
)
from poise.quant.packing import PACKED_BITS, pack_bits, packed_length, storage_bits, unpack_bits
from poise.quant.power import (
    power_bennett_mse,
    power_decode_table,
    power_dequantize,
    power_fake_quantize,
    power_quantize,
    power_search,
)
from poise.quant.qdrop import qdrop
from poise.quant.qk_product import qk_product
from poise.quant.qparams import absmax_scale, minmax_qparams, mse_qparams
from poise.quant.quantized_tensor import (
    QuantizedTensor,
    dequantize_tensor,
    is_quantized,
    quantized_tensor,
    tensor_codes,
    tree_nbytes,
)
from poise.quant.quantizers import LRQ, AdaRound, FlexRound, Nupes, Quantizer
from poise.quant.reconstruct import apply_quantizers, reconstruct, reconstruct_blocks, reconstruct_with_activations
from poise.quant.reconstruction import reconstruction_loss
from poise.quant.rounding import clamp_inclusive, grad_scale, round_ste
from poise.quant.rules import QuantRule, apply_weight_quant, init_weight_qparams, match_rule, quantized_weights
from poise.quant.statsq import high_confidence_mask, statsq, statsq_codes
from poise.quant.uniform import dequantize, fake_quantize, quantize

__all__ = [
    "LRQ",
    "PACKED_BITS",
    "AdaRound",
    "FlexRound",
    "FlexRoundParams",
    "FreezingState",
    "LRQParams",
    "Nupes",
    "NupesParams",
    "OscillationState",
    "QuantRule",
    "QuantizedParams",
    "QuantizedTensor",
    "Quantizer",
    "absmax_scale",
    "adaround_beta",
    "adaround_codes",
    "adaround_hard",
    "adaround_init",
    "adaround_regularizer",
    "adaround_rounding",
    "adaround_soft",
    "apply_quantizers",
    "apply_weight_quant",
    "clamp_inclusive",
    "confidence_guided_annealing",
    "dequantize",
    "dequantize_tensor",
    "dequantize_tree",
    "export",
    "fake_quantize",
    "flexround",
    "flexround_codes",
    "flexround_init",
    "freezing_init",
    "freezing_update",
    "grad_scale",
    "high_confidence_mask",
    "init_weight_qparams",
    "int8_conv",
    "int8_dot",
    "int8_dot_general",
    "integer_weights",
    "is_quantized",
    "lrq",
    "lrq_codes",
    "lrq_init",
    "lsq",
    "lsq_init",
    "match_rule",
    "minmax_qparams",
    "mse_qparams",
    "nupes_beta",
    "nupes_codes",
    "nupes_exponent",
    "nupes_hard",
    "nupes_init",
    "nupes_soft",
    "oscillating_fraction",
    "oscillation_init",
    "oscillation_update",
    "pack_bits",
    "packed_length",
    "power_bennett_mse",
    "power_decode_table",
    "power_dequantize",
    "power_fake_quantize",
    "power_quantize",
    "power_search",
    "qdrop",
    "qk_product",
    "quantize",
    "quantize_activations",
    "quantized_tensor",
    "quantized_weights",
    "quantizers_of",
    "reconstruct",
    "reconstruct_blocks",
    "reconstruct_with_activations",
    "reconstruction_loss",
    "round_ste",
    "soft_round",
    "statsq",
    "statsq_codes",
    "storage_bits",
    "tensor_codes",
    "tree_nbytes",
    "unpack_bits",
]
