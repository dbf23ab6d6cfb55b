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
    "RatioBins",
    "alpha",
    "bin_index",
    "divergence",
    "effective_sample_size",
    "f_divergence",
    "f_weight",
    "fastgen_weight",
    "from_function",
    "init_ratio_bins",
    "log_ratio",
    "normalize_log_ratio",
    "normalized_weight",
    "scale",
    "skew_js",
]
