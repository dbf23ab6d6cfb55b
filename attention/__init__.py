"""Attention functions: softplus attention with re-weighting, and softmax in extended-exponent arithmetic."""

from poise.attention.attention_fn import attention_fn
from poise.attention.decoding import KeyValueCache, attend_with_cache, init_cache
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
from poise.attention.sharded import sharded_attention
from poise.attention.softplus_attention import softplus_attention
from poise.attention.two_pass_softmax import two_pass_log_softmax, two_pass_logsumexp, two_pass_softmax
from poise.attention.weights import attention_entropy, lssa_weights, reweight_attention

__all__ = [
    "ExtFloat",
    "KeyValueCache",
    "attend_with_cache",
    "attention_entropy",
    "attention_fn",
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
    "init_cache",
    "length_scale",
    "lssa_weights",
    "reweight_attention",
    "sharded_attention",
    "softplus_attention",
    "two_pass_log_softmax",
    "two_pass_logsumexp",
    "two_pass_softmax",
]
