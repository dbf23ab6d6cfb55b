"""One-step diffusion distillation: f-divergences, density ratios, diffusion teachers, samplers and averages."""

from poise.fdistill.divergences import (
    DIVERGENCES,
    FDivergence,
    alpha,
    divergence,
    f_divergence,
    f_weight,
    from_function,
    scale,
    skew_js,
)
from poise.fdistill.losses import (
    GanLosses,
    approx_r1,
    fake_score_loss,
    gan_losses,
    guided,
    matching_gradient,
    surrogate_loss,
)
from poise.fdistill.prediction import denoising_loss, prediction_target, x0_from_prediction
from poise.fdistill.ratio import (
    RatioBins,
    bin_index,
    effective_sample_size,
    fastgen_weight,
    init_ratio_bins,
    log_ratio,
    normalize_log_ratio,
    normalized_weight,
)

__all__ = [
    "DIVERGENCES",
    "FDivergence",
    "GanLosses",
    "RatioBins",
    "alpha",
    "approx_r1",
    "bin_index",
    "denoising_loss",
    "divergence",
    "effective_sample_size",
    "f_divergence",
    "f_weight",
    "fake_score_loss",
    "fastgen_weight",
    "from_function",
    "gan_losses",
    "guided",
    "init_ratio_bins",
    "log_ratio",
    "matching_gradient",
    "normalize_log_ratio",
    "normalized_weight",
    "prediction_target",
    "scale",
    "skew_js",
    "surrogate_loss",
    "x0_from_prediction",
]
