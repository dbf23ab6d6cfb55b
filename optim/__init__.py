"""Gradient transformations, reparameterizations and update rules, each of them a pure function."""

from poise.optim.adamp import ScaleByAdamPState, adamp, scale_by_adamp
from poise.optim.channel_axes import ChannelAxes, flax_channel_axes
from poise.optim.compander import CompandedParams, Compander, companded_scales, compander
from poise.optim.companding import companding, companding_bound, companding_grad, companding_inverse
from poise.optim.projection import adamp_view, project_radial
from poise.optim.sgdp import ScaleBySgdpState, scale_by_sgdp, sgdp

__all__ = [
    "ChannelAxes",
    "CompandedParams",
    "Compander",
    "ScaleByAdamPState",
    "ScaleBySgdpState",
    "adamp",
    "adamp_view",
    "companded_scales",
    "compander",
    "companding",
    "companding_bound",
    "companding_grad",
    "companding_inverse",
    "flax_channel_axes",
    "project_radial",
    "scale_by_adamp",
    "scale_by_sgdp",
    "sgdp",
]
