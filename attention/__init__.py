"""Attention functions: softplus attention with re-weighting, and softmax in extended-exponent arithmetic."""

from poise.attention.dot_product_attention import dot_product_attention
from poise.attention.inputs import length_scale
from poise.attention.softplus_attention import softplus_attention
from poise.attention.weights import attention_entropy, lssa_weights, reweight_attention

__all__ = [
    "attention_entropy",
    "dot_product_attention",
    "length_scale",
    "lssa_weights",
    "reweight_attention",
    "softplus_attention",
]
