"""Gradient transformations, reparameterizations and update rules, each of them a pure function."""

from poise.optim import kappas
from poise.optim.adamp import ScaleByAdamPState, adamp, scale_by_adamp
from poise.optim.armijo import Armijo, ArmijoInfo, armijo_gradient_descent
from poise.optim.channel_axes import ChannelAxes, flax_channel_axes
from poise.optim.compander import CompandedParams, Compander, companded_scales, compander
from poise.optim.companding import companding, companding_bound, companding_grad, companding_inverse
from poise.optim.gradient_average import AverageGradientsState, average_gradients
from poise.optim.kappas import Kappa
from poise.optim.linear_rules import LinearRule, Separation, iterations_to_separate, path_of_rule
from poise.optim.lion_kappa import lion_kappa, scale_by_lion_kappa
from poise.optim.lion_kappa_diagnostics import (
    lion_kappa_constraint_violation,
    lion_kappa_lyapunov,
    lion_kappa_stationarity_gap,
)
from poise.optim.meco import MecoState, effective_sample_size_from_log_weights, meco_init, meco_loss, nce_loss
from poise.optim.normalized_gd import (
    logistic_gd,
    logistic_rule,
    normalized_logistic_loss,
    normalized_logistic_weights,
)
from poise.optim.perceptron import batch_perceptron, batch_perceptron_rule, perceptron_rule
from poise.optim.projection import adamp_view, project_radial
from poise.optim.prox import ApplyProxState, apply_prox
from poise.optim.sgdp import ScaleBySgdpState, scale_by_sgdp, sgdp
from poise.optim.sso import (
    SSO,
    SSOInfo,
    SSOState,
    TargetLineSearch,
    sso,
    sso_step,
    target_line_search,
    target_surrogate,
)
from poise.optim.wgsef import (
    WGSEFPenalty,
    WGSEFRule,
    prox_wgsef,
    wgsef,
    wgsef_conjugate,
    wgsef_penalty,
    wgsef_top_k_mask,
)

__all__ = [
    "SSO",
    "ApplyProxState",
    "Armijo",
    "ArmijoInfo",
    "AverageGradientsState",
    "ChannelAxes",
    "CompandedParams",
    "Compander",
    "Kappa",
    "LinearRule",
    "MecoState",
    "SSOInfo",
    "SSOState",
    "ScaleByAdamPState",
    "ScaleBySgdpState",
    "Separation",
    "TargetLineSearch",
    "WGSEFPenalty",
    "WGSEFRule",
    "adamp",
    "adamp_view",
    "apply_prox",
    "armijo_gradient_descent",
    "average_gradients",
    "batch_perceptron",
    "batch_perceptron_rule",
    "companded_scales",
    "compander",
    "companding",
    "companding_bound",
    "companding_grad",
    "companding_inverse",
    "effective_sample_size_from_log_weights",
    "flax_channel_axes",
    "iterations_to_separate",
    "kappas",
    "lion_kappa",
    "lion_kappa_constraint_violation",
    "lion_kappa_lyapunov",
    "lion_kappa_stationarity_gap",
    "logistic_gd",
    "logistic_rule",
    "meco_init",
    "meco_loss",
    "nce_loss",
    "normalized_logistic_loss",
    "normalized_logistic_weights",
    "path_of_rule",
    "perceptron_rule",
    "project_radial",
    "prox_wgsef",
    "scale_by_adamp",
    "scale_by_lion_kappa",
    "scale_by_sgdp",
    "sgdp",
    "sso",
    "sso_step",
    "target_line_search",
    "target_surrogate",
    "wgsef",
    "wgsef_conjugate",
    "wgsef_penalty",
    "wgsef_top_k_mask",
]
