"""Every Flax module: diffusion U-Nets, their preconditioning and layers, and the heads that estimate density ratios."""

from poise.nets.categorical_head import CategoricalHead, ValueMLP
from poise.nets.dhariwal_unet import DhariwalUNet
from poise.nets.discriminator import DiscriminatorHead, head_group_count
from poise.nets.edm import (
    EDMCoefficients,
    EDMPrecond,
    edm_coefficients,
    iddpm_coefficients,
    iddpm_levels,
    ve_coefficients,
    vp_coefficients,
)
from poise.nets.edm_checkpoints import EDM_CHECKPOINTS
from poise.nets.edm_state_dict import from_state_dict, infer_config, state_dict_shapes, to_state_dict
from poise.nets.embeddings import FourierEmbedding, PositionalEmbedding, positional_embedding
from poise.nets.evonorm import (
    EvoNorm,
    EvoNormB0,
    EvoNormB1,
    EvoNormB2,
    EvoNormS0,
    EvoNormS1,
    EvoNormS2,
    evonorm_b,
    evonorm_s,
)
from poise.nets.generate import generate
from poise.nets.group_norm import GroupNorm, group_count
from poise.nets.initializers import LayerInit
from poise.nets.integer_layers import activation_scales, integer_apply
from poise.nets.labels import label_vectors
from poise.nets.mlp import MLP, AffineGenerator, MLPHead
from poise.nets.presets import adm, ddpmpp, edm_network, ncsnpp, preconditioning_of
from poise.nets.qk_product_attention import QKProductSelfAttention, qk_product_params
from poise.nets.qk_reparam import QKReparamSelfAttention
from poise.nets.quantizers import LSQQuantizer, activation_quantization
from poise.nets.ratio_head import RatioHead
from poise.nets.resampling import ResampleConv, downsample, upsample
from poise.nets.rotary import rotary_embedding
from poise.nets.song_unet import SongUNet
from poise.nets.sparse_token_mask import SparseTokenMask
from poise.nets.transformer import Transformer
from poise.nets.unet_block import BlockStyle, UNetBlock, pixel_attention
from poise.nets.vision_transformer import (
    VISION_TRANSFORMER_SIZES,
    SelfAttention,
    TransformerBlock,
    VisionTransformer,
    vision_transformer,
)

__all__ = [
    "EDM_CHECKPOINTS",
    "MLP",
    "VISION_TRANSFORMER_SIZES",
    "AffineGenerator",
    "BlockStyle",
    "CategoricalHead",
    "DhariwalUNet",
    "DiscriminatorHead",
    "EDMCoefficients",
    "EDMPrecond",
    "EvoNorm",
    "EvoNormB0",
    "EvoNormB1",
    "EvoNormB2",
    "EvoNormS0",
    "EvoNormS1",
    "EvoNormS2",
    "FourierEmbedding",
    "GroupNorm",
    "LSQQuantizer",
    "LayerInit",
    "MLPHead",
    "PositionalEmbedding",
    "QKProductSelfAttention",
    "QKReparamSelfAttention",
    "RatioHead",
    "ResampleConv",
    "SelfAttention",
    "SongUNet",
    "SparseTokenMask",
    "Transformer",
    "TransformerBlock",
    "UNetBlock",
    "ValueMLP",
    "VisionTransformer",
    "activation_quantization",
    "activation_scales",
    "adm",
    "ddpmpp",
    "downsample",
    "edm_coefficients",
    "edm_network",
    "evonorm_b",
    "evonorm_s",
    "from_state_dict",
    "generate",
    "group_count",
    "head_group_count",
    "iddpm_coefficients",
    "iddpm_levels",
    "infer_config",
    "integer_apply",
    "label_vectors",
    "ncsnpp",
    "pixel_attention",
    "positional_embedding",
    "preconditioning_of",
    "qk_product_params",
    "rotary_embedding",
    "state_dict_shapes",
    "to_state_dict",
    "upsample",
    "ve_coefficients",
    "vision_transformer",
    "vp_coefficients",
]
