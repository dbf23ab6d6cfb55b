"""Attention functions: softplus attention with re-weighting, and softmax in extended-exponent arithmetic."""

from poise.attention.dot_product_attention import dot_product_attention
from poise.attention.ext_float import (
    ExtFloat,
    ext_add,
    ext_cumsum,
    ext_div_to_float,
    ext_exp,
    ext_from_float,
    ext_log,
    ext_mul,
    ext_psum,
    ext_sum,
)
from poise.attention.inputs import length_scale
from poise.attention.softplus_attention import softplus_attention
from poise.attention.two_pass_softmax import two_pass_log_softmax, two_pass_logsumexp, two_pass_softmax
from poise.attention.weights import attention_entropy, lssa_weights, reweight_attention

__all__ = [
    "ExtFloat",
    "attention_entropy",
    "dot_product_attention",
    "ext_add",
    "ext_cumsum",
    "ext_div_to_float",
    "ext_exp",
    "ext_from_float",
    "ext_log",
    "ext_mul",
    "ext_psum",
    "ext_sum",
    "length_scale",
    "lssa_weights",
    "reweight_attention",
    "softplus_attention",
    "two_pass_log_softmax",
    "two_pass_logsumexp",
    "two_pass_softmax",
]
